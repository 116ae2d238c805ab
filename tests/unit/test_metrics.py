"""Metrics against scikit-learn and sacreBLEU; what is undefined; how predictions are merged and stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from evaluation_support import binary

pytest.importorskip("sklearn")
import sacrebleu
import sklearn.metrics as sk

from distckpt.errors import ConfigError, CorruptCheckpoint, IncompatibleState
from distckpt.selection.evaluation import Threshold
from distckpt.selection.metrics import at_threshold, measure
from distckpt.selection.predictions import Predictions, merge
from distckpt.selection.totals import metric_of, row_totals

NAMES = ("Very bad", "so-so", "GOOD")


def some(n: int = 300, classes: int = 3, seed: int = 0, **more: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    names = NAMES[:classes] if classes <= 3 else None
    given = {
        "labels": rng.integers(0, classes, n),
        "logits": rng.standard_normal((n, classes)),
        "classes": names,
        **more,
    }
    return Predictions(ids=np.arange(n), **given)


def test_everything_is_as_scikit_learn_has_it() -> None:
    p = some()
    scores, chosen = p.scores(), p.chosen()
    assert scores is not None
    found = measure(p)
    report = sk.classification_report(p.labels, chosen, target_names=["very_bad", "so_so", "good"], output_dict=True)
    for name, row in report.items():
        if name in ("very_bad", "so_so", "good"):
            assert found.metrics[f"precision_{name}"] == pytest.approx(row["precision"], abs=1e-12)
            assert found.metrics[f"recall_{name}"] == pytest.approx(row["recall"], abs=1e-12)
            assert found.metrics[f"f1_{name}"] == pytest.approx(row["f1-score"], abs=1e-12)
            assert found.n[f"recall_{name}"] == row["support"]
    assert found.metrics["accuracy"] == pytest.approx(report["accuracy"])
    assert found.metrics["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-12)
    assert found.metrics["weighted_f1"] == pytest.approx(report["weighted avg"]["f1-score"], abs=1e-12)
    assert found.metrics["roc_auc"] == pytest.approx(sk.roc_auc_score(p.labels, scores, multi_class="ovr"))
    assert found.metrics["pr_auc_good"] == pytest.approx(sk.average_precision_score(p.labels == 2, scores[:, 2]))
    assert found.metrics["loss"] == pytest.approx(sk.log_loss(p.labels, scores))
    assert found.confusion == tuple(map(tuple, sk.confusion_matrix(p.labels, chosen).tolist()))
    for name, (numerator, denominator) in found.counts.items():
        assert numerator / denominator == found.metrics[name]


def test_totals_over_rows_give_the_same_numbers() -> None:
    p = some()
    found, everything = measure(p, costs={("good", "very_bad"): 2.5}), np.arange(len(p))
    names = [name for name in found.metrics if "auc" not in name]
    assert len(names) == 14
    for name in names:
        totals = row_totals(p, name, {("GOOD", "Very bad"): 2.5})
        assert totals is not None
        assert float(totals.of_rows(everything)) == pytest.approx(found.metrics[name], abs=1e-12)
        if totals.exact:
            assert tuple(totals.terms.sum(axis=0)) == found.counts[name]
    drawn = np.random.default_rng(0).integers(0, len(p), (4, len(p)))
    for name in ("recall_good", "macro_f1", "weighted_f1", "roc_auc", "loss"):
        for one, value in zip(drawn, metric_of(p, name)(drawn), strict=True):
            assert value == pytest.approx(measure(p.take(one, renumber=True)).metrics[name], abs=1e-12), name


def test_undefined_is_not_zero() -> None:
    never = Predictions(ids=[0, 1, 2], labels=[1, 1, 1], logits=[[0, 1], [0, 2], [0, 3]], classes=("rare", "usual"))
    found = measure(never)
    assert found.metrics["recall_rare"] is None
    assert found.metrics["precision_rare"] is None
    assert found.metrics["f1_rare"] is None
    assert (found.counts["recall_rare"], found.n["recall_rare"]) == ((0, 0), 0)
    assert found.metrics["macro_f1"] == 1.0  # over the classes that have one
    assert found.metrics["roc_auc"] is None
    assert found.metrics["pr_auc_rare"] is None
    assert np.isnan(metric_of(never, "recall_rare")(np.arange(3)))
    missed = measure(binary(hits=0, misses=5, false_alarms=0, correct=5))
    assert missed.metrics["precision_negative"] is None
    assert missed.metrics["recall_negative"] == 0.0
    assert missed.metrics["f1_negative"] == 0.0


def test_a_broken_loss_stays_visible() -> None:
    p = Predictions(ids=[0, 1], labels=[0, 1], logits=[[0.0, 1.0], [math.nan, 0.0]])
    found = measure(p)
    loss = found.metrics["loss"]
    assert loss is not None
    assert math.isnan(loss)
    assert "roc_auc" not in found.metrics


def test_costs_of_errors_are_exact() -> None:
    p = binary(hits=346, misses=54, false_alarms=43, correct=557)
    found = measure(p, costs={("negative", "positive"): 5.1, ("positive", "negative"): 0.1})
    assert found.metrics["cost"] == pytest.approx((54 * 5.1 + 43 * 0.1) / 1000, abs=1e-15)
    assert found.counts["cost"] == (2797, 10000)
    with pytest.raises(ConfigError, match="want a finite number for two of the classes"):
        measure(p, costs={("negative", "neutral"): 1.0})


def test_losses_of_tokens_and_perplexity() -> None:
    logs = np.log(np.array([0.5, 0.25, 0.1, 0.9, 0.9], np.float32))
    p = Predictions(ids=[0, 1, 2], terms=[2, 0, 3], token_logprobs=logs)
    found = measure(p)
    assert found.metrics["loss"] == pytest.approx(-float(logs.astype(np.float64).sum()) / 5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(-logs.mean()), rel=1e-6)
    assert found.n["loss"] == 5
    with pytest.raises(ConfigError, match="add up"):
        Predictions(ids=[0, 1], terms=[2, 2], token_logprobs=logs)


def test_bleu_is_the_corpus_score() -> None:
    said = [
        "the cat sat on the mat",
        "a dog barks at the moon",
        "nothing in common here",
        "",
        "the cat is on a mat today",
    ]
    want = [
        "the cat sat on the mat today",
        "a dog barked at the moon",
        "quite other words than these",
        "empty",
        "the cat is on the mat",
    ]
    p = Predictions(ids=range(5), texts=said, references=want)
    score = sacrebleu.corpus_bleu(said, [want]).score
    assert measure(p).metrics["bleu"] == pytest.approx(score, abs=1e-12)
    assert measure(p).n["bleu"] == 5
    again = np.array([[0, 0, 1, 4, 3]])
    drawn = sacrebleu.corpus_bleu([said[i] for i in again[0]], [[want[i] for i in again[0]]]).score
    assert metric_of(p, "bleu")(again)[0] == pytest.approx(drawn, abs=1e-12)


def test_own_metrics() -> None:
    p = some()
    found = measure(p, custom={"twice": lambda q: 2 * len(q), "more": lambda q: {"a": 1, "b": None}})
    assert (found.metrics["twice"], found.metrics["a"], found.metrics["b"]) == (600.0, 1.0, None)
    with pytest.raises(ConfigError, match="there already"):
        measure(p, custom={"accuracy": lambda q: 1.0})
    with pytest.raises(ConfigError, match="no number"):
        measure(p, custom={"odd": lambda q: "high"})


def test_a_threshold_moves_rows_between_classes() -> None:
    p = Predictions(ids=range(4), labels=[0, 0, 1, 1], probabilities=[[0.6, 0.4], [0.35, 0.65], [0.4, 0.6], [0.1, 0.9]])
    assert measure(p).metrics["recall_0"] == 0.5
    lower = at_threshold(p, Threshold("0", 0.3))
    assert measure(lower).metrics["recall_0"] == 1.0
    assert measure(lower).metrics["precision_0"] == pytest.approx(2 / 3)
    three = at_threshold(some(), Threshold("good", 2.0)).chosen()
    assert three is not None
    assert set(three) == {0, 1}  # nothing reaches it: the best of the other classes


# ---------------------------------------------------------------- merging and storing


def test_merging_counts_padded_rows_once_and_means_of_metrics_would_not_do() -> None:
    """Three ranks of a padding sampler over 10 rows: 4 each, rows 0 and 1 twice."""
    whole = some(10, 2, seed=3, logits=None, predicted=np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 0]))
    parts = [whole.take(np.array([i % 10 for i in range(rank, 12, 3)])) for rank in range(3)]
    merged, dropped = merge(parts, 10)
    assert dropped == 2
    assert measure(merged).metrics == measure(whole).metrics
    assert measure(merged).confusion == measure(whole).confusion
    means = np.mean([measure(part).metrics["macro_f1"] for part in parts])
    assert means != pytest.approx(measure(whole).metrics["macro_f1"], abs=1e-3)
    with pytest.raises(IncompatibleState, match="row 2 is missing"):
        merge(parts[:2], 10)
    with pytest.raises(IncompatibleState, match="rows 0 to 8"):
        merge(parts, 9)


def test_merging_ragged_and_text_fields() -> None:
    p = Predictions(
        ids=[2, 0, 1], terms=[1, 3, 0], token_logprobs=[-1.0, -2.0, -3.0, -4.0], texts=["c", "a", "b"], references="xyz"
    )
    merged, _ = merge([p.take(np.array([0])), p.take(np.array([1, 2]))], 3)
    assert merged.ids.tolist() == [0, 1, 2]
    assert merged.texts == ("a", "b", "c")
    assert merged.terms is not None
    assert merged.token_logprobs is not None
    assert (merged.terms.tolist(), merged.token_logprobs.tolist()) == ([3, 0, 1], [-2.0, -3.0, -4.0, -1.0])


def test_predictions_come_back_bit_for_bit() -> None:
    import torch

    p = Predictions(
        ids=torch.arange(3), labels=[0, 1, 1], logits=torch.tensor([[0.1, 2], [1, 0], [-5, 7]], dtype=torch.bfloat16),
        losses=[0.25, math.nan, 3.0], texts=["ä", "", "\ud800"], references=["x", "y", "z"], classes=("no", "yes"),
        content=np.array([1, 2**64 - 1, 3], np.uint64),
    )  # fmt: skip
    back = Predictions.from_bytes(p.to_bytes(), where="here")
    assert back.to_bytes() == p.to_bytes()
    assert (back.texts, back.classes) == (p.texts, p.classes)
    with pytest.raises(CorruptCheckpoint, match="here"):
        Predictions.from_bytes(p.to_bytes()[:-3], where="here")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": [0, 1]}, "labels has 2"),
        ({"labels": [0, 1, -1]}, "labels from -1"),
        ({"labels": [0, 1, 2], "classes": ("a", "b")}, "there are 2 classes"),
        ({"labels": [0.5, 1, 1]}, "whole numbers"),
        ({"logits": [0.5, 1, 1]}, "want 2 axes"),
        ({"ids": [0, 1, 1]}, "stands twice"),
    ],
)
def test_predictions_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Predictions(**{"ids": [0, 1, 2], **fields})
