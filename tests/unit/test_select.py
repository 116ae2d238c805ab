"""Rules that choose: the seed's table, exact ties, constraints, missing values, thresholds, the run's history."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_support import binary, evaluation, linear_root

pytest.importorskip("statsmodels")

from distckpt import list_checkpoints, select_top_k_by_metric
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.format import typed_json
from distckpt.selection.ledger import Candidate, run_candidates
from distckpt.selection.metrics import at_threshold, measure
from distckpt.selection.predictions import Predictions
from distckpt.selection.rules import as_rule
from distckpt.selection.select import pareto, select, with_costs
from distckpt.selection.thresholds import ThresholdRule, choose_threshold
from distckpt.storage import open_store

SEED = {  # accuracy, precision, recall, F1 of the class "negative", as the seed document has them
    1: (0.852, 0.801, 0.755, 0.777),
    2: (0.885, 0.855, 0.820, 0.837),
    3: (0.901, 0.882, 0.858, 0.870),
    4: (0.905, 0.890, 0.865, 0.877),
    5: (0.903, 0.885, 0.870, 0.877),
}


def seed_table() -> list[Candidate]:
    names = ("accuracy", "precision_negative", "recall_negative", "f1_negative")
    return [Candidate(f"epoch {e}", f"/{e}", e, metrics=dict(zip(names, row, strict=True))) for e, row in SEED.items()]


def winner(candidates: Any, rule: str, **more: Any) -> str | None:
    chosen = select(candidates, rule, **more).winner
    return None if chosen is None else chosen.name


def test_the_seeds_table() -> None:
    table = seed_table()
    assert winner(table, "max accuracy") == "epoch 4"
    assert winner(table, "max f1_negative") == "epoch 4"  # a tie, which the earlier one wins
    choice = select(table, "max f1_negative, then max recall_negative, then earlier")
    assert choice.winner is not None
    assert choice.winner.name == "epoch 5"
    assert choice.tied == ("epoch 4", "epoch 5")
    assert any("tie of 2: epoch 4 0.877, epoch 5 0.877" in line for line in choice.lines())
    assert winner(table, "recall_negative >= 0.87, then max accuracy") == "epoch 5"
    assert winner(table, "max accuracy within 0.005, max recall_negative") == "epoch 5"
    assert winner(table, "max accuracy within 0.001, max recall_negative") == "epoch 4"
    assert [c.name for c in pareto(table, [("accuracy", "max"), ("recall_negative", "max")])] == ["epoch 4", "epoch 5"]


def test_the_seeds_table_from_counts() -> None:
    """The same percentages as counts of 1,000 rows, 400 negative: accuracy and recall differ, F1 nearly ties."""
    four = evaluation("epoch 4", 4, binary(346, 54, 41, 559))
    five = evaluation("epoch 5", 5, binary(348, 52, 45, 555))
    assert [round(float(e.metrics["f1_negative"] or 0), 3) for e in (four, five)] == [0.879, 0.878]
    assert winner([four, five], "max accuracy") == "epoch 4"
    assert winner([four, five], "max f1_negative within 0.005, max recall_negative, earliest") == "epoch 5"
    assert winner([four, five], "recall_negative >= 0.87, then max f1_negative") == "epoch 5"
    costly = {("negative", "positive"): 5.0, ("positive", "negative"): 1.0}
    assert winner([four, five], "min cost", costs=costly) == "epoch 5"
    assert winner([four, five], "min cost", costs={**costly, ("negative", "positive"): 1.0}) == "epoch 4"
    assert winner([four, five], "max 0.5*accuracy + 0.5*recall_negative") == "epoch 5"
    assert winner([four, five], "max accuracy - 0.1*recall_negative") == "epoch 4"


def test_ties_are_of_counts() -> None:
    """Recall on 78 positives has 79 values; equal counts tie, however their floats came about."""
    same = [evaluation(f"epoch {e}", e, binary(73, 5, e, 100 - e)) for e in (2, 3, 4)]
    other = evaluation("epoch 5", 5, binary(72, 6, 0, 100))
    choice = select([other, *same], "max recall_negative, max precision_negative", k=4)
    assert choice.tied == ("epoch 2", "epoch 3", "epoch 4")
    assert [c.name for c in choice.ranked] == ["epoch 2", "epoch 3", "epoch 4", "epoch 5"]
    assert "recall_negative: tie of 3: epoch 2 0.9359 (73/78)" in choice.lines()[1]
    assert winner(same, "max recall_negative, latest") == "epoch 4"
    third = Candidate("a", "/a", 1, metrics={"x": 1 / 3}, counts={"x": (1, 3)})
    thirds = Candidate("b", "/b", 2, metrics={"x": 0.1 + 0.2 + 0.1 / 3}, counts={"x": (26, 78)})
    assert third.metrics["x"] != thirds.metrics["x"]
    assert select([third, thirds], "max x").tied == ("a", "b")


def test_smaller_is_a_rule_for_ties_too() -> None:
    big, small = (
        Candidate(n, f"/{n}", s, nbytes=b, metrics={"x": 1.0}) for n, s, b in (("big", 1, 9), ("small", 2, 5))
    )
    assert winner([big, small], "max x, smallest") == "small"
    assert winner([big, small], "max x") == "big"


def test_a_constraint_may_ask_the_intervals_lower_end() -> None:
    exactly = evaluation("a", 1, binary(90, 10, 5, 95))  # 0.90, Wilson from 0.826
    surely = evaluation("b", 2, binary(97, 3, 20, 80))  # 0.97, Wilson from 0.915
    assert winner([exactly, surely], "recall_negative >= 0.9, then max precision_negative") == "a"
    choice = select([exactly, surely], "lower recall_negative >= 0.9, then max precision_negative")
    assert choice.winner is not None
    assert choice.winner.name == "b"
    assert choice.stages[0].dropped == ("a",)
    assert winner([exactly, surely], "lower recall_negative >= 0.9, then max precision_negative", confidence=0.5) == "b"
    nobody = select([exactly, surely], "recall_negative >= 0.99, then max precision_negative")
    assert nobody.winner is None
    assert "no candidate meets the rule" in nobody.lines()


def test_nan_and_undefined_neither_win_nor_block() -> None:
    broken = evaluation("nan", 1, score=math.nan, other=9.0)
    infinite = evaluation("inf", 2, score=math.inf, other=9.0)
    good = evaluation("good", 3, score=0.5, other=1.0)
    worse = evaluation("worse", 4, score=-math.inf, other=math.nan)
    every = [broken, infinite, good, worse]
    choice = select(every, "max score", k=9)
    assert [c.name for c in choice.ranked] == ["good", "worse"]
    assert dict(choice.missing)["score"] == ("nan", "inf")
    assert any("cannot win by it: nan, inf" in line for line in choice.lines())
    assert winner(every, "other > 0, then max score") == "good"
    assert dict(select(every, "other > 0, then max score").missing)["other"] == ("worse",)
    never = evaluation("never says so", 5, binary(0, 5, 0, 5))
    sometimes = evaluation("sometimes", 6, binary(1, 4, 9, 1))
    assert winner([never, sometimes], "max precision_negative") == "sometimes"
    assert winner([never, sometimes], "min precision_negative") == "sometimes"
    with pytest.raises(CheckpointNotFound, match=r"no candidate has the metric 'f2'; there are other, score"):
        select(every, "max f2")


def test_results_on_different_rows_or_classes_are_refused() -> None:
    a, b = evaluation("a", 1, binary(5, 5, 5, 5)), evaluation("b", 2, binary(6, 4, 5, 5), data="test")
    with pytest.raises(ConfigError, match=r"different rows are not comparable: a on validation@.*; b on test@"):
        select([a, b], "max accuracy")
    swapped = Predictions(ids=[0, 1], labels=[0, 1], predicted=[0, 1], classes=("positive", "negative"))
    with pytest.raises(ConfigError, match="different classes"):
        select([a, evaluation("c", 3, swapped)], "max accuracy")
    with pytest.raises(ConfigError, match="compare like with like"):
        select([a, *seed_table()], "max accuracy")


def test_pareto_keeps_equals_and_what_lacks_nothing() -> None:
    points = {"a": (1, 9), "b": (2, 8), "c": (2, 8), "d": (1, 8), "e": (9, math.nan)}
    every = [Candidate(n, f"/{n}", i, metrics={"x": x, "y": y}) for i, (n, (x, y)) in enumerate(points.items())]
    assert [c.name for c in pareto(every, [("x", "max"), ("y", "max")])] == ["a", "b", "c"]
    assert [c.name for c in pareto(every, [("x", "min"), ("y", "max")])] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "best f1",
        "max",
        "max a b",
        "max f1 within -1",
        "latest, max f1",
        "max f1, recall >= 0.9",
        "f1 >= high",
        "max 2*, x",
    ],
)
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="rule"):
        as_rule(text)


@pytest.mark.parametrize(
    "text",
    [
        "max f1",
        "lower recall_a >= 0.87, then max 0.7*f1_a + -0.3*val/loss within 0.01, then smallest, then latest",
        "x < 1e-3",
    ],
)
def test_a_rule_reads_as_it_is_written(text: str) -> None:
    assert str(as_rule(text)) == text
    assert as_rule(str(as_rule(text))) == as_rule(text)


# ---------------------------------------------------------------- thresholds


def scored(seed: int = 0, n: int = 200) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.8).astype(int)
    p = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0.01, 0.99).round(2)
    return Predictions(
        ids=range(n), labels=labels, probabilities=np.stack([1 - p, p], 1), classes=("negative", "positive")
    )


def test_a_threshold_is_chosen_on_validation_and_said() -> None:
    p = scored()
    chosen = choose_threshold(p, ThresholdRule("negative", "f1"), data="validation")
    every = {
        t: measure(at_threshold(p, type(chosen)("negative", t))).metrics["f1_negative"] for t in np.unique(p.scores())
    }
    assert every[chosen.value] == max(v for v in every.values() if v is not None)
    assert "chosen on validation, n=200" in str(chosen)
    least = choose_threshold(p, ThresholdRule("negative", "precision", ("recall", 0.9)))
    found = measure(at_threshold(p, least)).metrics
    assert (found["recall_negative"] or 0) >= 0.9
    assert (measure(p).metrics["recall_negative"] or 0) < 0.9
    costs = {("negative", "positive"): 10.0, ("positive", "negative"): 1.0}
    cheap = choose_threshold(p, ThresholdRule("negative", "cost"), costs=costs)
    told = {t: measure(at_threshold(p, type(chosen)("negative", t)), costs=costs).metrics["cost"] for t in every}
    assert told[cheap.value] == min(v for v in told.values() if v is not None)


# ---------------------------------------------------------------- the run's own metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100 to 500: a loss for each save, one NaN, and a history that has more than the saves were given."""
    losses = {100: 3.0, 200: 1.0, 300: math.nan, 400: 1.0, 500: 2.0}
    root = linear_root(tmp_path / "run", tuple(losses), {step: {"loss": loss} for step, loss in losses.items()})
    rows = [
        {"step": s, "epoch": None, "time": 0.0, "metrics": {"bleu": 10.0 + s / 100, "loss": 9.0}}
        for s in (200, 250, 300)
    ]
    open_store(root).create("metrics/g000001-000001.json", typed_json.dumps(rows))
    return root


def steps_of(paths: list[str]) -> list[int]:
    return [info.step for path in paths for info in list_checkpoints(path)]


def test_top_k_by_a_metric_of_the_saves(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distckpt"):
        assert steps_of(select_top_k_by_metric(run, "loss", "min", 3)) == [200, 400, 500]
    assert "loss is missing in step 300" in caplog.text
    assert steps_of(select_top_k_by_metric(run, "loss", k=3, tie_breaks=["latest"])) == [400, 200, 500]
    assert steps_of(select_top_k_by_metric(run, "loss", "max", 9)) == [100, 500, 200, 400]
    infos = list_checkpoints(run)
    assert steps_of(select_top_k_by_metric([i.path for i in infos if i.step > 200], "loss", k=1)) == [400]
    assert steps_of(select_top_k_by_metric(infos, "loss", k=1)) == [200]
    with pytest.raises(ConfigError, match="best"):
        select_top_k_by_metric(run, "loss", "best")


def test_top_k_by_a_metric_of_the_history(run: Path) -> None:
    assert steps_of(select_top_k_by_metric(run, "bleu", "max")) == [300, 200]
    assert winner(run, "max bleu") == "step 300"
    assert winner(run, "max bleu, then min loss") == "step 300"
    assert winner(run, "loss <= 1, then max bleu") == "step 200"
    assert {c.step: c.metrics["loss"] for c in run_candidates(run)}[200] == 1.0  # what the save was given
    with pytest.raises(CheckpointNotFound, match="no checkpoint is there"):
        select_top_k_by_metric(run / "elsewhere")


def test_costs_come_from_the_confusion_alone() -> None:
    four = with_costs(evaluation("a", 1, binary(346, 54, 43, 557)), {("negative", "positive"): 5.0})
    assert four.counts["cost"] == (Fraction(54 * 5, 1000).numerator, Fraction(54 * 5, 1000).denominator)
    with pytest.raises(ConfigError, match="confusion"):
        with_costs(evaluation("b", 2, x=1.0), {("negative", "positive"): 5.0})
