"""One round of the agreement, as seen by one rank; ``agreement.py`` says how a round goes and is the only
user.

Keys of a round: ``r<rank>`` receipts, ``n`` how many there are, ``full`` all are there, ``abort`` the
first failure, ``wake`` the leader has something to do, ``gate`` who may settle the round, ``v`` the
verdict, ``a`` how many ranks have seen it, ``acked`` all that can have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.dcp import channel
from distckpt.dcp.channel import Channel, StoreLost
from distckpt.dcp.verdict import FAILED, OK, FailedVerdict, decode_failed, judge, refused
from distckpt.errors import AgreementError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger("distckpt")
T = TypeVar("T")

# Seconds past the deadline; together they keep every outcome within the deadline plus 5 s.
LATE_LEADER_S = 1.5  # until a follower tries to close the gate
DOUBT_S = 3.0  # until a follower gives up on a leader that had closed the gate
LIMIT_S = 4.0  # until the store itself must have answered
ABORT_GRACE_S = 1.0  # for other ranks' causes to arrive once one rank failed
ACK_GRACE_S = 2.0  # for ranks to fetch a failing verdict before the leader, which may host the store, goes away
Decide = Callable[[list[bytes]], bytes]


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place among all; ``where`` says where it runs, for messages of other ranks."""

    rank: int
    world_size: int
    host: str
    where: str
    prefix: str
    channel: Channel


class Round:
    """One use of one key. ``cause`` is the exception of the leader's decision, ``succeeded`` how it ended."""

    def __init__(self, seat: Seat, key: str, deadline: Deadline) -> None:
        self.seat, self.key, self.deadline = seat, key, deadline
        self.cause: BaseException | None = None
        self.succeeded = False
        self.told = "done"  # the key that says that the verdict was seen by all who can see it

    def name(self, what: str) -> str:
        """Return the store's key."""
        return f"{self.seat.prefix}/round/{self.key}/{what}"

    def post(self, receipt: bytes, why: str | None = None) -> None:
        """Post this rank's receipt; ``why``: raise the abort flag with this reason."""
        rank, world = self.seat.rank, self.seat.world_size

        def op(store: Store) -> int:
            channel.put(store, self.name(f"r{rank}"), receipt)
            count = int(store.add(self.name("n"), 1))
            if count == world:
                store.set(self.name("full"), "1")
            if why is not None:
                store.compare_set(self.name("abort"), "", f"S{rank} {why}")
            if why is not None or count == world:
                store.set(self.name("wake"), "1")
            return count

        if self._call("post a receipt", op) > world:
            raise ValueError(f"agreement key {self.key!r} was used before: keys must be fresh")

    def abort_flag(self) -> tuple[int, str] | None:
        """Return the first rank that failed and why, None while none has."""
        flag = self._call("read the abort flag", lambda store: channel.get(store, self.name("abort")))
        if flag is None:
            return None
        rank, _, why = flag.decode(errors="replace").partition(" ")
        return int(rank), why

    def lead(self, decide: Decide | None) -> bytes:
        """Gather, decide, tell all; returns the verdict. Without ``decide`` this rank has failed itself."""
        self._wait("wake", self._left_s(0.0))
        flag = self.abort_flag()
        if flag is not None:
            self._wait("full", min(ABORT_GRACE_S, self._left_s(LATE_LEADER_S)))
        receipts = self._receipts()
        failed = self._judge(receipts, flag)
        if failed is not None or decide is None:
            assert failed is not None, "a leader without a decision has posted its own failure"
            return self._announce(failed)
        if self._close_gate() != b"leader":
            return self._announce(self._leader_was_late())
        try:
            verdict = OK + decide([receipt[1:] for receipt in receipts if receipt is not None])
        except BaseException as error:
            self.cause = error
            failed = refused(self.key, self.seat.rank, self.seat.host, error)
            try:
                return self._announce(failed)
            except StoreLost as lost:
                log.warning("%s: the decision failed, and the others could not be told: %s", self.key, lost)
                return failed.encode().encode()
        self.succeeded = True
        try:
            self._call("post the verdict", lambda store: channel.put(store, self.name("v"), verdict))
            self._acknowledge(verdict)
        except StoreLost as lost:  # decided is decided: the others ask storage
            log.warning("%s: agreed, but the others could not be told: %s", self.key, lost)
        return verdict

    def follow(self) -> bytes:
        """Wait for the verdict and return it; settle the round in the leader's place if it does not come.

        Raises:
            AgreementError: with ``in_doubt``, when the leader fell silent while it decided.
        """
        if not self._wait("v", self._left_s(LATE_LEADER_S)):
            if self._close_gate() != b"leader":
                late = self._judge(self._receipts(), self.abort_flag(), timed_out=True)
                return self._announce(late or self._leader_was_late())
            if not self._wait("v", self._left_s(DOUBT_S)):
                raise AgreementError(
                    f"{self.key}: in doubt: rank 0 ({self._where([0])[0]}) was deciding, and its verdict "
                    f"did not reach rank {self.seat.rank} ({self.seat.host}) within "
                    f"{self.deadline.budget_s:g} s",
                    key=self.key,
                    missing=(0,),
                    in_doubt=True,
                )
        verdict = self._call("read the verdict", lambda store: channel.get(store, self.name("v")))
        if verdict is None:  # only failed rounds are deleted before all ranks have seen them
            raise AgreementError(f"{self.key}: failed so long ago that its causes are no longer kept", key=self.key)
        self._acknowledge(verdict)
        return verdict

    def leave(self) -> None:
        """Let nobody wait for this rank to see the verdict."""
        self._call("leave the round", lambda store: self._count_ack(store, 0))

    def seen_by_all(self, store: Store) -> bool:
        """Return whether no rank will read this round's keys any more."""
        return bool(store.check([self.name("done")]))

    def delete(self, store: Store) -> None:
        """Delete this round's keys (after a success each rank has deleted its own receipt)."""
        if not self.succeeded:
            for rank in range(self.seat.world_size):
                channel.drop(store, self.name(f"r{rank}"))
        channel.drop(store, self.name("v"))
        for what in ("n", "full", "abort", "wake", "gate", "a", "acked", "done"):
            store.delete_key(self.name(what))

    def _announce(self, failed: FailedVerdict) -> bytes:
        """Post a failing verdict unless there is a verdict already; returns the one that holds."""
        text = "S" + failed.encode()

        def op(store: Store) -> bytes:
            verdict = channel.join(store, self.name("v"), store.compare_set(self.name("v"), "", text))
            store.compare_set(self.name("abort"), "", f"S{self.seat.rank} {failed.error()}")
            return verdict

        verdict = self._call("post a failing verdict", op)
        self._acknowledge(verdict)
        if self.seat.rank == 0:
            self._wait(self.told, min(ACK_GRACE_S, self._left_s(LIMIT_S)))
        return verdict

    def _acknowledge(self, verdict: bytes) -> None:
        absent = len(decode_failed(verdict).missing) if verdict[:1] == FAILED else 0

        self.told = "acked" if absent else "done"

        def op(store: Store) -> None:
            if verdict[:1] == OK:
                channel.drop(store, self.name(f"r{self.seat.rank}"))
            self._count_ack(store, absent)

        self._call("acknowledge the verdict", op)

    def _count_ack(self, store: Store, absent: int) -> None:
        """Count this rank's acknowledgement; the last one to, and only that one, says so.

        ``seen_by_all`` looks for that word and not at the count, so that no rank still writes keys which the
        leader has deleted.
        """
        count = store.add(self.name("a"), 1)
        if count == self.seat.world_size:
            store.set(self.name("done"), "1")
        elif count == self.seat.world_size - absent:
            store.set(self.name("acked"), "1")

    def _close_gate(self) -> bytes:
        """Become the one who settles this round, unless another rank is; returns who it is."""
        me = "leader" if self.seat.rank == 0 else f"rank {self.seat.rank}"
        return self._call("close the gate", lambda store: bytes(store.compare_set(self.name("gate"), "", me)))

    def _receipts(self) -> list[bytes | None]:
        names = [self.name(f"r{rank}") for rank in range(self.seat.world_size)]

        def op(store: Store) -> list[bytes | None]:
            if not store.check([self.name("full")]):
                return [channel.get(store, name) for name in names]
            heads = store.multi_get(names)
            return [channel.join(store, name, head) for name, head in zip(names, heads, strict=True)]

        return self._call("read all receipts", op)

    def _judge(
        self, receipts: list[bytes | None], flag: tuple[int, str] | None, *, timed_out: bool = False
    ) -> FailedVerdict | None:
        return judge(
            self.key,
            receipts,
            self._where([rank for rank, receipt in enumerate(receipts) if receipt is None]),
            first=None if flag is None else flag[0],
            timed_out=timed_out or self.deadline.passed,
            waited_s=self.deadline.budget_s,
        )

    def _leader_was_late(self) -> FailedVerdict:
        missing = ((0, self._where([0])[0]),)
        return FailedVerdict(self.key, (), missing=missing, waited_s=self.deadline.budget_s)

    def _where(self, ranks: list[int]) -> dict[int, str]:
        """Return where ranks run, as each said when it joined."""

        def op(store: Store) -> dict[int, str]:
            told = {rank: channel.get(store, f"{self.seat.prefix}/peer/{rank}") for rank in ranks}
            return {rank: "unknown host" if text is None else text.decode() for rank, text in told.items()}

        return self._call("look up ranks", op) if ranks else {}

    def _left_s(self, grace_s: float) -> float:
        return max(0.0, self.deadline.at + grace_s - clock.monotonic())

    def _wait(self, what: str, seconds: float) -> bool:
        return self.seat.channel.wait(f"wait for {what!r}", [self.name(what)], seconds, self._limit_s())

    def _call(self, what: str, op: Callable[[Store], T]) -> T:
        return self.seat.channel.call(what, op, self._limit_s())

    def _limit_s(self) -> float:
        """Seconds that the store has to answer now."""
        return max(0.5, self._left_s(LIMIT_S))
