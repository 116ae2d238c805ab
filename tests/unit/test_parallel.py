"""Requests on a few threads: each once, begun in order, and the first error ends the rest."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from builders import Together

from distckpt.boxes import Box
from distckpt.dcp import parallel, writer
from distckpt.dcp.parallel import run_all, turns
from distckpt.dcp.writer import write_shard
from distckpt.format.placing import Piece
from distckpt.storage.direct import REQUEST


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_each_request_is_worked_on_once(threads: int, count: int) -> None:
    done: list[int] = []
    run_all(done.append, range(count), threads, "test")
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_is_raised_and_what_has_not_begun_is_dropped(threads: int) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with lock:
            begun.append(number)
        if number == 5:
            raise ValueError("request 5")

    with pytest.raises(ValueError, match="request 5"):
        run_all(work, range(100_000), threads, "test")
    assert set(range(6)) <= set(begun)
    assert len(begun) < 100_000


def test_others_under_way_end_before_the_error_is_raised() -> None:
    both, ended = threading.Barrier(2), threading.Event()

    def work(number: int) -> None:
        both.wait(10)
        if number == 0:
            raise ValueError("request 0")
        threading.Event().wait(0.05)
        ended.set()

    with pytest.raises(ValueError, match="request 0"):
        run_all(work, range(2), 2, "test")
    assert ended.is_set()


@pytest.mark.parametrize(
    ("processors", "ranks", "nbytes", "pieces", "most"),
    [(2, 1, 1 << 40, 1, 2), (2, 1, 100 << 10, 100, 1), (64, 8, 1 << 40, 1, 8), (64, 8, 900 << 20, 10_000, 3), (1, 4, 0, 0, 1)],
)
def test_small_pieces_are_left_to_few_threads(
    processors: int, ranks: int, nbytes: int, pieces: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve threads that want the interpreter lock for each of 18,867 pieces took three times as long as two."""
    monkeypatch.setattr(parallel, "processors", lambda: processors)
    monkeypatch.setattr(parallel, "local_ranks", lambda: ranks)
    turn = turns(nbytes, pieces)
    assert [turn.acquire(blocking=False) for _ in range(most + 1)] == [True] * most + [False]


class Counted(threading.Semaphore):
    """A semaphore that knows how often somebody came in."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.entered = 0

    def __enter__(self) -> bool:
        self.acquire()
        self.entered += 1
        return True


def test_one_thread_fills_while_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests are under way at once, though never two of them are hashed and copied at once."""
    turn = Counted(1)
    monkeypatch.setattr(writer, "turns", lambda nbytes, pieces: turn)
    payload = np.random.default_rng(0).bytes(4 * REQUEST)
    size = REQUEST // 4  # 16 pieces, four to a request

    def source(piece: int) -> memoryview:
        return memoryview(payload)[piece * size : (piece + 1) * size]

    store, name = Together(4), "step-0000000001/g0001-a0/00000-of-00001.safetensors"
    pieces = [Piece(f"t{i}", "uint8", (size,), Box.whole((size,))) for i in range(16)]
    written = write_shard(
        store, name, pieces, source, rank=0, world_size=1, save_id="s", objects={}, threads=4
    )
    assert turn.entered == 4
    data = bytes(store.read(name))
    assert data[written.plan.data_start :] == payload
