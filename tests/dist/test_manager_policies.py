"""When the manager saves, and what it keeps: schedules, thresholds, requests, limits, best, pins, over restarts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from manager_support import build, manager, steps_in, train
from ranks import run_ranks

from distckpt import clock, failpoints
from distckpt.errors import ConfigError, SaveFailed
from distckpt.manager import schedule
from distckpt.manager.keep_policy import KeepAll, KeepBest, KeepEvery, KeepLast
from distckpt.manager.preempt import Preempted
from distckpt.manager.save_policy import AllOf, EverySeconds, EverySteps, WhenImproves, WhenMetric

NAN = float("nan")


def saved_steps(m: Any, metrics: list[float | None], model: Any = None, optimizer: Any = None) -> list[int]:
    """Walk steps 1.. with a loss each; returns the steps that were saved."""
    out = []
    for step, value in enumerate(metrics, start=1):
        if model is not None:
            train(model, optimizer)
        if m.step(step, metrics={} if value is None else {"loss": value}) is not None:
            out.append(step)
    return out


@pytest.mark.parametrize(
    ("options", "losses", "expected"),
    [
        ({"save_every_steps": 3}, [1.0] * 7, [3, 6]),
        ({"save_policy": EverySteps(3, offset=1), "save_every_steps": 5}, [1.0] * 7, [1, 4, 5, 7]),
        ({"save_policy": WhenMetric(name="loss", below=0.5)}, [1.0, 0.6, 0.4, 0.7, 0.3], [3]),
        ({"save_policy": WhenMetric(name="loss", below=0.5, once=False)}, [1.0, 0.4, 0.3, 0.7, 0.3], [2, 5]),
        ({"save_policy": WhenImproves("loss")}, [NAN, 3.0, 4.0, NAN, 2.0, float("-inf"), 2.0, 1.9], [2, 5, 8]),
        ({"save_policy": WhenImproves("loss", mode="max", min_delta=0.5)}, [1.0, 1.2, 1.4, 1.6, None], [1, 4]),
        ({"save_policy": AllOf((EverySteps(2), WhenImproves("loss")))}, [3.0, 4.0, 1.0, 2.0, 1.0, 5.0], [2, 4]),
        ({"save_policy": EverySteps(2) & WhenMetric(name="loss", above=3.0) | WhenMetric(name="loss", below=0.0)},
         [9.0, 1.0, 9.0, 9.0, -1.0], [4, 5]),
        ({"save_best_only": True, "save_every_steps": 1}, [3.0, NAN, 4.0, 2.0, 2.0, None, float("-inf"), 1.0], [1, 4, 8]),
        ({"save_best_only": True, "save_every_steps": 1, "metric_mode": "max"}, [3.0, NAN, 4.0, 4.0, 5.0], [1, 3, 5]),
    ],
)
def test_when_to_save(tmp_path: Path, options: dict[str, Any], losses: list[float | None], expected: list[int]) -> None:
    with manager(tmp_path, *build(), save_total_limit=None, **options) as m:
        assert saved_steps(m, losses) == expected
    assert steps_in(tmp_path) == expected


def test_every_seconds_counts_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    with manager(tmp_path, *build(), save_every_seconds=10, save_policy=EverySeconds(25)) as m:
        saved = []
        for step in range(1, 9):
            now[0] += 4.0
            saved += [step] if m.step(step) else []
    assert saved == [3, 6]


def test_the_control_file_asks_for_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "CONTROL_POLL_S", 0.0)
    with manager(tmp_path, *build(), control_file="SAVE_NOW") as m:
        assert m.step(1) is None
        (tmp_path / "SAVE_NOW").touch()
        assert m.step(2) is not None
        assert not (tmp_path / "SAVE_NOW").exists()
        assert m.step(3) is None


def test_thresholds_and_best_hold_over_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_policy": WhenMetric(name="loss", below=0.5) | WhenImproves("acc", mode="max")}
    with manager(tmp_path, *build(), **options) as m:
        assert m.step(1, metrics={"loss": 0.4, "acc": 0.7}) is not None
    with manager(tmp_path, *build(), **options) as m:
        m.resume()
        assert m.step(2, metrics={"loss": 0.3, "acc": 0.6}) is None
        assert m.step(3, metrics={"loss": 0.3, "acc": 0.8}) is not None
    with manager(tmp_path, *build(), save_best_only=True, metric_name="acc", metric_mode="max") as m:
        m.resume()
        assert m.save(step=4, metrics={"acc": 0.8}) is None
        assert m.save(step=4, metrics={"acc": 0.9}) is not None


def test_a_threshold_fires_again_when_its_background_save_failed(tmp_path: Path) -> None:
    options = {"save_policy": WhenMetric(name="loss", below=0.5), "async_save": True, "retries": 0, "max_consecutive_failures": 1}
    with manager(tmp_path, *build(), **options) as m:
        failpoints.arm("writer.chunk:1:raise=ENOSPC")
        try:
            assert m.step(1, metrics={"loss": 0.4}) is not None
            m.wait()
        finally:
            failpoints.arm("")
        assert m.step(2, metrics={"loss": 0.3}) is not None
        m.wait()
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_total_limit": None}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"save_total_limit": 3}, [2, 6, 7, 8]),
        ({"save_total_limit": 2}, [2, 7, 8]),
        ({"keep_policy": KeepLast(1)}, [2, 7, 8]),
        ({"keep_policy": KeepBest("acc", "max", k=2)}, [2, 3, 5, 7, 8]),
        ({"keep_policy": KeepEvery(4) | KeepLast(2)}, [2, 4, 7, 8]),
        ({"keep_policy": KeepAll(), "save_total_limit": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_policy": KeepLast(1), "save_total_limit": 1}, [2, 7, 8]),
        ({"save_total_limit": 2, "metric_name": "acc", "metric_mode": "max"}, [5, 7, 8]),
        ({"save_total_limit": 2, "metric_name": "nobody"}, [7, 8]),
        ({"save_total_limit": 2, "metric_name": "flat"}, [1, 7, 8]),
        ({"save_total_limit": 2, "metric_name": "flat", "tie_breaks": ("latest",)}, [7, 8]),
        ({"save_total_limit": 2, "metric_name": "flat", "tie_breaks": (("acc", "max"), "latest")}, [5, 7, 8]),
    ],
)
def test_what_is_kept(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    losses = [3.0, 1.0, 2.0, NAN, 2.5, 2.0, 4.0, 5.0]
    accs = [0.1, 0.2, 0.8, NAN, 0.9, 0.3, 0.4, 0.5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with manager(tmp_path, *build(), **options) as m:
            for step in range(1, 9):
                m.save(step=step, metrics={"loss": losses[step - 1], "acc": accs[step - 1], "flat": 7})
                assert m.get_latest_checkpoint() == str(tmp_path / f"step-{step:010d}")
    assert steps_in(tmp_path) == expected


def test_a_limit_of_one_warns_and_is_obeyed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_total_limit=1 keeps a single checkpoint"):
        m = manager(tmp_path, *build(), save_total_limit=1)
    with m:
        for step in (1, 2, 3):
            m.save(step=step)
            assert steps_in(tmp_path) == [step]
    with pytest.raises(ConfigError):
        manager(tmp_path, *build(), save_total_limit=0)


def test_pins_and_what_was_resumed_from_stay_over_restarts(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_total_limit": 2}
    with manager(tmp_path, *build(), **options) as m:
        for step in (1, 2, 3, 4):
            m.save(step=step, metrics={"loss": float(10 - step)})
            if step == 1:
                m.pin(1)
    assert steps_in(tmp_path) == [1, 3, 4]
    with manager(tmp_path, *build(), **options) as m:
        assert m.load(3).step == 3  # step 4 becomes stray: no policy sees it, and it is left alone
        for step in (5, 6, 7):
            m.save(step=step, metrics={"loss": float(step)})
    assert steps_in(tmp_path) == [1, 3, 4, 5, 6, 7]  # 3: resumed from; 5: best
    with manager(tmp_path, *build(), **options) as m:
        m.resume()
        m.pin(1, pinned=False)
        for step in (8, 9, 10):
            m.save(step=step, metrics={"loss": float(step)})
    assert steps_in(tmp_path) == [4, 5, 7, 9, 10]


def test_failed_saves_are_counted_in_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, retries=0, max_consecutive_failures=2) as m:
        assert m.save(step=1) is not None
        failpoints.arm("writer.chunk:0:raise=ENOSPC")
        try:
            assert m.save(step=2) is None
            assert m.save(step=3) is None
            assert "2 in a row, 2 are tolerated" in caplog.text
            with pytest.raises(SaveFailed, match=r"step 4 was not committed.*No space left"):
                m.save(step=4)
        finally:
            failpoints.arm("")
        assert m.save(step=5) is not None
        assert m.failures == 0
    with manager(tmp_path / "again", model, optimizer, retries=1) as m:
        failpoints.arm("writer.chunk:1:raise=ENOSPC")
        try:
            assert m.save(step=1) is not None  # the second try succeeds
        finally:
            failpoints.arm("")
    assert steps_in(tmp_path) == [1, 5]


def test_a_preemption_saves_whatever_the_policies_say(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_best_only": True, "async_save": True, "on_busy": "skip", "preemption_signals": ("SIGUSR1",)}
    with pytest.raises(Preempted) as caught, manager(tmp_path, *build(), **options) as m:  # noqa: PT012
        m.save(step=1, metrics={"loss": 1.0})
        assert m.schedule.watch is not None
        m.schedule.watch.notify("a test")
        m.step(2, metrics={"loss": 9.0})
    assert (caught.value.code, caught.value.step, caught.value.path) == (85, 2, str(tmp_path / "step-0000000002"))
    assert steps_in(tmp_path) == [1, 2]


def agree(rank: int, root: Path) -> list[list[int]]:
    """Only rank 0 knows the loss; rank 1 sees none, or another."""
    out = []
    cases: list[dict[str, Any]] = [
        {"save_policy": WhenMetric(name="loss", below=0.5)},
        {"save_policy": WhenImproves("loss"), "save_every_steps": 5},
        {"save_best_only": True, "save_every_steps": 1},
        {"save_every_seconds": 1e-9, "agree_every_steps": 3},
        {"save_policy": EverySteps(2), "agree_every_steps": 4, "control_file": "SAVE_NOW"},
        {"save_every_steps": 2, "save_total_limit": None},
    ]
    for number, options in enumerate(cases):
        model, optimizer = build()
        with manager(root / str(number), model, optimizer, **options) as m:
            saved = []
            for step, loss in enumerate([1.0, 0.4, NAN, 0.3, 0.6, 0.2], start=1):
                metrics = {"loss": loss} if rank == 0 else {} if step % 2 else {"loss": 10.0 - step}
                saved += [step] if m.step(step, metrics=metrics) else []
            rounds = m.schedule._rounds
            if number == 5:
                assert rounds == 0  # what the step alone decides needs no word between ranks
            out.append(saved)
    return out


def test_all_ranks_save_at_the_same_steps_though_one_has_the_metric(tmp_path: Path) -> None:
    first, second = run_ranks(2, agree, tmp_path)
    assert first == second
    assert first == [[2], [1, 2, 4, 5, 6], [1, 2, 4, 6], [3, 6], [2, 4, 6], [2, 4, 6]]
    for number, steps in enumerate(first):
        assert set(steps_in(tmp_path / str(number))) <= set(steps)
        assert steps_in(tmp_path / str(number))[-1] == steps[-1]
    torch.manual_seed(0)
