"""A counting communicator: the agreement's calls, for real ranks or for one participant in place of many alike.

``Counted`` wraps any agreement and counts rounds and bytes. ``Group`` is one made of threads: each participant stands
for a class of ranks that send the same, so that the planner's own code runs for 16,384 ranks with a handful of threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from distckpt.errors import AgreementError, RankFailure

PATIENCE_S = 300.0


@dataclass
class Counts:
    """What one rank sent and received: rounds, their bytes up and down, blobs offered (of equal ones only the first one
    travels) and fetched.
    """

    rounds: int = 0
    sent: int = 0
    received: int = 0
    blobs_offered: int = 0
    offered: int = 0
    blobs_fetched: int = 0
    fetched: int = 0

    def plain(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)


class Counted:
    """An agreement that counts."""

    def __init__(self, agreement: Any) -> None:
        self._inner = agreement
        self.counts = Counts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def round(self, key: str, payload: bytes, decide: Callable[[list[bytes]], bytes], **options: Any) -> bytes:
        """See ``Agreement.round``."""
        self.counts.rounds += 1
        self.counts.sent += len(payload)
        verdict: bytes = self._inner.round(key, payload, decide, **options)
        self.counts.received += len(verdict)
        return verdict

    def post_blob(self, name: str, blob: bytes) -> None:
        """See ``Agreement.post_blob``."""
        self.counts.blobs_offered += 1
        self.counts.offered += len(blob)
        self._inner.post_blob(name, blob)

    def get_blob(self, name: str) -> bytes:
        """See ``Agreement.get_blob``."""
        blob: bytes = self._inner.get_blob(name)
        self.counts.blobs_fetched += 1
        self.counts.fetched += len(blob)
        return blob


class Group:
    """``classes[i]`` are the ranks that participant ``i`` stands for; the first participant is rank 0 alone."""

    def __init__(self, classes: Sequence[Sequence[int]], world: int) -> None:
        assert list(classes[0]) == [0], "the leader stands for itself"
        self.classes, self.world = classes, world
        self._of = [0] * world
        for number, ranks in enumerate(classes):
            for rank in ranks:
                self._of[rank] = number
        self._changed = threading.Condition()
        self._posted: dict[str, dict[int, bytes]] = {}
        self._verdicts: dict[str, bytes | BaseException] = {}
        self.blobs: dict[str, bytes] = {}

    @classmethod
    def of(cls, classes: Sequence[Sequence[int]], world: int) -> Group:
        """Return the group in which rank 0 is taken out of its class."""
        rest = [[rank for rank in ranks if rank] for ranks in classes]
        return cls([[0], *(ranks for ranks in rest if ranks)], world)

    def run(self, work: Callable[[Counted, int], Any]) -> list[tuple[Any, Counts, float]]:
        """Run ``work(agreement, rank)`` for every participant; returns values, counts and CPU seconds of its thread."""
        results: list[Any] = [None] * len(self.classes)

        def one(number: int) -> None:
            agreement = Counted(_Member(self, number))
            started = time.thread_time()
            try:
                value = work(agreement, self.classes[number][0])
            except BaseException as error:  # handed to the caller below
                value = error
                self.fail(error)
            results[number] = (value, agreement.counts, time.thread_time() - started)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(self.classes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for value, _, _ in results:
            if isinstance(value, BaseException):
                raise value
        return results

    def post(self, key: str, number: int, payload: bytes) -> None:
        """Take a participant's payload for all of its ranks."""
        with self._changed:
            self._posted.setdefault(key, {})[number] = payload
            self._changed.notify_all()

    def payloads(self, key: str) -> list[bytes]:
        """Return all ranks' payloads, once they are there."""
        with self._changed:
            self._wait(lambda: len(self._posted.get(key, ())) == len(self.classes), key)
            posted = self._posted[key]
        return [posted[number] for number in self._of]

    def tell(self, key: str, verdict: bytes | BaseException) -> None:
        """Post a verdict."""
        with self._changed:
            self._verdicts[key] = verdict
            self._changed.notify_all()

    def verdict(self, key: str) -> bytes:
        """Return the verdict, once it is there."""
        with self._changed:
            self._wait(lambda: key in self._verdicts, key)
            found = self._verdicts[key]
        if isinstance(found, BaseException):
            failure = RankFailure(0, "sim", type(found).__name__, str(found))
            raise AgreementError(str(found), key=key, failures=(failure,)) from found
        return found

    def put(self, name: str, blob: bytes) -> None:
        """Store a blob."""
        with self._changed:
            self.blobs.setdefault(name, blob)
            self._changed.notify_all()

    def get(self, name: str) -> bytes:
        """Return a blob, once it is there."""
        with self._changed:
            self._wait(lambda: name in self.blobs, name)
            return self.blobs[name]

    def fail(self, error: BaseException) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._failed: BaseException = error
            self._changed.notify_all()

    def _wait(self, there: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(lambda: there() or hasattr(self, "_failed"), PATIENCE_S):
            raise AgreementError(f"{what}: not heard of in {PATIENCE_S:g} s", key=what)
        if not there():
            raise AgreementError(f"{what}: a participant failed: {self._failed}", key=what)


class _Member:
    """One participant's agreement."""

    def __init__(self, group: Group, number: int) -> None:
        self._group, self._number = group, number
        self.rank, self.world_size, self.is_leader = group.classes[number][0], group.world, number == 0
        self.timeout_s = PATIENCE_S

    def round(self, key: str, payload: bytes, decide: Callable[[list[bytes]], bytes], **_: Any) -> bytes:
        self._group.post(key, self._number, payload)
        if self.is_leader:
            try:
                self._group.tell(key, decide(self._group.payloads(key)))
            except Exception as error:
                self._group.tell(key, error)
        return self._group.verdict(key)

    def post_blob(self, name: str, blob: bytes) -> None:
        self._group.put(name, blob)

    def get_blob(self, name: str) -> bytes:
        return self._group.get(name)

    @contextmanager
    def guard(self, key: str, **_: Any) -> Iterator[None]:
        yield

    def aborted(self, key: str) -> str | None:
        return None
