"""Doing one thing on all ranks at once, on the clock: begin together, one rank's error is every rank's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec

from distckpt import clock, errors
from distckpt.dcp.agreement import Agreement
from distckpt.errors import AgreementError, DistckptError

T = TypeVar("T")
_calls = itertools.count()


class Together:
    """All ranks of an agreement; every method is called by all of them, in the same order.

    Raises, on every rank, the kind of error that the first failed rank raised; ``AgreementError`` for a rank that is
    missing or died.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.rank, self.world_size = agreement.rank, agreement.world_size

    def key(self, what: str) -> str:
        """Return a key that no round of this job had."""
        return f"bench-{what}/{next(_calls)}"

    def gather(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Do the work everywhere; return all ranks' results (plain JSON values) in rank order."""
        key = self.key(what)
        try:
            with self.agreement.guard(key):
                payload = msgspec.json.encode(work())
            answer = self.agreement.round(key, payload, lambda payloads: b"[" + b",".join(payloads) + b"]")
        except AgreementError as error:
            raise_cause(error)
        return list(msgspec.json.decode(answer))

    def led(self, what: str, work: Callable[[], Any]) -> Any:
        """Do the work on the leader alone; return its result (a plain JSON value) everywhere."""
        try:
            return msgspec.json.decode(self.agreement.round(self.key(what), b"", lambda _: msgspec.json.encode(work())))
        except AgreementError as error:
            raise_cause(error)

    def seconds(self, what: str, work: Callable[[], object]) -> float:
        """Begin the work everywhere at once; return the seconds of the slowest rank."""
        self.gather(f"{what}-begin", lambda: None)

        def timed() -> float:
            started = clock.monotonic()
            work()
            return clock.monotonic() - started

        return float(max(self.gather(what, timed)))


def raise_cause(error: AgreementError) -> NoReturn:
    """Raise on every rank what the first failed rank raised: itself where it was this one, else its kind and text."""
    cause = error.__cause__
    if isinstance(cause, DistckptError) and not isinstance(cause, AgreementError):
        raise cause from None
    first = error.failures[0] if error.failures else None
    kind = getattr(errors, first.kind, None) if first is not None else None
    if isinstance(kind, type) and issubclass(kind, DistckptError) and not issubclass(kind, AgreementError):
        raise kind(str(error)) from error
    raise error
