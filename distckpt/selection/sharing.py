"""Work shared over ranks: who does what, one common outcome, and no rank that waits for ever."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from distckpt.clock import Deadline
from distckpt.dcp.agreement import Agreement
from distckpt.errors import AgreementError

T = TypeVar("T")
_SERIALS = itertools.count(1)
"""Numbers this process's shared works, so that two in a row never share keys (all ranks start them in one order)."""


class Ranks:
    """The ranks of the default process group, in rounds; alone without one, where rounds are plain calls."""

    def __init__(self, timeout_s: float) -> None:
        self.agreement = Agreement.from_environment(timeout_s=timeout_s)
        self.rank, self.world_size = self.agreement.rank, self.agreement.world_size
        self._serial = next(_SERIALS) if self.world_size > 1 else 0
        self._rounds = itertools.count(1)
        self._timeout_s = timeout_s

    def gather(
        self, work: Callable[[Callable[[], None]], bytes], combine: Callable[[list[bytes]], bytes], *, times: int = 1
    ) -> bytes:
        """Do ``work`` on every rank; returns on all what ``combine`` makes on rank 0 of what they returned.

        ``work`` is given a function to call now and then, which raises once another rank has failed. It may take
        ``times`` the usual deadline. Raises ``AgreementError`` naming every rank that failed or is missing; alone, what
        the work raised.
        """
        if self.world_size == 1:
            return combine([work(lambda: None)])
        key = f"evaluate/{self._serial}/{next(self._rounds)}"
        deadline = Deadline.after(self._timeout_s * max(1, times))

        def check() -> None:
            reason = self.agreement.aborted(key)
            if reason is not None:
                raise AgreementError(f"stopped because another rank failed: {reason}")

        with self.agreement.guard(key, deadline=deadline):
            payload = work(check)
        return self.agreement.round(key, payload, combine, deadline=deadline)

    def close(self) -> None:
        """Leave."""
        self.agreement.close()


@contextlib.contextmanager
def torchrun_ranks() -> Iterator[bool]:
    """Join the ranks that ``torchrun`` started, if it started this process; yields whether this is rank 0."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
