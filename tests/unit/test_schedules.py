"""Decays, warm-ups and power-function profiles: pure numbers, compared with their definitions and with ema-pytorch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.averaging.progress import Progress
from distckpt.averaging.schedules import (
    CountRatio,
    Decay,
    HalfLife,
    InverseGamma,
    PowerFunction,
    describe,
    gamma_of,
    parse,
    sigma_rel_of,
)
from distckpt.errors import ConfigError, IncompatibleState

SCHEDULES = [Decay(0.999), Decay(0.99, InverseGamma(2.0, 0.75)), Decay(0.9, CountRatio()), Decay(0.9, HalfLife(0.1)),
             PowerFunction(0.05)]  # fmt: skip


def test_warm_ups_are_the_formulas_in_use() -> None:
    assert InverseGamma(1.0, 2 / 3).limit(999) == pytest.approx(1 - 1000 ** (-2 / 3))
    assert CountRatio().limit(0) == 0.1
    assert CountRatio().limit(90) == pytest.approx(0.91)
    half = HalfLife(0.05)
    assert half.limit(0) == 0.0
    assert half.limit(1000) ** 50 == pytest.approx(0.5)  # half is gone after 5 % of 1,000 steps
    assert Decay(0.999, CountRatio()).at(10**9) == 0.999


def test_the_warm_up_is_ema_pytorchs() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    ema = ema_pytorch.EMA(torch.nn.Linear(2, 2), beta=0.9999, inv_gamma=3.0, power=0.75, update_after_step=0)
    for count in (1, 2, 10, 1000):
        ema.step.fill_(count + 1)  # it asks one step later
        assert Decay(0.9999, InverseGamma(3.0, 0.75)).at(count) == pytest.approx(float(ema.get_current_decay()))


@given(st.floats(1e-4, 0.288), st.integers(0, 10**7))
def test_decays_lie_in_range_and_widths_invert(sigma_rel: float, count: int) -> None:
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel)
    assert 0 <= PowerFunction(sigma_rel).at(count) < 1 + 1e-15
    for schedule in SCHEDULES:
        assert 0 <= schedule.at(count) <= 1


def test_a_power_function_weighs_each_step_by_its_share_of_the_profile() -> None:
    n, schedule = 200, PowerFunction(0.1)
    weights = torch.zeros(n, dtype=torch.float64)
    for step in range(n):
        weights *= schedule.at(step)
        weights[step] = 1 - schedule.at(step)
    edges = (torch.arange(n + 1, dtype=torch.float64) / n) ** (gamma_of(0.1) + 1)
    torch.testing.assert_close(weights, edges.diff())
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mean = (weights * middle).sum()
    assert float(((middle - mean).square() * weights).sum().sqrt()) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_go_through_json(schedule: Decay | PowerFunction) -> None:
    assert parse(json.loads(json.dumps(describe(schedule)))) == schedule


@pytest.mark.parametrize(
    "plain", [{}, {"decay": 2.0, "warmup": None}, {"decay": 0.9, "warmup": {"kind": "Newer"}}, {"sigma_rel": 3.0}, {"decay": 0.9}]
)
def test_unknown_schedules_are_refused(plain: dict[str, object]) -> None:
    with pytest.raises(IncompatibleState, match="does not know"):
        parse(plain)


@pytest.mark.parametrize(("kind", "number"), [(InverseGamma, 0.0), (HalfLife, 0.0), (PowerFunction, 0.3), (Decay, 1.0)])
def test_impossible_numbers_are_refused(kind: Any, number: float) -> None:
    with pytest.raises(ConfigError):
        kind(number)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("start", [0, 3])
def test_moving_every_k_steps_keeps_the_product_of_decays(schedule: Decay | PowerFunction, start: int) -> None:
    often, seldom = Progress({"": schedule}, start=start), Progress({"": schedule}, start=start, every=5)
    kept = 1.0
    for step in range(1, start + 41):
        every, now = often.advance(), seldom.advance()
        if step <= start:
            assert every == now == ([1.0] if step == start else None)
            continue
        assert every is not None
        kept *= 1 - every[0]
        if (step - start) % 5 == 0:
            assert now is not None
            assert 1 - now[0] == pytest.approx(kept, abs=1e-12)
            kept = 1.0
        else:
            assert now is None
