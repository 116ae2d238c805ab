"""Preemption notices: noted once, escalated on insistence, handlers put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distckpt import clock
from distckpt.errors import ConfigError
from distckpt.manager.preempt import EXIT_PREEMPTED, Preempted, PreemptionWatch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Time:
    """A clock that stands still until it is moved."""

    now = 1000.0


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "monotonic", lambda: time.now)
    return time


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Install handlers of our own first, so that no signal can end the test run."""
    got: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in SIGNALS}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_first_notice_is_noted_and_not_passed_on(received: list[int], time: Time) -> None:
    with PreemptionWatch() as watch:
        assert (watch.active, watch.requested, watch.since, watch.deadline(5)) == (True, None, None, None)
        send(signal.SIGUSR1)
        time.now += 3
        send(signal.SIGTERM)
        assert (watch.requested, watch.since) == ("SIGUSR1", 1000.0)
        assert received == []


def test_budget_counts_from_the_notice(received: list[int], time: Time) -> None:
    with PreemptionWatch() as watch:
        send(signal.SIGTERM)
        time.now += 8
        deadline = watch.deadline(20)
        assert deadline is not None
        assert (deadline.left_s, deadline.passed) == (12, False)
        time.now += 12
        assert deadline.passed


def test_insisting_sigterm_goes_to_the_previous_handler(received: list[int], time: Time) -> None:
    with PreemptionWatch(repeat_after_s=5) as watch:
        send(signal.SIGTERM)
        time.now += 1
        send(signal.SIGTERM)
        assert received == [], "scheduler and torchrun both forward the same notice"
        time.now += 4
        send(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert watch.requested == "SIGTERM"


def test_sigterm_after_sigusr1_is_not_insisting(received: list[int], time: Time) -> None:
    with PreemptionWatch():
        send(signal.SIGUSR1)
        time.now += 60
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert received == []


def test_close_restores_and_the_notice_stays_readable(received: list[int]) -> None:
    watch = PreemptionWatch()
    send(signal.SIGTERM)
    watch.close()
    watch.close()
    assert watch.requested == "SIGTERM"
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert received == [signal.SIGTERM, signal.SIGUSR1]


def test_close_leaves_a_newer_handler(received: list[int]) -> None:
    watch = PreemptionWatch(["SIGTERM"])
    newer: list[Any] = []
    ours = signal.signal(signal.SIGTERM, lambda number, frame: (newer.append(number), ours(number, frame)))  # type: ignore[operator]
    watch.close()
    send(signal.SIGTERM)
    assert newer == [signal.SIGTERM]
    assert received == [signal.SIGTERM], "a closed watch that is still called passes signals on"
    assert watch.requested is None


def test_watches_nest(received: list[int]) -> None:
    with PreemptionWatch() as outer:
        with PreemptionWatch() as inner:
            send(signal.SIGTERM)
        assert (outer.requested, inner.requested) == (None, "SIGTERM")
        send(signal.SIGUSR1)
        assert outer.requested == "SIGUSR1"


def test_off_the_main_thread_it_is_inert(received: list[int], caplog: pytest.LogCaptureFixture) -> None:
    made: list[PreemptionWatch] = []
    thread = threading.Thread(target=lambda: made.append(PreemptionWatch()))
    thread.start()
    thread.join()
    (watch,) = made
    assert not watch.active
    assert "main thread" in caplog.text
    send(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert watch.requested is None
    watch.notify("spot notice")
    watch.notify("later")
    assert watch.requested == "spot notice"
    watch.close()


def test_close_off_the_main_thread_is_refused(received: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with PreemptionWatch() as watch:
        thread = threading.Thread(target=watch.close)
        thread.start()
        thread.join()
        assert "still watched" in caplog.text
        send(signal.SIGTERM)
        assert watch.requested == "SIGTERM"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGNOTHING", "TERM"])
def test_signals_that_cannot_be_watched(received: list[int], name: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match=name):
        PreemptionWatch(["SIGTERM", name])
    assert signal.getsignal(signal.SIGTERM) is handler, "nothing half installed"


def test_preempted() -> None:
    assert EXIT_PREEMPTED not in {0, 1, 2, 255} | set(range(64, 79)) | set(range(124, 194))
    error = Preempted("SIGTERM", step=7, path="runs/step-0000000007")
    assert isinstance(error, SystemExit)
    assert not isinstance(error, Exception)
    assert (error.code, error.step) == (85, 7)
    assert str(error) == "SIGTERM; saved step 7 at runs/step-0000000007"
    assert "nothing was saved" in str(Preempted("SIGTERM"))


def child(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], timeout=60).returncode


def test_exit_codes_of_a_process() -> None:
    head = "import os, signal; from distckpt.manager.preempt import *; from distckpt import clock; "
    assert child(head + "raise Preempted('SIGTERM')") == EXIT_PREEMPTED
    twice = "w = PreemptionWatch(repeat_after_s=0); "
    twice += "[os.kill(os.getpid(), signal.SIGTERM) for _ in 'ab']; os._exit(3)"
    assert child(head + twice) == -signal.SIGTERM, "the default action: death by the signal"
