"""The collector is off inside, back afterwards, and nobody's setting is lost: nested, in threads, in forked children."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from distckpt.heap import no_collections


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_off_inside_and_back_after_an_exception() -> None:
    @no_collections()
    def fails() -> None:
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with no_collections():
        pass
    assert not gc.isenabled()


def test_the_last_thread_to_leave_turns_it_on() -> None:
    entered, leave = threading.Event(), threading.Event()

    @no_collections()
    def work() -> None:
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=work)
    with no_collections():
        thread.start()
        entered.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_child_forked_inside_collects() -> None:
    inside: list[bool] = []
    with no_collections():
        child = os.fork()
        inside.append(gc.isenabled())
    if child == 0:
        left = gc.isenabled()
        with no_collections():
            again = gc.isenabled()
        os._exit(0 if inside[0] and left and not again and gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()
