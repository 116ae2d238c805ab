"""Requests on a few threads: each once, begun in order, and the first error ends the rest."""

from __future__ import annotations

import threading

import pytest

from distckpt.dcp.parallel import run_all


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
