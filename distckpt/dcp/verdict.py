"""What ranks tell each other in a round, as bytes: receipts (their part) and verdicts. Pure.

Both start with one byte: ``+`` and the bytes agreed on, or ``-`` and JSON that says what went wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from distckpt.errors import AgreementError, AgreementTimeout, CommitInDoubt, RankFailure

OK = b"+"
FAILED = b"-"
_TEXT = 4000  # characters kept of an error's message
_MANY, _SHORT = (
    32,
    300,
)  # where more ranks than that fail, fewer characters: a verdict must fit one store value


def failure_of(rank: int, host: str, error: BaseException) -> RankFailure:
    """Describe an exception that a rank raised."""
    text = str(error)
    text = text if len(text) <= _TEXT else text[:_TEXT] + " ..."
    return RankFailure(rank, host, type(error).__name__, text.encode(errors="replace").decode())


def describe(failure: RankFailure) -> str:
    """Return ``rank 1 (host): OSError: disk full``."""
    return f"rank {failure.rank} ({failure.host}): {failure.kind}: {failure.message}"


def failed_receipt(failure: RankFailure, *, follows: bool) -> bytes:
    """Return a receipt that says this rank failed; ``follows``: it only stopped because a peer had failed."""
    return FAILED + json.dumps({**asdict(failure), "follows": follows}).encode()


def read_failed_receipt(receipt: bytes) -> tuple[RankFailure, bool]:
    """Return the failure, and whether it only follows from another rank's."""
    fields = json.loads(receipt[1:])
    follows = bool(fields.pop("follows"))
    return RankFailure(**fields), follows


@dataclass(frozen=True, slots=True)
class FailedVerdict:
    """Why a round failed: ranks that raised, ranks missing at the deadline, ranks still busy when others
    failed.

    ``missing`` and ``busy`` are (rank, where it runs).
    """

    key: str
    failures: tuple[RankFailure, ...]
    missing: tuple[tuple[int, str], ...] = ()
    busy: tuple[tuple[int, str], ...] = ()
    waited_s: float = 0.0
    in_doubt: bool = False

    def encode(self) -> str:
        """Return the verdict as text (ASCII), for the store's compare-and-set."""
        return FAILED.decode() + json.dumps(asdict(self))

    def error(self) -> AgreementError:
        """Return the exception that every rank raises, with the same text on each."""
        parts = [describe(failure) for failure in self.failures]
        parts += [
            f"rank {rank} ({where}) is missing: not heard from within {self.waited_s:g} s"
            for rank, where in self.missing
        ]
        if self.busy:
            parts.append("not heard from yet: " + ", ".join(f"rank {r} ({where})" for r, where in self.busy))
        kind = AgreementError if self.failures or not self.missing else AgreementTimeout
        return kind(
            f"{self.key}: no agreement: " + "; ".join(parts),
            key=self.key,
            failures=self.failures,
            missing=tuple(rank for rank, _ in self.missing),
            in_doubt=self.in_doubt,
        )


def decode_failed(verdict: bytes) -> FailedVerdict:
    """Return what ``FailedVerdict.encode`` wrote."""
    fields = json.loads(verdict[1:])
    fields["failures"] = tuple(RankFailure(**f) for f in fields["failures"])
    for name in ("missing", "busy"):
        fields[name] = tuple((rank, where) for rank, where in fields[name])
    return FailedVerdict(**fields)


def judge(
    key: str,
    receipts: Sequence[bytes | None],
    where: Mapping[int, str],
    *,
    first: int | None,
    timed_out: bool,
    waited_s: float,
) -> FailedVerdict | None:
    """Return why the round fails, None when every rank's part is there and fine.

    ``receipts`` is in rank order, None where there is none; ``where`` says where those silent ranks run,
    and ``first`` which rank failed first. Silent ranks are missing when the time is over, and only busy
    before. Ranks that stopped because another one had failed are no causes, as long as there is another.
    """
    found = [read_failed_receipt(r) for r in receipts if r is not None and r[:1] == FAILED]
    causes = [failure for failure, follows in found if not follows] or [failure for failure, _ in found]
    causes.sort(key=lambda failure: (failure.rank != first, failure.rank))
    if len(causes) > _MANY:
        causes = [replace(failure, message=failure.message[:_SHORT]) for failure in causes]
    silent = tuple((rank, where.get(rank, "unknown host")) for rank, r in enumerate(receipts) if r is None)
    if not causes and not silent:
        return None
    if causes and not timed_out:
        return FailedVerdict(key, tuple(causes), busy=silent, waited_s=waited_s)
    return FailedVerdict(key, tuple(causes), missing=silent, waited_s=waited_s)


def refused(key: str, rank: int, host: str, error: BaseException) -> FailedVerdict:
    """Return the verdict of a leader whose decision raised."""
    return FailedVerdict(key, (failure_of(rank, host, error),), in_doubt=isinstance(error, CommitInDoubt))
