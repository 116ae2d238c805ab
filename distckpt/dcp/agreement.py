"""How ranks reach one verdict without ever hanging: the only place that waits for peers.

It talks over a c10d ``Store`` and never over a process group. A round, under keys that nobody used before:

1. Every rank posts its receipt (its part, or the error that kept it from having one). A failing rank also
   raises the abort flag, which peers test while they work. The last rank to post wakes the leader; so
   does an abort.
2. The leader (rank 0) closes the gate, decides, and posts the verdict; with an error among the receipts,
   or a rank missing at the deadline, it posts a failing verdict. Every rank returns or raises that one
   verdict.
3. A rank that has no verdict shortly after its deadline tries to close the gate itself. If it can, nobody
   can decide any more, and it posts the failing verdict in the leader's place. If the leader had closed
   the gate and then fell silent, or if the store is gone, only storage knows: the error says
   ``in_doubt``.
4. Ranks acknowledge; the leader deletes a round's keys in a later round, or in ``close``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch.distributed as dist

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.dcp import channel
from distckpt.dcp.channel import Channel, StoreLost
from distckpt.dcp.rounds import ACK_GRACE_S, LIMIT_S, Decide, Round, Seat
from distckpt.dcp.verdict import OK, decode_failed, describe, failed_receipt, failure_of
from distckpt.errors import AgreementError, AgreementTimeout

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
STORE_STALL_S = 6.0  # a store that is silent for longer (plus LIMIT_S) stops the writers
KEPT_ROUNDS = 8  # failed rounds whose keys are kept for ranks that were not heard from


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int


class Agreement:
    """One rank's part in rounds with all others. For one thread at a time; ``clone()`` makes one for
    another.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        timeout_s: float,
        poll_s: float = 0.2,
        prefix: str = "distckpt",
    ) -> None:
        """Join over ``store``, whose operations run on a clone of it (None: only for a single rank).

        ``timeout_s``: seconds a round may take unless it is given a deadline. ``poll_s``: how often
        ``aborted`` really asks the store. Raises ``AgreementError`` where the store does not answer.
        """
        if not 0 <= rank < world_size or (store is None and world_size > 1):
            raise ValueError(f"rank {rank} of {world_size} with store {store!r}")
        self.rank, self.world_size, self.host = rank, world_size, socket.gethostname()
        self.timeout_s, self.poll_s, self.prefix = timeout_s, poll_s, prefix
        self._store: Store = dist.HashStore() if store is None else store  # type: ignore[attr-defined]
        self._channel = Channel(self._store, threaded=world_size > 1)
        where = f"{self.host}, pid {os.getpid()}"
        self._seat = Seat(rank, world_size, self.host, where, prefix, self._channel)
        self._pending: list[Round] = []  # the leader's: rounds that still have keys
        self._abort_seen: tuple[str, float, str | None] = ("", -1.0, None)
        self._ask("join", lambda s: s.set(f"{prefix}/peer/{rank}", f"S{where}"))

    @classmethod
    def from_environment(cls, *, timeout_s: float, store: Store | None = None) -> Agreement:
        """Join the ranks of the default process group over its store; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(None, 0, 1, timeout_s=timeout_s)
        store = store or dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size(), timeout_s=timeout_s)

    def clone(self) -> Agreement:
        """Return another one for another thread; both share the store's keys, so each round needs its own."""
        return Agreement(
            self._store,
            self.rank,
            self.world_size,
            timeout_s=self.timeout_s,
            poll_s=self.poll_s,
            prefix=self.prefix,
        )

    def bytes_group(self, key: str, ranks: Sequence[int], timeout_s: float) -> Any:
        """Return a gloo group of its own for ``ranks``, this one among them, to exchange bytes; never the training group.

        ``key`` must be fresh, and the same on all of them. Every wait in it ends with ``RuntimeError`` after
        ``timeout_s``; the group lives as long as the object.
        """
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"{self.prefix}/group/{key}/{ranks[0]}", self._store
        )
        group: Any = dist.ProcessGroupGloo(store, ranks.index(self.rank), len(ranks), timedelta(seconds=timeout_s))
        return group

    @property
    def is_leader(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def peers(self) -> list[Peer | None]:
        """Return where each rank runs; None for ranks that have not joined yet."""

        def op(store: Store) -> list[Peer | None]:
            told = [channel.get(store, f"{self.prefix}/peer/{rank}") for rank in range(self.world_size)]
            parts = [None if text is None else text.decode().rsplit(", pid ", 1) for text in told]
            return [None if p is None else Peer(rank, p[0], int(p[1])) for rank, p in enumerate(parts)]

        return self._ask("look up ranks", op)

    def round(self, key: str, payload: bytes, decide: Decide, *, deadline: Deadline | None = None) -> bytes:
        """Return the same bytes on every rank: what ``decide(payloads in rank order)`` returned on the
        leader.

        ``key`` must be fresh, and the same on all ranks.

        Raises:
            AgreementError: the same on every rank, naming all ranks that failed; on the leader caused by
                ``decide``'s own exception. ``in_doubt`` where this rank could not learn the verdict.
            AgreementTimeout: ranks were not heard from before the deadline.
        """
        now = self._round(key, deadline)
        try:
            now.post(OK + payload)
            verdict = self._settle(now, decide)
        except StoreLost as lost:
            raise AgreementError(
                f"{key}: in doubt: rank {self.rank} ({self.host}): {lost}", key=key, in_doubt=True
            ) from lost
        if verdict[:1] == OK:
            return verdict[1:]
        if now.cause is not None and not isinstance(now.cause, Exception):
            raise now.cause  # an interrupt stays one; the others were told
        raise decode_failed(verdict).error() from now.cause

    def fail(self, key: str, error: BaseException, *, deadline: Deadline | None = None) -> NoReturn:
        """Take part in the round ``key`` with an error instead of a payload.

        Raises:
            AgreementError: always; the same as on every other rank, caused by ``error``. Never ``in_doubt``:
                without this rank's part nothing can have been decided.
        """
        now = self._round(key, deadline)
        try:
            self._post_failure(now, error)
            verdict = self._settle(now, None)
        except StoreLost as lost:
            failure = failure_of(self.rank, self.host, error)
            raise AgreementError(
                f"{key}: {describe(failure)} (the other ranks could not be told: {lost})",
                key=key,
                failures=(failure,),
            ) from error
        raise decode_failed(verdict).error() from error

    @contextlib.contextmanager
    def guard(self, key: str, *, deadline: Deadline | None = None) -> Iterator[None]:
        """Do the work that leads to the round ``key``: an exception in the body fails that round on all
        ranks.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, AgreementError) and error.key == key:
                raise  # the round itself was in the body: every rank knows
            self.fail(key, error, deadline=deadline)
        except BaseException as error:  # an interrupt: tell the others, wait for nobody
            with contextlib.suppress(StoreLost):
                now = self._round(key, Deadline.after(0.0))
                self._post_failure(now, error)
                now.leave()
            raise

    def aborted(self, key: str) -> str | None:
        """Return why the round ``key`` can no longer succeed, None while it can; cheap enough for every
        chunk.

        A store that does not answer counts as a reason.
        """
        seen_key, seen_at, reason = self._abort_seen
        if seen_key != key:
            reason = None
        elif reason is not None or clock.monotonic() - seen_at < self.poll_s:
            return reason
        try:
            flag = self._round(key, Deadline.after(min(self.timeout_s, STORE_STALL_S))).abort_flag()
            reason = None if flag is None else flag[1]
        except StoreLost as lost:
            reason = str(lost)
        self._abort_seen = (key, clock.monotonic(), reason)
        return reason

    def broadcast(self, key: str, payload: bytes | None, *, deadline: Deadline | None = None) -> bytes:
        """Return the leader's bytes on every rank (others pass None); a round: it fails on all ranks or
        none.
        """

        def decide(_: list[bytes]) -> bytes:
            if payload is None:
                raise ValueError(f"broadcast {key!r}: the leader has to pass bytes")
            return payload

        return self.round(key, b"", decide, deadline=deadline)

    def post_blob(self, digest: str, blob: bytes) -> None:
        """Store bytes of any size under their digest; of all ranks that post the same, only one sends
        them.
        """
        path, claim = f"{self.prefix}/blob/{digest}", str(self.rank)

        def op(store: Store) -> None:
            if store.compare_set(f"{path}/claim", "", claim) == claim.encode() and not store.check([path]):
                channel.put(store, path, blob)

        self._ask(f"store blob {digest}", op)

    def get_blob(self, digest: str) -> bytes:
        """Return bytes that some rank posts; waits for them up to ``timeout_s``, then raises
        ``AgreementTimeout``.
        """
        path, what = f"{self.prefix}/blob/{digest}", f"read blob {digest}"
        try:
            self._channel.wait(what, [path], self.timeout_s, self.timeout_s + LIMIT_S)
            blob = self._channel.call(what, lambda store: channel.get(store, path), self._patience_s)
        except StoreLost as lost:
            raise AgreementError(f"rank {self.rank} ({self.host}): {lost}") from lost
        if blob is None:
            raise AgreementTimeout(
                f"rank {self.rank} ({self.host}): no rank posted blob {digest} within {self.timeout_s:g} s"
            )
        return blob

    def forget_blob(self, digest: str) -> None:
        """Delete a blob; for the leader, once no rank can ask for it any more."""
        path = f"{self.prefix}/blob/{digest}"

        def op(store: Store) -> None:
            channel.drop(store, path)
            store.delete_key(f"{path}/claim")

        self._ask(f"delete blob {digest}", op)

    def close(self) -> None:
        """Leave. The leader first gives the others a moment to fetch the last verdict, then deletes its
        keys.
        """
        with contextlib.suppress(StoreLost):
            if self._pending:
                last = self._pending[-1].name(self._pending[-1].told)  # who has seen the last verdict has seen all
                self._channel.wait("see acknowledgements", [last], ACK_GRACE_S, ACK_GRACE_S + 1.0)
                self._channel.call("delete old keys", self._purge, LIMIT_S)
        self._channel.close()

    def _settle(self, now: Round, decide: Decide | None) -> bytes:
        if not self.is_leader:
            return now.follow()
        if self._pending:
            self._channel.call("delete old keys", self._purge, max(0.5, now.deadline.left_s))
        self._pending.append(now)
        return now.lead(decide)

    def _purge(self, store: Store) -> None:
        """Delete rounds that all ranks have seen, and the oldest failed ones where too many are left.

        A round that succeeded is kept until all ranks have seen it: at most one such is unseen, because
        the next can only succeed with every rank in it.
        """
        for now in [old for old in self._pending if old.seen_by_all(store)]:
            now.delete(store)
            self._pending.remove(now)
        for now in [old for old in self._pending if not old.succeeded][:-KEPT_ROUNDS]:
            now.delete(store)
            self._pending.remove(now)

    def _post_failure(self, now: Round, error: BaseException) -> None:
        failure = failure_of(self.rank, self.host, error)
        now.post(failed_receipt(failure, follows=isinstance(error, AgreementError)), describe(failure))

    def _round(self, key: str, deadline: Deadline | None) -> Round:
        return Round(self._seat, key, deadline or Deadline.after(self.timeout_s))

    @property
    def _patience_s(self) -> float:
        return max(10.0, self.timeout_s)  # a TCPStore may look up this host's name when it connects

    def _ask(self, what: str, op: Callable[[Store], T]) -> T:
        try:
            return self._channel.call(what, op, self._patience_s)
        except StoreLost as lost:
            raise AgreementError(f"rank {self.rank} ({self.host}): {lost}") from lost
