"""Intervals, paired tests and the winner's curse, against statsmodels, scipy and simulation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from evaluation_support import CLASSES, binary, evaluation

pytest.importorskip("statsmodels")
import scipy.stats
from statsmodels.stats.multitest import multipletests

from distckpt.errors import ConfigError, IncompatibleState
from distckpt.selection.curse import bootstrap_choice, overlap, reestimate
from distckpt.selection.evaluation import Threshold
from distckpt.selection.predictions import Predictions
from distckpt.selection.statistics import (
    bootstrap_interval,
    compare_with_best,
    interval_of,
    mcnemar,
    paired_difference,
    permutation_test,
    wilson,
)


def noisy(labels: np.ndarray, right: float, seed: int, **more: Any) -> Predictions:
    """Predictions that are right with this chance, each row alone."""
    flip = np.random.default_rng(seed).random(len(labels)) >= right
    return Predictions(ids=np.arange(len(labels)), labels=labels, predicted=labels ^ flip, classes=CLASSES, **more)


LABELS = (np.random.default_rng(1).random(400) < 0.7).astype(np.int64)


def test_wilson_as_measured() -> None:
    found = wilson(131, 356)
    assert found is not None
    assert (round(found.low, 3), round(found.high, 3), found.n) == (0.320, 0.419, 356)
    assert wilson(0, 0) is None
    small = interval_of(evaluation("sms", 5, binary(75, 3, 0, 10)), "recall_negative")
    assert small is not None
    assert (round(small.low, 3), round(small.high, 3)) == (0.893, 0.987)
    nothing = evaluation("never", 1, binary(0, 3, 0, 3))
    assert interval_of(nothing, "precision_negative") is None
    assert interval_of(nothing, "f1_negative") is None  # no proportion, and no predictions were kept


def test_bootstrap_intervals_are_scipys() -> None:
    p = noisy(LABELS, 0.85, 2)
    found = bootstrap_interval(p, "accuracy", resamples=500, seed=3)
    right = (p.labels == p.predicted).astype(float)  # type: ignore[union-attr]
    direct = scipy.stats.bootstrap((right,), np.mean, n_resamples=500, rng=np.random.default_rng(3)).confidence_interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(direct))
    assert (found.method, found.n) == ("BCa bootstrap, 500", 400)
    f1 = bootstrap_interval(p, "f1_negative", resamples=500)
    assert f1 is not None
    assert f1.low < f1.value < f1.high
    assert bootstrap_interval(binary(0, 0, 0, 5), "recall_negative") is None


def test_an_interval_where_resamples_are_undefined_says_so() -> None:
    found = bootstrap_interval(binary(1, 1, 3, 95), "f1_negative", resamples=300)
    assert found is not None
    assert 0.0 <= found.low < found.high <= 1.0
    rare = bootstrap_interval(binary(1, 0, 0, 20), "recall_negative", resamples=300)
    assert rare is not None
    assert "of 300 defined" in rare.method


def test_areas_and_bleu_have_intervals_too() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((80, 2)) + 1.2 * np.eye(2)[LABELS[:80]]
    p = Predictions(ids=range(80), labels=LABELS[:80], logits=logits, classes=CLASSES)
    area = bootstrap_interval(p, "roc_auc", resamples=60)
    assert area is not None
    assert area.low < area.value < area.high
    assert area.method.startswith("percentile")
    texts = Predictions(
        ids=range(4), texts=["a b c d e", "a b c d", "x y z w", "a b c q"], references=["a b c d e"] * 4
    )
    bleu = bootstrap_interval(texts, "bleu", resamples=100)
    assert bleu is not None
    assert bleu.low <= bleu.value <= bleu.high


def test_pairing_is_what_makes_small_differences_visible() -> None:
    a = noisy(LABELS, 0.85, 2)
    better = np.array(a.predicted)
    wrong = np.flatnonzero(better != LABELS)[:12]
    better[wrong] = LABELS[wrong]
    b = dataclasses.replace(a, predicted=better)
    paired = paired_difference(b, a, "accuracy", resamples=800)
    assert paired is not None
    assert paired.value == pytest.approx(12 / 400)
    assert paired.low > 0
    alone = [interval_of(evaluation(n, 1, p), "accuracy") for n, p in (("a", a), ("b", b))]
    assert alone[0] is not None
    assert alone[1] is not None
    assert alone[0].high > alone[1].low  # unpaired, they overlap
    test = mcnemar(b, a)
    assert test.discordant == (12, 0)
    assert test.p == pytest.approx(scipy.stats.binomtest(0, 12).pvalue)
    assert permutation_test(b, a, "accuracy", resamples=800).p < 0.01
    same = paired_difference(a, a, "macro_f1", resamples=200)
    assert same is not None
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_mcnemar_of_recall_counts_the_class_alone() -> None:
    a, b = noisy(LABELS, 0.7, 2), noisy(LABELS, 0.9, 3)
    rows = LABELS == 0
    found = mcnemar(a, b, "recall_negative")
    only_a = int(np.sum((a.predicted == 0) & (b.predicted != 0) & rows))
    only_b = int(np.sum((a.predicted != 0) & (b.predicted == 0) & rows))
    assert (found.discordant, found.n) == ((only_a, only_b), int(rows.sum()))
    assert found.p == pytest.approx(scipy.stats.binomtest(only_a, only_a + only_b).pvalue)
    with pytest.raises(ConfigError, match="not of f1_negative"):
        mcnemar(a, b, "f1_negative")


def test_holm_for_k_candidates_and_the_set_that_ties_with_the_best() -> None:
    every = {f"c{i}": noisy(LABELS, right, 10 + i) for i, right in enumerate((0.90, 0.89, 0.88, 0.80, 0.6))}
    found = compare_with_best(every, "accuracy", resamples=300)
    best = found[0].best
    assert {c.name for c in found} == set(every) - {best}
    reject, adjusted, *_ = multipletests([c.test.p for c in found], method="holm")
    assert [c.p_holm for c in found] == pytest.approx(list(adjusted))
    assert [c.tied for c in found] == [not r for r in reject]
    by_name = {c.name: c for c in found}
    assert not by_name["c4"].tied
    assert any(c.tied for c in found)
    assert all(c.difference.high <= 0 or c.tied for c in found)
    f1 = compare_with_best(every, "f1_negative", resamples=300)
    assert not {c.name: c for c in f1}["c4"].tied
    assert f1[0].test.method.startswith("paired permutation")
    assert compare_with_best({"only": every["c0"]}, "accuracy") == []
    never = {
        **every,
        "undefined": Predictions(ids=np.arange(400), labels=LABELS, predicted=LABELS * 0 + 1, classes=CLASSES),
    }
    assert "undefined" not in {c.name for c in compare_with_best(never, "precision_negative", resamples=50)}


def test_other_rows_cannot_be_paired() -> None:
    a = noisy(LABELS, 0.9, 1)
    for other in (noisy(1 - LABELS, 0.9, 1), a.take(np.arange(5)), dataclasses.replace(a, classes=("b", "a"))):
        with pytest.raises(IncompatibleState, match="cannot be paired"):
            paired_difference(a, other, "accuracy")
    mine = dataclasses.replace(a, content=np.arange(400, dtype=np.uint64))
    with pytest.raises(IncompatibleState, match="cannot be paired"):
        mcnemar(mine, dataclasses.replace(a, content=np.arange(1, 401, dtype=np.uint64)))


# ---------------------------------------------------------------- the winner's curse


def equals(k: int, n: int, seed: int) -> list[tuple[Any, Predictions]]:
    """K checkpoints that are equally good (recall 0.9 on n rows of the class), drawn independently."""
    labels = np.zeros(n, np.int64)
    made = [noisy(labels, 0.9, seed * 1000 + i) for i in range(k)]
    return [(evaluation(f"epoch {i}", i, p), p) for i, p in enumerate(made)]


def test_the_best_of_k_equals_looks_better_than_it_is() -> None:
    """What the choice itself adds: 0.049 at n=78 and K=10 for true 0.9; the bootstrap sees it without knowing 0.9."""
    excess, told = [], []
    for seed in range(6):
        found = bootstrap_choice(equals(10, 78, seed), "max recall_negative", resamples=120, seed=seed)
        excess.append(found.observed - 0.9)
        told.append(found.optimism)
        assert found.corrected == pytest.approx(found.observed - found.optimism)
    assert 0.02 < np.mean(excess) < 0.07
    assert 0.01 < np.mean(told) < 0.08
    large = bootstrap_choice(equals(10, 1000, 1), "max recall_negative", resamples=120)
    assert large.optimism < np.mean(told)


def test_how_often_each_wins() -> None:
    labels = np.zeros(300, np.int64)
    clear = [(evaluation(f"c{i}", i, p), p) for i, p in enumerate([noisy(labels, 0.6, 1), noisy(labels, 0.95, 2)])]
    found = bootstrap_choice(clear, "max recall_negative", resamples=200)
    assert (found.winner, found.wins["c1"], found.none) == ("c1", 1.0, 0.0)
    assert found.optimism == pytest.approx(0.0, abs=0.01)
    close = equals(3, 78, 5)
    unsure = bootstrap_choice(close, "max recall_negative", resamples=200, seed=1)
    assert sum(unsure.wins.values()) == pytest.approx(1.0)
    assert max(unsure.wins.values()) < 0.95
    again = bootstrap_choice(close, "max recall_negative", resamples=200, seed=1)
    assert again == unsure
    loss = bootstrap_choice(clear, "min cost", costs={("negative", "positive"): 2.0}, resamples=100)
    assert loss.winner == "c1"
    assert loss.corrected >= loss.observed


def test_a_constraint_on_the_line_fails_half_the_time() -> None:
    """Recall 0.9 observed against a bound of 0.9: new rows meet it about as often as not."""
    edge = [(evaluation("edge", 1, p), p) for p in [binary(90, 10, 0, 50)]]
    found = bootstrap_choice(edge, "recall_negative >= 0.9, then max accuracy", resamples=400)
    assert 0.35 < found.none < 0.55
    with pytest.raises(ConfigError, match="no candidate meets it"):
        bootstrap_choice(edge, "lower recall_negative >= 0.9, then max accuracy", resamples=50)
    with pytest.raises(ConfigError, match="flatter"):
        bootstrap_choice(edge, "recall_negative >= 0.9", resamples=50)


def test_rows_are_resampled_jointly() -> None:
    """Identical candidates always tie, so the earlier one wins every time; drawn apart they would share the wins."""
    p = noisy(np.zeros(78, np.int64), 0.9, 1)
    found = bootstrap_choice([(evaluation(f"c{i}", i, p), p) for i in (2, 1)], "max recall_negative", resamples=100)
    assert found.wins == {"c2": 0.0, "c1": 1.0}
    assert abs(found.optimism) < 0.02


def test_the_winner_is_estimated_anew_on_other_rows() -> None:
    chosen = evaluation("epoch 5", 5, binary(75, 3, 2, 400))
    fresh = evaluation("epoch 5", 5, binary(91, 5, 3, 380), data="test")
    found = reestimate(chosen, fresh, "recall_negative")
    assert (found.validation, found.test) == ("0.9615 (75/78)", "0.9479 (91/96)")
    assert found.interval is not None
    assert found.interval.n == 96
    assert found.difference == pytest.approx(91 / 96 - 75 / 78)
    with pytest.raises(ConfigError, match="was made on these rows"):
        reestimate(chosen, chosen, "recall_negative")
    with pytest.raises(ConfigError, match="not the checkpoint that was chosen"):
        reestimate(chosen, evaluation("epoch 4", 4, binary(1, 1, 1, 1), data="test"), "recall_negative")
    moved = dataclasses.replace(fresh, threshold=Threshold("negative", 0.3))
    with pytest.raises(ConfigError, match="same threshold"):
        reestimate(chosen, moved, "recall_negative")


def test_rows_of_the_choice_are_found_in_other_data() -> None:
    a = dataclasses.replace(binary(1, 1, 1, 1), content=np.array([1, 2, 3, 4], np.uint64))
    b = dataclasses.replace(binary(1, 1, 1, 1), content=np.array([9, 4, 1, 7], np.uint64))
    assert overlap(a, b) == 2
    assert overlap(binary(1, 1, 1, 1), b) == 0
    assert math.isclose(overlap(a, a), 4)
