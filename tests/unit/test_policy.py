"""When to save, what to keep, what is best: pure decisions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import ConfigError
from distckpt.manager.keep_policy import (
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPinned,
    KeepSteps,
    Kept,
    plan_removal,
    protected,
)
from distckpt.manager.ranking import best, measured, rank_candidates
from distckpt.manager.save_policy import (
    AllOf,
    AnyOf,
    EverySeconds,
    EverySteps,
    MetricRange,
    MinGap,
    Moment,
    OnPreemption,
    OnRequest,
    WhenImproves,
    WhenMetric,
    metric_ranges,
)

NAN, INF = math.nan, math.inf


def steps_of(policy: Any, losses: list[Any], *, saved_before: list[Any] | None = None, start: int = 1) -> list[int]:
    """Run a policy over a training run whose saves all succeed; return the steps saved."""
    history, kept, saved = list(saved_before or []), list(saved_before or []), []
    for step, loss in enumerate(losses, start):
        metrics = {} if loss is None else {"loss": loss}
        last = saved[-1] if saved else None
        moment = Moment(
            step=step,
            metrics=metrics,
            seen=metric_ranges(history),
            saved=metric_ranges(kept),
            last_saved_step=last,
        )
        if policy(moment):
            saved.append(step)
            kept.append(metrics)
        history.append(metrics)
    return saved


def test_every_steps() -> None:
    assert steps_of(EverySteps(3), [1.0] * 10) == [3, 6, 9]
    assert steps_of(EverySteps(3, offset=2), [1.0] * 10) == [2, 5, 8]
    assert EverySteps(5)(Moment(step=0)) is None
    assert EverySteps(5, offset=20)(Moment(step=10)) is None
    assert EverySteps(5)(Moment(step=10)) == "every 5 steps"


def test_every_seconds() -> None:
    assert EverySeconds(60)(Moment(step=1, seconds_since_save=59.9)) is None
    assert EverySeconds(60)(Moment(step=1, seconds_since_save=60)) == "every 60 s"


def test_threshold_once_is_right_after_a_resume() -> None:
    policy = WhenMetric(name="loss", below=2.0)
    assert steps_of(policy, [5, 3, 1.9, 1.8, 3, 1.5]) == [3]
    assert steps_of(policy, [1.7, 1.6], saved_before=[{"loss": 1.9}]) == [], "that save still stands"
    assert steps_of(policy, [1.7, 1.6], saved_before=[{"loss": 2.5}]) == [1], "crossed, but the save was lost"
    assert steps_of(policy, [NAN, None, 1.9, NAN, 1.8]) == [3]


def test_threshold_at_each_crossing() -> None:
    policy = WhenMetric(name="loss", above=2.0, once=False)
    assert steps_of(policy, [1, 3, 4, NAN, 5, None, 1, 2.5]) == [2, 8]
    assert steps_of(policy, [3, 4], saved_before=[{"loss": 2.5}]) == []


@pytest.mark.parametrize("settings", [{}, {"below": 1, "above": 2}, {"below": NAN}])
def test_threshold_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="loss"):
        WhenMetric(name="loss", **settings)


def test_improvement() -> None:
    assert steps_of(WhenImproves("loss"), [3, 4, 2, 2, 1]) == [1, 3, 5]
    assert steps_of(WhenImproves("loss", "max"), [3, 4, 2, 5]) == [1, 2, 4]
    assert steps_of(WhenImproves("loss"), [2.5, 1.9], saved_before=[{"loss": 2}]) == [2]


def test_small_improvements_add_up() -> None:
    assert steps_of(WhenImproves("loss", min_delta=0.25), [3.0, 2.9, 2.8, 2.7, 2.6]) == [1, 4]


def test_nan_first_does_not_block_improvement() -> None:
    assert steps_of(WhenImproves("loss"), [NAN, None, 3, NAN, 2]) == [3, 5]
    assert steps_of(WhenImproves("loss"), [INF, 3, -INF, 2]) == [1, 2, 4]
    assert steps_of(WhenImproves("loss", "max"), [INF, 1], saved_before=[{"loss": INF}, {"loss": NAN}]) == [2]


def test_combinations() -> None:
    policy = EverySteps(4) | OnRequest() | OnPreemption()
    assert isinstance(policy, AnyOf)
    assert len(policy.policies) == 3
    assert policy(Moment(step=8, requested=True, preempted=True)) == "every 4 steps, requested, preempted"
    assert policy(Moment(step=7)) is None
    both = EverySteps(4) & WhenImproves("loss")
    assert steps_of(both, [9, 8, 7, 6, 5, 4, 3, 7]) == [4]
    assert both(Moment(step=4, metrics={"loss": 1})) == "every 4 steps and loss first measured (1)"
    assert AnyOf(())(Moment(step=1)) is None
    assert AllOf(())(Moment(step=1)) is None
    with pytest.raises(ConfigError):
        AnyOf((3,))  # type: ignore[arg-type]


def test_min_gap() -> None:
    assert steps_of(MinGap(WhenImproves("loss"), steps=3), [9, 8, 7, 6, 5, 4]) == [1, 4]
    gap = MinGap(EverySteps(1), seconds=30)
    assert gap(Moment(step=5, last_saved_step=4, seconds_since_save=29)) is None
    assert gap(Moment(step=5, last_saved_step=4, seconds_since_save=30))
    assert gap(Moment(step=5, seconds_since_save=1)), "nothing saved yet"


def test_deterministic() -> None:
    assert (EverySteps(2) | EverySteps(3)).deterministic
    assert (EverySteps(2) & EverySteps(3)).deterministic
    others = (EverySeconds(1), WhenMetric(name="x", below=1), WhenImproves("x"), OnRequest(), OnPreemption())
    for policy in (
        *others,
        MinGap(EverySteps(2), steps=4),
        EverySteps(2) | OnRequest(),
        EverySteps(2) & OnRequest(),
    ):
        assert not policy.deterministic


@pytest.mark.parametrize(
    "make",
    [
        lambda: EverySteps(0),
        lambda: EverySteps(True),
        lambda: EverySteps(2, offset=-1),
        lambda: EverySeconds(0),
        lambda: EverySeconds(NAN),
        lambda: WhenImproves("x", "lower"),
        lambda: WhenImproves("x", min_delta=-1),
        lambda: MinGap(EverySteps(1), steps=-1),
        lambda: KeepLast(0),
        lambda: KeepBest("x", "mni"),
        lambda: KeepBest("x", k=0),
        lambda: KeepBest("x", ties="latest"),
        lambda: KeepBest("x", ties=["latest", ("y", "min")]),
        lambda: KeepBest("x", ties=[("y", "up")]),
        lambda: KeepBest("x", ties=["newest"]),
        lambda: KeepEvery(0),
        lambda: protected([], minimum=0),
    ],
)
def test_wrong_settings(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_metric_range() -> None:
    whole = MetricRange()
    for value in (NAN, 3, None, "x", True, np.float32(1.5), -INF, INF, 2):
        whole = whole.include(value)
    assert whole == MetricRange(low=1.5, high=3.0, last=2.0)


def kept(*losses: Any, **more: Any) -> list[Kept]:
    return [Kept(step, metrics={"loss": loss} if loss != "absent" else {}, **more) for step, loss in enumerate(losses)]


def test_nan_never_wins_and_never_blocks() -> None:
    for bad in (NAN, None, "absent", "text", True, -INF):
        assert best(kept(bad, 3, 2, bad), "loss", "min").step == 2  # type: ignore[union-attr]
        assert best(kept(bad, bad), "loss", "min") is None
    assert best(kept(NAN, 3, 2, INF), "loss", "max").step == 1  # type: ignore[union-attr]
    assert best(kept(INF, 3), "loss", "min").step == 1  # type: ignore[union-attr]
    assert best(kept(INF), "loss", "min").step == 0  # type: ignore[union-attr]
    assert best([], "loss", "min") is None
    with pytest.raises(ConfigError, match="metric_mode='best'"):
        best(kept(1), "loss", "best")


def test_tie_breaks() -> None:
    rows = [(10, 1.0, 0.5), (20, 1.0, 0.7), (30, 1.0, 0.7), (40, 1.0, None), (50, 2.0, 0.9)]
    candidates = [Kept(step, metrics={"loss": loss, "acc": acc}) for step, loss, acc in rows]

    def order(*ties: Any) -> list[int]:
        return [candidate.step for candidate in rank_candidates(candidates, "loss", "min", ties)]

    assert order() == [10, 20, 30, 40, 50]
    assert order("latest") == [40, 30, 20, 10, 50]
    assert order(("acc", "max")) == [20, 30, 10, 40, 50]
    assert order(("acc", "max"), "latest") == [30, 20, 10, 40, 50]
    assert order(("acc", "min"), "earliest") == [10, 20, 30, 40, 50]


numbers = st.one_of(st.none(), st.floats(), st.integers(-3, 3), st.sampled_from([10**400, True, "x"]))


@given(
    losses=st.lists(st.tuples(numbers, numbers), max_size=8),
    mode=st.sampled_from(["min", "max"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_order_is_total_and_does_not_depend_on_the_listing(losses: Any, mode: str, data: Any) -> None:
    candidates = [Kept(step, metrics={"loss": a, "acc": b}) for step, (a, b) in enumerate(losses)]
    ties = data.draw(st.sampled_from([(), ("latest",), (("acc", "max"),), (("acc", "min"), "latest")]))
    ranked = [c.step for c in rank_candidates(candidates, "loss", mode, ties)]
    shuffled = data.draw(st.permutations(candidates))
    assert [c.step for c in rank_candidates(shuffled, "loss", mode, ties)] == ranked
    values = [measured(losses[step][0], mode) for step in ranked]
    assert None not in values
    assert values == sorted(values, reverse=mode == "max")  # type: ignore[type-var]
    assert len(values) == sum(measured(a, mode) is not None for a, _ in losses)


def test_keep_policies() -> None:
    candidates = [
        Kept(step, metrics={"loss": loss}, pinned=step == 20) for step, loss in [(30, 3), (10, 1), (20, 2), (40, NAN)]
    ]

    def steps(policy: Any) -> list[int]:
        return sorted(candidates[index].step for index in policy(candidates))

    assert steps(KeepLast(2)) == [30, 40]
    assert steps(KeepLast(9)) == [10, 20, 30, 40]
    assert steps(KeepBest("loss", "min", 2)) == [10, 20]
    assert steps(KeepBest("loss", "max", 9)) == [10, 20, 30]
    assert steps(KeepEvery(20)) == [20, 40]
    assert steps(KeepPinned()) == [20]
    assert steps(KeepSteps([10, 99])) == [10]
    assert steps(KeepAll()) == [10, 20, 30, 40]
    union = KeepLast(1) | KeepBest("loss") | KeepPinned()
    assert len(union.policies) == 3
    assert steps(union) == [10, 20, 40]


def test_what_is_protected() -> None:
    candidates = [
        Kept(step, generation=step // 30, metrics={"loss": step}, pinned=step == 20) for step in range(10, 70, 10)
    ]

    def steps(**settings: Any) -> list[int]:
        return sorted(candidates[index].step for index in protected(candidates, **settings))

    assert steps() == [20, 50, 60]
    assert steps(minimum=1) == [20, 60]
    assert steps(resumed_from=(1, 40)) == [20, 40, 50, 60]
    assert steps(resumed_from=(0, 40)) == [20, 50, 60], "the same step of another generation is another checkpoint"
    assert steps(best=best(candidates, "loss", "min")) == [10, 20, 50, 60]


@given(
    steps=st.lists(st.integers(0, 40), unique=True, max_size=12),
    last=st.integers(1, 4),
    minimum=st.integers(1, 3),
    pinned=st.sets(st.integers(0, 40)),
)
@settings(max_examples=100, deadline=None)
def test_removal_never_touches_what_is_kept_or_protected(
    steps: list[int], last: int, minimum: int, pinned: set[int]
) -> None:
    candidates = [Kept(step, metrics={"loss": step % 7}, pinned=step in pinned) for step in steps]
    winner = best(candidates, "loss", "min")
    safe = protected(candidates, best=winner, minimum=minimum)
    keep, remove = plan_removal(candidates, KeepLast(last)(candidates), safe)
    assert sorted(c.step for c in keep + remove) == sorted(steps)
    assert [c.step for c in remove] == sorted(c.step for c in remove)
    assert not any(c.pinned or c is winner for c in remove)
    newest = sorted(steps)[-max(last, minimum) :]
    assert set(newest) <= {c.step for c in keep}
    assert len(keep) <= max(last, minimum) + 1 + len(pinned)
