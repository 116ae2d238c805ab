"""Rounds between real processes: one verdict for all, whoever raises, dies, stops or is late."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from ranks import RankOutcome, run_ranks, store

from distckpt.clock import Deadline
from distckpt.dcp import rounds
from distckpt.dcp.agreement import KEPT_ROUNDS, Agreement
from distckpt.dcp.channel import PART, Channel, StoreLost
from distckpt.errors import AgreementError, AgreementTimeout, CommitInDoubt

dist: Any = torch.distributed
HOST = socket.gethostname()
SIGNED_IN = "pid"  # what a message says of a rank that joined before it went missing


def join(payloads: list[bytes]) -> bytes:
    return b"|".join(payloads)


def joined(rank: int, world: int, timeout_s: float = 10.0) -> Agreement:
    return Agreement(store(), rank, world, timeout_s=timeout_s)


def told(error: AgreementError) -> dict[str, Any]:
    """What a rank's error says, in a form that compares between processes."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "failed": [(f.rank, f.host, f.kind, f.message) for f in error.failures],
        "missing": error.missing,
        "in_doubt": error.in_doubt,
        "cause": type(error.__cause__).__name__,
    }


def outcome_of(work: Callable[[], bytes]) -> dict[str, Any] | bytes:
    try:
        return work()
    except AgreementError as error:
        return told(error)


def await_stop(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.005)


# ---- all goes well ----


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_get_the_leaders_verdict_over_payloads_in_rank_order(world: int) -> None:
    def rank_main(rank: int) -> bytes:
        return joined(rank, world).round("a", f"r{rank}".encode(), join)

    want = "|".join(f"r{rank}" for rank in range(world)).encode()
    assert run_ranks(world, rank_main, backend=None) == [want] * world


def test_from_environment_uses_the_process_groups_store_and_clones_work_in_threads() -> None:
    def rank_main(rank: int) -> list[bytes]:
        agreement = Agreement.from_environment(timeout_s=10)
        found: list[bytes] = []
        clone = agreement.clone()
        thread = threading.Thread(target=lambda: found.append(clone.round("thread", b"t", join)))
        thread.start()
        found_here = agreement.round("main", str(agreement.rank).encode(), join)
        dist.barrier()
        thread.join()
        agreement.close()
        return [found_here, *found]

    assert run_ranks(2, rank_main) == [[b"0|1", b"t|t"]] * 2


def test_alone_without_a_store() -> None:
    agreement = Agreement.from_environment(timeout_s=1)
    assert (agreement.rank, agreement.world_size, agreement.is_leader) == (0, 1, True)
    threads = threading.active_count()
    assert agreement.round("a", b"x", join) == b"x"
    assert agreement.broadcast("b", b"y") == b"y"
    with pytest.raises(AgreementError, match=r"rank 0 \(.*\): ZeroDivisionError") as caught:
        agreement.round("c", b"", lambda _: bytes(1 // 0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(AgreementError, match="KeyError: 'k'") as caught, agreement.guard("d"):
        raise KeyError("k")
    assert isinstance(caught.value.__cause__, KeyError)
    assert threading.active_count() == threads
    agreement.close()


@pytest.mark.parametrize("kind", ["hash", "prefix", "file", "tcp"])
def test_every_store_kind_works_with_threads_as_ranks(kind: str, tmp_path: Path) -> None:
    shared: Any = {
        "hash": dist.HashStore,
        "prefix": lambda: dist.PrefixStore("p", dist.HashStore()),
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 2),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False),
    }[kind]()
    results: dict[int, Any] = {}

    def rank_main(rank: int) -> None:
        agreement = Agreement(shared, rank, 2, timeout_s=10)
        if rank == 1:
            time.sleep(0.05)  # the other one has to wait
        good = agreement.round("good", b"%d" % rank, join)
        sent = agreement.broadcast("sent", b"from 0" if rank == 0 else None)
        late = Agreement(shared, rank, 2, timeout_s=0.3)
        bad = outcome_of(lambda: late.round("late", b"", join)) if rank == 0 else None
        results[rank] = good, sent, bad

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank][:2] for rank in range(2)] == [(b"0|1", b"from 0")] * 2
    assert results[0][2]["kind"] == "AgreementTimeout"
    assert results[0][2]["missing"] == (1,)


def test_large_payloads_and_verdicts() -> None:
    def rank_main(rank: int) -> list[int]:
        payload = bytes([rank]) * (1 << 20)
        huge = bytes([7 + rank]) * (2 * PART + 5)  # more than a TCPStore value can hold
        agreement = joined(rank, 2)
        found = [agreement.round("a", payload, join), agreement.round("b", huge, join)]
        assert found[0] == b"|".join(bytes([r]) * (1 << 20) for r in range(2))
        assert found[1] == b"|".join(bytes([7 + r]) * (2 * PART + 5) for r in range(2))
        agreement.close()
        return [len(f) for f in found]

    assert run_ranks(2, rank_main, backend=None) == [[(2 << 20) + 1, 4 * PART + 11]] * 2


def test_peers_say_where_they_run() -> None:
    def rank_main(rank: int) -> tuple[int, list[Any]]:
        agreement = joined(rank, 2)
        agreement.round("a", b"", join)
        return os.getpid(), [(p.rank, p.host, p.pid) for p in agreement.peers() if p]

    (pid0, peers0), (pid1, peers1) = run_ranks(2, rank_main, backend=None)
    assert peers0 == peers1 == [(0, HOST, pid0), (1, HOST, pid1)]


# ---- a rank raises ----


def test_one_rank_raising_is_every_ranks_error() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 3)

        def work() -> bytes:
            with agreement.guard("save-1"):
                if rank == 1:
                    raise OSError(28, "No space left on device", "/data/shard")
            return agreement.round("save-1", b"fine", join)

        return outcome_of(work)

    outcomes = run_ranks(3, rank_main, backend=None)
    for outcome in outcomes:
        assert outcome["kind"] == "AgreementError"
        assert outcome["failed"] == [(1, HOST, "OSError", "[Errno 28] No space left on device: '/data/shard'")]
        assert outcome["missing"] == ()
        assert not outcome["in_doubt"]
    assert len({outcome["text"] for outcome in outcomes}) == 1
    assert "save-1" in outcomes[0]["text"]
    assert [outcome["cause"] for outcome in outcomes] == ["NoneType", "OSError", "NoneType"]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_two_ranks_raising_are_both_named_the_first_one_first(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    second = 2

    def rank_main(rank: int) -> Any:
        monkeypatch.setattr(rounds, "ABORT_GRACE_S", 8.0)  # ends as soon as all ranks have answered
        agreement = joined(rank, 4)
        if rank == first:
            return outcome_of(lambda: agreement.fail("k", ValueError(f"boom {rank}")))
        if rank == second:
            store().wait(["distckpt/round/k/abort"], timedelta(seconds=10))
            return outcome_of(lambda: agreement.fail("k", ValueError(f"boom {rank}")))
        return outcome_of(lambda: agreement.round("k", b"", join))

    outcomes = run_ranks(4, rank_main, backend=None)
    assert len({o["text"] for o in outcomes}) == 1
    assert [(r, m) for r, _, _, m in outcomes[0]["failed"]] == [(first, f"boom {first}"), (second, "boom 2")]


def test_writers_see_the_abort_and_are_not_listed_as_causes() -> None:
    def rank_main(rank: int) -> Any:
        agreement = Agreement(store(), rank, 3, timeout_s=20, poll_s=0.02)

        def work() -> bytes:
            with agreement.guard("k"):
                if rank == 2:
                    raise MemoryError("staging")
                while (why := agreement.aborted("k")) is None:
                    time.sleep(0.001)
                raise AgreementError(f"stopped: {why}")
            return b""

        assert agreement.aborted("other") is None
        return outcome_of(work)

    for outcome in run_ranks(3, rank_main, backend=None):
        assert [(r, kind) for r, _, kind, _ in outcome["failed"]] == [(2, "MemoryError")]
        assert outcome["missing"] == ()


def test_a_busy_rank_is_not_called_missing_and_learns_the_verdict_later() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 3, 30)
        if rank == 1:
            return outcome_of(lambda: agreement.fail("k", ValueError("boom")))
        if rank == 2:
            store().wait(["distckpt/round/k/v"], timedelta(seconds=20))
        return outcome_of(lambda: agreement.round("k", b"", join))

    outcomes = run_ranks(3, rank_main, backend=None)
    assert len({o["text"] for o in outcomes}) == 1
    assert [f[0] for f in outcomes[2]["failed"]] == [1]
    assert outcomes[2]["missing"] == ()
    assert f"not heard from yet: rank 2 ({HOST}, {SIGNED_IN}" in outcomes[2]["text"]


@pytest.mark.parametrize("in_doubt", [False, True])
def test_the_leaders_decision_raising_is_every_ranks_error(in_doubt: bool) -> None:
    def rank_main(rank: int) -> Any:
        def decide(_: list[bytes]) -> bytes:
            raise CommitInDoubt("no answer") if in_doubt else RuntimeError("holes in tensor w")

        return outcome_of(lambda: joined(rank, 2).round("k", b"", decide))

    zero, one = run_ranks(2, rank_main, backend=None)
    assert zero["text"] == one["text"]
    assert [f[0] for f in one["failed"]] == [0]
    assert zero["in_doubt"] is one["in_doubt"] is in_doubt
    assert zero["cause"] == ("CommitInDoubt" if in_doubt else "RuntimeError")


def test_an_interrupt_stays_one_and_the_others_are_told() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 2, 30)
        try:
            with agreement.guard("k"):
                if rank == 1:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return "interrupted"
        return outcome_of(lambda: agreement.round("k", b"", join))

    zero, one = run_ranks(2, rank_main, backend=None)
    assert one == "interrupted"
    assert [f[:3] for f in zero["failed"]] == [(1, HOST, "KeyboardInterrupt")]


def test_a_round_that_failed_inside_its_guard_is_not_reported_twice() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 2)

        def work() -> bytes:
            with agreement.guard("k"):
                return agreement.round("k", b"", lambda _: bytes(1 // 0))
            return b""

        return outcome_of(work)

    zero, one = run_ranks(2, rank_main, backend=None)
    assert zero["text"] == one["text"]
    assert [f[2] for f in zero["failed"]] == ["ZeroDivisionError"]


def test_a_key_cannot_be_used_twice_while_its_round_is_known() -> None:
    agreement = Agreement(None, 0, 1, timeout_s=1)
    agreement.round("k", b"", join)
    with pytest.raises(ValueError, match="fresh"):
        agreement.round("k", b"", join)


# ---- a rank dies, stops, or never comes ----


def test_a_killed_rank_is_named_missing_by_all_others() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 3, 1.0)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome_of(lambda: agreement.round("k", b"", join))

    zero, one, two = run_ranks(3, rank_main, backend=None, expect={2: signal.SIGKILL}, timeout_s=6)
    assert two is None
    assert zero["text"] == one["text"]
    assert (zero["kind"], zero["missing"], zero["in_doubt"]) == ("AgreementTimeout", (2,), False)
    assert f"rank 2 ({HOST}, {SIGNED_IN}" in zero["text"]
    assert "is missing" in zero["text"]


def test_a_stopped_rank_is_named_and_learns_the_verdict_when_it_goes_on() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 3, 1.0)
        shared = store()
        if rank == 1:
            shared.set("pid", str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        outcome = outcome_of(lambda: agreement.round("k", b"", join))
        if rank == 0:
            os.kill(int(shared.get("pid")), signal.SIGCONT)
        return outcome

    outcomes = run_ranks(3, rank_main, backend=None, timeout_s=8)
    assert len({o["text"] for o in outcomes}) == 1
    assert {o["kind"] for o in outcomes} == {"AgreementTimeout"}
    assert outcomes[1]["missing"] == (1,)


def test_a_rank_stopped_after_its_receipt_finds_the_verdict() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 2, 20.0)
        store().set(f"pid{rank}", str(os.getpid()))

        def decide(payloads: list[bytes]) -> bytes:
            os.kill(int(store().get("pid1")), signal.SIGSTOP)
            return join(payloads)

        verdict = agreement.round("k", b"%d" % rank, decide)
        if rank == 0:
            pid = int(store().get("pid1"))
            await_stop(pid)
            for i in range(KEPT_ROUNDS + 2):  # later rounds cannot take the verdict away from it
                with pytest.raises(AgreementTimeout):
                    agreement.round(f"late{i}", b"", join, deadline=Deadline.after(0.01))
            os.kill(pid, signal.SIGCONT)
        return verdict

    assert run_ranks(2, rank_main, backend=None) == [b"0|1"] * 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_leader_gone_before_it_decides_is_replaced_while_the_store_lives(how: signal.Signals) -> None:
    """With the store in another process (as under torchrun) the outcome is certain: nobody can decide any
    more.
    """

    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 3, 1.0)
        if rank == 0:
            store().set("pid", str(os.getpid()))
            os.kill(os.getpid(), how)
            return outcome_of(lambda: agreement.round("k", b"0", lambda _: b"decided too late"))
        outcome = outcome_of(lambda: agreement.round("k", b"", join))
        if rank == 1 and how == signal.SIGSTOP:
            os.kill(int(store().get("pid")), signal.SIGCONT)
        return outcome

    expect = {0: signal.SIGKILL} if how == signal.SIGKILL else {}
    outcomes = run_ranks(3, rank_main, backend=None, expect=expect, timeout_s=10, store_host="agent")
    told_by = [o for o in outcomes if o is not None]
    assert len(told_by) == (2 if how == signal.SIGKILL else 3)
    assert len({o["text"] for o in told_by}) == 1
    assert {(o["kind"], o["missing"], o["in_doubt"]) for o in told_by} == {("AgreementTimeout", (0,), False)}


@pytest.mark.parametrize("store_host", ["rank0", "agent"])
def test_a_leader_killed_while_it_decides_leaves_the_others_in_doubt(store_host: Any) -> None:
    def rank_main(rank: int) -> Any:
        def decide(_: list[bytes]) -> bytes:
            os.kill(os.getpid(), signal.SIGKILL)
            return b""

        return outcome_of(lambda: joined(rank, 3, 1.0).round("k", b"", decide))

    outcomes = run_ranks(3, rank_main, backend=None, expect={0: signal.SIGKILL}, timeout_s=6, store_host=store_host)
    assert [o["in_doubt"] for o in outcomes[1:]] == [True, True]
    assert all("in doubt" in o["text"] for o in outcomes[1:])


def test_a_stopped_store_cannot_hold_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of a TCPStore whose host is stopped blocks, deadlines or not; ranks come back all
    the same.
    """

    def rank_main(rank: int) -> Any:
        monkeypatch.setattr(rounds, "LIMIT_S", 0.5)
        agreement = joined(rank, 2, 1.0)
        shared = store()
        if rank == 0:
            shared.set("pid", str(os.getpid()))
            shared.wait(["ready"], timedelta(seconds=20))
            helper = os.fork()  # wakes the host when rank 1 has its answer
            if helper == 0:
                os.close(told_write)
                os.read(told_read, 1)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.close(told_write)
            os.kill(os.getpid(), signal.SIGSTOP)
            return outcome_of(lambda: agreement.round("k", b"", join))
        pid = int(shared.get("pid"))
        shared.set("ready", "1")
        await_stop(pid)
        outcomes = [outcome_of(lambda: agreement.round("k", b"", join)), agreement.aborted("k2")]
        outcomes.append(outcome_of(lambda: agreement.fail("k3", ValueError("own"))))
        os.write(told_write, b"x")
        return outcomes

    told_read, told_write = os.pipe()
    try:
        _, one = run_ranks(2, rank_main, backend=None, timeout_s=40)
    finally:
        os.close(told_read)
        os.close(told_write)
    assert one[0]["in_doubt"]
    assert "did not answer" in one[0]["text"]
    assert "did not answer" in one[1]
    assert not one[2]["in_doubt"]
    assert [f[2:] for f in one[2]["failed"]] == [("ValueError", "own")]


def test_a_signal_handler_can_interrupt_a_wait_and_the_object_still_works() -> None:
    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 2, 30)
        if rank == 0:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                agreement.round("never", b"", join)
            store().set("interrupted", "1")
        else:
            store().wait(["interrupted"], timedelta(seconds=20))
        return agreement.round("next", b"", lambda _: b"fine")

    assert run_ranks(2, rank_main, backend=None) == [b"fine"] * 2


# ---- keys, blobs, close ----


def test_the_store_does_not_grow() -> None:
    def rank_main(rank: int) -> list[int]:
        agreement = joined(rank, 3)
        counts = []
        for i in range(200):
            if i % 10 == 3:
                with pytest.raises(AgreementError):
                    agreement.fail(f"k{i}", ValueError())
            else:
                agreement.round(f"k{i}", b"x" * 100, join)
            counts.append(store().num_keys())
        agreement.round("last", b"", join)
        agreement.close()
        return [max(counts[:20]), max(counts[20:]), store().num_keys() if rank == 0 else 0]

    early, late, end = run_ranks(3, rank_main, backend=None)[0]
    assert late <= early + 12 * KEPT_ROUNDS  # some rounds may wait for slow ranks; 200 rounds have 2000 keys
    assert end <= 3 + 1  # where each rank runs, and torch's own


def test_rounds_with_a_dead_rank_do_not_grow_the_store() -> None:
    agreement = Agreement(shared := dist.HashStore(), 0, 2, timeout_s=0.01)
    counts = []
    for i in range(30):
        with pytest.raises(AgreementTimeout):
            agreement.round(f"k{i}", b"", join, deadline=Deadline.after(0.002))
        counts.append(shared.num_keys())
    assert max(counts[15:]) == max(counts)
    assert counts[-1] == counts[14]


def test_close_waits_until_others_have_the_verdict() -> None:
    """The leader hosts the store and leaves at once: without acknowledgements the other would see a dead
    store.
    """

    def rank_main(rank: int) -> Any:
        agreement = joined(rank, 2)
        if rank == 0:
            agreement.round("k", b"0", join)
            agreement.close()
            os.kill(os.getpid(), signal.SIGKILL)
        return agreement.round("k", b"1", join)

    assert run_ranks(2, rank_main, backend=None, expect={0: signal.SIGKILL}) == [None, b"0|1"]


def blob_keys() -> list[str]:
    return [key for key in store().list_keys() if "/blob/" in key]


def test_blobs_are_sent_once_and_can_be_forgotten() -> None:
    def rank_main(rank: int) -> list[Any]:
        agreement = joined(rank, 3)
        shared, blob = bytes(range(256)) * 100, b"z" * (2 * PART + 1)
        agreement.post_blob("d0", shared)
        if rank == 2:
            agreement.post_blob("d1", blob)
        found: list[Any] = [agreement.get_blob("d0") == shared, agreement.get_blob("d1") == blob]
        agreement.round("all read", b"", join)
        if agreement.is_leader:
            found.append(len(blob_keys()))
            agreement.forget_blob("d0")
            agreement.forget_blob("d1")
            found.append(len(blob_keys()))
            quick = Agreement(store(), rank, 3, timeout_s=0.05)
            with pytest.raises(AgreementTimeout, match="d0"):
                quick.get_blob("d0")
        agreement.round("end", b"", join)
        return found

    assert run_ranks(3, rank_main, backend=None) == [[True, True, 7, 0], [True, True], [True, True]]


def test_a_lost_store_is_an_error_of_its_own() -> None:
    class Broken:
        def clone(self) -> Broken:
            return self

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    for threaded in (False, True):
        line = Channel(Broken(), threaded=threaded)  # type: ignore[arg-type]
        with pytest.raises(StoreLost, match="failed to look: Connection reset"):
            line.call("look", lambda s: s.check(["a"]), 1.0)
        line.close()


def test_outcomes_without_check_tell_errors_and_signals_apart() -> None:
    def rank_main(rank: int) -> int:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            raise ValueError("no")
        return rank

    outcomes: list[RankOutcome] = run_ranks(3, rank_main, backend=None, check=False)
    assert [o.ok for o in outcomes] == [True, False, False]
    assert (outcomes[1].signal, outcomes[2].kind, outcomes[2].error) == (9, "ValueError", "ValueError: no")
