"""Candidates of a run compared: what wins and why, that the test set has no say, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from cli_support import run, run_json
from evaluation_support import CALLS, CLASSES, binary, evaluation, linear, linear_root
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("statsmodels")
pytest.importorskip("sklearn")

from distckpt import compare_candidates, list_checkpoints, open_checkpoint
from distckpt.averaging.batchnorm import RecomputeBatchNorm
from distckpt.errors import CheckpointNotFound, ConfigError, IncompatibleState
from distckpt.format.lineage import create_generation, ensure_root
from distckpt.selection.compare import CandidateComparison, Entrant, compare_entrants
from distckpt.selection.ensemble import ensemble_predictions, pool_weights
from distckpt.selection.metrics import measure
from distckpt.selection.predictions import Predictions, concatenated
from distckpt.storage import open_store

RULE = "max recall_negative, then max f1_negative, then earliest"
TRUTH = np.array([[1.0, -1.0], [0.5, -0.5], [-1.0, 1.0], [0.0, 0.0]])


def entrant(
    name: str, kind: Any, step: int, validation: Predictions, test: Predictions | None = None, **more: Any
) -> Entrant:
    fresh = None if test is None else evaluation(name, step, test, data="test")
    return Entrant(name, kind, evaluation(name, step, validation), validation, fresh, test, **more)


def seed_table() -> list[Entrant]:
    """Epoch 4: accuracy 90.5 %, recall 86.5; epoch 5: 90.3 % and 87.0; an average worse than both."""
    return [
        entrant("epoch 4", "single", 4, binary(173, 27, 68, 732), binary(170, 30, 70, 730)),
        entrant("epoch 5", "single", 5, binary(174, 26, 71, 729), binary(172, 28, 72, 728)),
        entrant("average", "average", 5, binary(120, 80, 40, 760), binary(125, 75, 40, 760)),
    ]


def compared(entrants: list[Entrant], rule: str = RULE, **more: Any) -> CandidateComparison:
    return compare_entrants(entrants, rule, resamples=200, **more)


def test_the_single_best_may_win() -> None:
    found = compared(seed_table(), criteria=[("accuracy", "max")], metrics=["accuracy"])
    assert (found.single, found.chosen, found.recommended) == ("epoch 5", "epoch 5", "epoch 5")
    assert found.words[0].startswith("The single best wins: epoch 5, recall_negative 0.8700 (174/200) on validation")
    assert any(
        words.startswith("Choosing by accuracy takes epoch 4, recall_negative 0.8650 (173/200)")
        for words in found.words
    )
    assert any("worse: average" in words for words in found.words)
    average = found.row("average")
    assert average.against is not None
    assert average.against.difference.value == pytest.approx(-0.27)
    assert average.against.p_holm < 1e-6
    assert average.intervals["accuracy"] is not None
    assert average.intervals["accuracy"].method == "Wilson"
    told = json.loads(json.dumps(found.to_json(), default=str))
    assert [row["name"] for row in told["rows"]] == ["epoch 5", "epoch 4", "average"]


def test_an_average_that_is_shown_better_is_recommended() -> None:
    better = entrant("average", "average", 5, binary(195, 5, 60, 740), binary(193, 7, 60, 740))
    found = compared([*seed_table()[:2], better])
    assert (found.single, found.chosen, found.recommended) == ("epoch 5", "average", "average")
    assert found.words[0].startswith("average wins: +0.1050 [")
    ensemble = replace(better, name="five", kind="ensemble", models=5)
    assert "It runs 5 models for each row." in compared([*seed_table()[:2], ensemble]).words[0]


def test_what_is_not_shown_better_is_not_recommended() -> None:
    """Two more hits of 200 choose, and show nothing; one of equal hits does not even choose."""
    near = entrant("average", "average", 5, binary(176, 24, 71, 729), binary(190, 10, 71, 729))
    found = compared([*seed_table()[:2], near])
    assert (found.chosen, found.recommended) == ("average", "epoch 5")
    assert "these rows do not tell the two apart" in found.words[0]
    equal = entrant("average", "average", 1, binary(174, 26, 71, 729))
    found = compared([*seed_table()[:2], equal])  # an earlier step, but equal in all that was asked for
    assert (found.chosen, found.recommended) == ("epoch 5", "epoch 5")


def test_the_test_set_has_no_say() -> None:
    entrants = [*seed_table()[:2], entrant("average", "average", 5, binary(150, 50, 60, 740), binary(199, 1, 60, 740))]
    found = compared(entrants)
    assert (found.single, found.chosen, found.recommended) == ("epoch 5", "epoch 5", "epoch 5")
    assert any(
        "The test set shows average (+0.1350" in words and "not to choose by the test set" in words
        for words in found.words
    )
    blind = compared([replace(one, test=None, test_predictions=None) for one in entrants])
    choices = ("single", "chosen", "recommended", "metric", "rule", "validation", "looks")
    assert [getattr(found, name) for name in choices] == [getattr(blind, name) for name in choices]
    assert "There is no test set here" in blind.words[1]
    assert all(row.against_test is None for row in blind.rows)


def test_constraints_losses_and_undefined_metrics() -> None:
    entrants = seed_table()
    assert compared(entrants, "precision_negative >= 0.715, then max recall_negative").single == "epoch 4"
    with pytest.raises(CheckpointNotFound, match="no single checkpoint meets"):
        compared(entrants, "lower recall_negative >= 0.9, then max accuracy")
    with pytest.raises(ConfigError, match="nothing to compare by"):
        compared(entrants, "recall_negative >= 0.5")
    with pytest.raises(ConfigError, match="two have one name"):
        compared([entrants[0], entrants[0]])
    # A test set without a positive: the recall there is 0/0, which is said and is no number.
    none = [replace(e, test=evaluation(e.name, 1, binary(0, 0, 5, 95), data="test"), test_predictions=binary(0, 0, 5, 95))
            for e in entrants]  # fmt: skip
    found = compared(none)
    assert "undefined (0/0)" in found.words[1]
    assert found.row("average").against_test is None


def test_language_models_by_loss() -> None:
    rng = np.random.default_rng(0)
    terms = np.full(80, 10)
    base = -rng.exponential(2.0, 800)
    entrants = []
    for step, worse in ((1, 0.5), (2, 0.1)):
        said = Predictions(ids=range(80), terms=terms, token_logprobs=base - worse * rng.random(800))
        entrants.append(entrant(f"step {step}", "single", step, said))
    joint = ensemble_predictions([one.predictions for one in entrants])
    found = compared([*entrants, entrant("ensemble", "ensemble", 2, joint, models=2)], "min loss, then earliest")
    assert (found.mode, found.single, found.recommended) == ("min", "step 2", "step 2")
    row = found.row("ensemble")
    assert row.against is not None
    assert row.against.difference.value > 0


def test_pool_weights_have_the_least_loss() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)

    def member(strength: float) -> Predictions:
        logits = rng.standard_normal((400, 2)) * 2
        logits[np.arange(400), labels] += strength
        return Predictions(ids=range(400), labels=labels, logits=logits, classes=CLASSES)

    members = [member(2.0), member(0.0), member(2.0)]
    weights = pool_weights(members)
    assert sum(weights) == pytest.approx(1)
    right = [one.scores()[np.arange(400), labels] for one in members]  # type: ignore[index]

    def loss(a: float, b: float) -> float:
        return float(-np.log(a * right[0] + b * right[1] + (1 - a - b) * right[2]).mean())

    grid = [loss(a, b) for a in np.linspace(0, 1, 41) for b in np.linspace(0, 1 - a, 41)]
    assert loss(*weights[:2]) <= min(grid) + 1e-6
    assert measure(ensemble_predictions(members, weights)).metrics["loss"] == pytest.approx(loss(*weights[:2]))
    assert weights[1] < 0.15  # the one that knows nothing
    with pytest.raises(ConfigError, match="probabilities or logits"):
        pool_weights([binary(1, 1, 1, 1)] * 2)
    with pytest.raises(IncompatibleState):
        pool_weights([members[0], members[1].take(np.arange(10))])


def test_logits_and_probabilities_are_paired_as_what_they_say() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 60)
    kept = [
        Predictions(ids=range(60), labels=labels, logits=rng.standard_normal((60, 2)), classes=CLASSES) for _ in "ab"
    ]
    said = Predictions(
        ids=range(60), labels=labels, probabilities=kept[1].scores(), predicted=1 - labels, classes=CLASSES
    )
    both = measure(concatenated(kept[0], said))
    alone = [measure(one) for one in (kept[0], said)]
    hits = [one.counts["accuracy"][0] for one in alone]
    assert both.counts["accuracy"] == (sum(hits), 120)
    assert hits[1] == 0
    assert both.metrics["loss"] == pytest.approx(np.mean([one.metrics["loss"] for one in alone]))


# ---------------------------------------------------------------- a run's own


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a rule behind them, and noise in the labels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 4))
    scores = x @ (TRUTH[:, 1] - TRUTH[:, 0]) + rng.standard_normal(count) * 0.3 + 1.5
    return [{"x": one.tolist(), "y": int(score > 0)} for one, score in zip(x, scores, strict=True)]


def noisy_root(folder: Path, steps: int = 4, noise: float = 2.0) -> Path:
    """A root whose checkpoints scatter around the truth, so that their mean is better than each; with an EMA of them."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None)
    rng, weights = np.random.default_rng(3), []
    for step in range(1, steps + 1):
        weights.append((TRUTH + noise * rng.standard_normal((4, 2))).astype(np.float32))
        tensors = {"model.w": weights[-1], "ema.w": np.mean(weights, axis=0, dtype=np.float32)}
        record = {"ema": {"version": 1, "updates": step, "averages": {"": {"schedule": {}}}}}
        builders.build_checkpoint(store, step, tensors=tensors, metrics={"loss": 1.0}, objects=record)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    top = tmp_path_factory.mktemp("rows")
    for name, seed in (("validation", 0), ("test", 1)):
        (top / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(300, seed)))
    return str(top / "validation.jsonl"), str(top / "test.jsonl")


def all_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_every_kind_of_candidate(tmp_path: Path, sets: tuple[str, str]) -> None:
    root = noisy_root(tmp_path / "run")
    options: dict[str, Any] = {"rule": "max accuracy, then earliest", "out": tmp_path / "out", "last": 3, "top": 2,
                               "ensembles": ["probabilities", "logits", "weighted"], "resamples": 200}  # fmt: skip
    found = compare_candidates(root, linear, *sets, **options)
    kinds = {row.name: row.kind for row in found.rows}
    assert {"average", "ema", "soup", "ensemble", "single"} == set(kinds.values())
    assert {"average of the last 3", "average of the best 2 by loss", "ensemble of 2, weighted"} <= set(kinds)
    assert found.row(found.single).kind == "single"
    # Not one of the numbers is the maker's word: the mean of the last three, done here.
    weights = [open_checkpoint(info.path).read("model.w").numpy() for info in list_checkpoints(root)]
    mean = np.mean(weights[:3], axis=0, dtype=np.float64)
    labels = np.array([row["y"] for row in rows(300, 1)])
    right = (np.array([row["x"] for row in rows(300, 1)]) @ mean).argmax(axis=1) == labels
    test = found.row("average of the last 3").test
    assert test is not None
    assert test.counts["accuracy"] == (int(right.sum()), 300)
    # The averages are better, by how these checkpoints were made, and that is found out.
    assert found.row(found.recommended).kind != "single"
    (ema,) = (row for row in found.rows if row.kind == "ema")
    assert ema.how == "the best of 4 on validation"
    assert ema.validation.checkpoint.prefix == "ema."
    soup = open_checkpoint(found.row("greedy soup").validation.checkpoint.path).provenance
    assert isinstance(soup, dict)
    assert found.looks == 4 + 2 + 3 + 4 + (soup["soup"]["looks"] - 4)
    # Again: nothing runs, nothing is written, the same comes out.
    before, calls = all_files(tmp_path), len(CALLS)
    again = compare_candidates(root, linear, *sets, **options)
    assert (all_files(tmp_path), len(CALLS)) == (before, calls)
    assert again.words == found.words


def test_what_cannot_be_made_is_left_out_and_said(tmp_path: Path, sets: tuple[str, str]) -> None:
    alone = compare_candidates(linear_root(tmp_path / "one", (100,)), linear, *sets, rule="max accuracy",
                               out=tmp_path / "a", resamples=200)  # fmt: skip
    assert [row.name for row in alone.rows] == ["step 100"]
    assert sum("one checkpoint" in reason for reason in alone.left_out) >= 3
    assert alone.words[0].startswith("The single best wins: step 100")
    root = linear_root(tmp_path / "two", (100, 200))
    store = open_store(root)
    builders.build_checkpoint(store, 300, tensors={"model.w": np.ones((4, 2), np.float32), "model.more": np.ones(2)})
    found = compare_candidates(root, linear, *sets, rule="max accuracy", out=tmp_path / "b", resamples=200)
    assert any(reason.startswith("average of the last 3: ") and "model.more" in reason for reason in found.left_out)
    assert {row.kind for row in found.rows} == {"single", "ensemble"}


def test_rows_in_both_sets_are_refused(tmp_path: Path, sets: tuple[str, str]) -> None:
    root, validation = linear_root(tmp_path / "run"), rows(300, 0)[:50]
    with pytest.raises(ConfigError, match="share 50 rows"):
        compare_candidates(root, linear, sets[0], validation, rule="max accuracy", out=tmp_path / "o")
    with pytest.raises(ConfigError, match="one name"):
        compare_candidates(root, linear, rows(9, 5), rows(9, 6), rule="max accuracy", out=tmp_path / "o")
    with pytest.raises(ConfigError, match="ensembles"):
        compare_candidates(root, linear, *sets, rule="max accuracy", out=tmp_path / "o", ensembles=["votes"])


def shared(rank: int, root: Path, out: Path, sets: tuple[str, str]) -> Any:
    found = compare_candidates(root, linear, *sets, rule="max accuracy", out=out, last=3, top=2, resamples=200)
    return found.words, [
        (row.name, row.validation.metrics, row.test.metrics if row.test else None) for row in found.rows
    ]


def test_two_ranks_are_one_process(tmp_path: Path, sets: tuple[str, str]) -> None:
    alone = shared(0, noisy_root(tmp_path / "a", 3), tmp_path / "alone", sets)
    found = run_ranks(2, shared, noisy_root(tmp_path / "b", 3), tmp_path / "two", sets)
    assert found[0] == found[1] == alone


class Normed(nn.Module):
    """The linear model with a BatchNorm, whose statistics no evaluation here looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 2))
        self.norm = nn.BatchNorm1d(2, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ self.w)  # type: ignore[no-any-return]


def normed_root(folder: Path) -> Path:
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None)
    rng = np.random.default_rng(3)
    for step in (1, 2, 3):
        tensors = {
            "model.w": (TRUTH + 2.0 * rng.standard_normal((4, 2))).astype(np.float32),
            "model.norm.running_mean": np.full(2, step, np.float32),
            "model.norm.running_var": np.ones(2, np.float32),
            "model.norm.num_batches_tracked": np.array(step),
        }
        builders.build_checkpoint(store, step, tensors=tensors, metrics={"loss": 1.0})
    return folder


def recomputed(rank: int, root: Path, out: Path, sets: tuple[str, str], batches: tuple[int, ...] = (3,)) -> Any:
    data = TensorDataset(torch.arange(32.0 * batches[rank]).reshape(-1, 4))
    policy = RecomputeBatchNorm(Normed(), DataLoader(data, batch_size=8))
    found = compare_candidates(root, linear, *sets, rule="max accuracy", out=out, ema=False, ensembles=(),
                               batchnorm=policy, resamples=200)  # fmt: skip
    return found.words, found.left_out, [row.kind for row in found.rows]


def test_averages_with_recomputed_batchnorm_are_made_once(tmp_path: Path, sets: tuple[str, str]) -> None:
    root, out = normed_root(tmp_path / "run"), tmp_path / "out"
    found = recomputed(0, root, out, sets)
    assert "average" in found[2]
    before, calls = all_files(out), len(CALLS)
    assert recomputed(0, root, out, sets) == found  # a loader and a model of its own, as in the next run of a script
    assert (all_files(out), len(CALLS)) == (before, calls)
    recomputed(0, root, out, sets, (4,))
    assert len(CALLS) > calls
    shares = run_ranks(2, recomputed, root, tmp_path / "two", sets, (2, 1))  # a share of its own on each rank
    assert shares[0] == shares[1] == found


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, sets: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    root = noisy_root(tmp_path / "run", 3)
    options = ["--by", "max accuracy, then earliest", "--data", sets[0], "--test", sets[1], "--out", tmp_path / "out",
               "--evaluator", "evaluation_support:linear", "--last", 2, "--resamples", 200]  # fmt: skip
    code, out, _ = run(capsys, "compare", root, *options)
    assert code == 0
    assert "average of the last 2" in out
    assert "* recommended" in out
    assert "candidates were scored on validation" in out
    code, told = run_json(capsys, "compare", root, *options, "--ensemble", "none", "--no-soup", "--no-ema")
    assert code == 0
    assert {row["kind"] for row in told["rows"]} == {"single", "average"}
    assert told["recommended"] in {row["name"] for row in told["rows"]}
    assert run(capsys, "compare", root, *options, "--by", "best of all")[0] == 2
    assert run(capsys, "compare", root, *options[:6])[0] == 2  # no --out


def test_each_candidate_may_have_its_own_threshold(tmp_path: Path, sets: tuple[str, str]) -> None:
    """Chosen on validation, for single checkpoints, averages, soup and ensembles alike, and carried to the test rows."""
    from distckpt.selection.evaluation import Threshold
    from distckpt.selection.thresholds import ThresholdRule

    root, options = (
        noisy_root(tmp_path / "run", 3),
        {"rule": "max f1_negative", "out": tmp_path / "out", "resamples": 200},
    )
    own = compare_candidates(root, linear, *sets, threshold=ThresholdRule("negative"), **options)  # type: ignore[arg-type]
    plain = compare_candidates(root, linear, *sets, **options)  # type: ignore[arg-type]
    assert "negative" in own.threshold
    assert plain.threshold == ""
    for row in own.rows:
        assert row.test is not None
        assert row.validation.threshold == row.test.threshold
        assert row.validation.threshold is not None
        assert "validation" in row.validation.threshold.origin
    values = {row.name: row.validation.metrics["f1_negative"] for row in plain.rows}
    common = [row for row in own.rows if row.name in values]
    assert {row.kind for row in common} >= {"single", "ensemble", "average"}
    assert all((row.validation.metrics["f1_negative"] or 0) >= (values[row.name] or 0) for row in common)
    every = compare_candidates(root, linear, *sets, threshold=Threshold("negative", 0.0), **options)  # type: ignore[arg-type]
    assert all(row.test is not None and row.test.metrics["recall_negative"] == 1 for row in every.rows)
