"""Evaluating the checkpoints of a run: what is kept, found again, refused, and told on the command line."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import evaluation_support as support
import numpy as np
import pytest
from cli_support import run, run_json
from evaluation_support import CALLS, linear, linear_root, linear_rows

pytest.importorskip("sklearn")

from distckpt import evaluate_checkpoints, list_checkpoints
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, IncompatibleState
from distckpt.selection.cache import load_predictions
from distckpt.selection.data import evaluation_data, share_of
from distckpt.selection.ensemble import ensemble_evaluations, ensemble_predictions
from distckpt.selection.evaluation import Evaluation
from distckpt.selection.ledger import evaluated_candidates, evaluations
from distckpt.selection.predictions import Predictions
from distckpt.selection.select import select


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return linear_root(tmp_path / "run")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("evaluations/*")}


def test_every_checkpoint_is_evaluated_once_and_kept(root: Path) -> None:
    found = evaluate_checkpoints(root, linear, linear_rows(), data_name="validation")
    assert [(e.name, e.step, e.generation, e.checkpoint.epoch) for e in found] == [
        ("step 100", 100, 1, 1), ("step 200", 200, 1, 2), ("step 300", 300, 1, 3)
    ]  # fmt: skip
    assert CALLS == [101] * 3
    assert found[0].data.rows == sum(found[0].support.values()) == 101
    before = files(root)
    assert len(before) == 6
    assert evaluate_checkpoints(root, linear, linear_rows(), data_name="validation") == found
    assert (CALLS, files(root)) == ([101] * 3, before)
    for one, info in zip(found, reversed(list_checkpoints(root)), strict=True):
        predictions = load_predictions(one)
        assert len(predictions) == 101
        assert list_checkpoints(one.checkpoint.path)[0].step == info.step
        name = next(name for name in before if name.startswith(f"step-{info.step:010}") and name.endswith(".json"))
        assert Evaluation.from_json(json.loads(before[name]), where=name) == one
    assert all(info.problem is None for info in list_checkpoints(root, all=True))


def test_more_metrics_are_computed_without_running_again(root: Path) -> None:
    evaluate_checkpoints(root, linear, linear_rows(), steps=[200])
    more = {"zeros": support.zeros_share}
    costs = {("negative", "positive"): 5.0}
    (found,) = evaluate_checkpoints(root, linear, linear_rows(), steps=[200], metrics=more, costs=costs)
    assert CALLS == [101]
    chosen = load_predictions(found).chosen()
    assert chosen is not None
    assert found.metrics["zeros"] == np.mean(chosen == 0)
    assert found.n["cost"] == 101
    assert len(files(root)) == 3  # two results, one file of predictions
    (unversioned,) = evaluate_checkpoints(
        root, linear, linear_rows(), steps=[200], metrics={"x": lambda p: CALLS[0] * 1.0}
    )
    assert unversioned.metrics["x"] == 101.0


def test_what_changes_a_result_runs_again(root: Path) -> None:
    only = {"steps": [100]}
    evaluate_checkpoints(root, linear, linear_rows(), **only)
    evaluate_checkpoints(root, linear, linear_rows(50), **only)
    evaluate_checkpoints(root, linear, linear_rows(), version="2", **only)
    evaluate_checkpoints(root, linear, linear_rows(), batch_size=7, **only)
    assert len(CALLS) == 4
    again = evaluate_checkpoints(root, linear, linear_rows(), reuse=False, **only)
    assert len(CALLS) == 5
    assert again[0].metrics == evaluate_checkpoints(root, linear, linear_rows(), **only)[0].metrics
    assert len(CALLS) == 5


def test_closures_are_never_taken_for_each_other(root: Path) -> None:
    def shifted(by: float) -> Any:
        def closure(model: Any, rows: Any) -> dict[str, float]:
            return {"by": by}

        return closure

    values = [evaluate_checkpoints(root, shifted(b), linear_rows(9), steps=[100])[0].metrics["by"] for b in (1.0, 2.0)]
    assert values == [1.0, 2.0]


def test_a_function_may_finish_its_metrics_itself(root: Path) -> None:
    def finished(model: Any, rows: Any) -> dict[str, float]:
        return {"mean": float(model["w"].mean()), "bad": float("nan")}

    (found,) = evaluate_checkpoints(root, finished, linear_rows(9), steps=[300])
    assert found.n == {"mean": 9, "bad": 9}
    assert found.predictions is None
    with pytest.raises(CheckpointNotFound, match="no predictions were kept"):
        load_predictions(found)
    assert [c.name for c in select(root, "max mean", data="data").ranked] == ["step 300"]
    with pytest.raises(ConfigError, match="want Predictions, or a dict"):
        evaluate_checkpoints(root, lambda m, rows: 3, linear_rows(9))
    with pytest.raises(IncompatibleState, match=r"cover 4 of 9 rows; row 4 is missing"):
        evaluate_checkpoints(
            root, lambda m, rows: Predictions(ids=range(4), labels=[0] * 4, predicted=[0] * 4), linear_rows(9)
        )


def test_a_builder_makes_the_model(root: Path) -> None:
    def build(weights: dict[str, Any], config: Any) -> Any:
        return {"w": weights["w"] * 0.0}

    (found,) = evaluate_checkpoints(root, linear, linear_rows(), steps=[100], build=build)
    assert set(load_predictions(found).chosen()) == {0}  # type: ignore[arg-type]


def test_other_data_under_the_same_name_is_noticed_and_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_checkpoints(root, linear, linear_rows(), data_name="validation")
    changed = linear_rows()
    changed[7]["y"] ^= 1
    with caplog.at_level(logging.WARNING, "distckpt"):
        evaluate_checkpoints(root, linear, changed, data_name="validation", steps=[100, 200])
    assert "on which it was evaluated before: results are not comparable" in caplog.text
    with pytest.raises(ConfigError, match=r"means validation@\w+ \(101 rows\) and validation@\w+"):
        select(root, "max accuracy", data="validation")
    digest = evaluation_data(changed).id.digest
    assert len(select(root, "max accuracy", data=f"validation@{digest[:10]}").candidates) == 2
    with pytest.raises(CheckpointNotFound, match="no evaluation on data 'test'"):
        select(root, "max accuracy", data="test")


def test_damage_is_not_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (found,) = evaluate_checkpoints(root, linear, linear_rows(), steps=[100])
    result, kept = sorted(root.rglob("evaluations/*"), key=lambda path: path.suffix)
    good = result.read_bytes()
    result.write_bytes(good.replace(b'"accuracy":0.', b'"accuracy":1.', 1))
    with caplog.at_level(logging.WARNING, "distckpt"):
        (again,) = evaluate_checkpoints(root, linear, linear_rows(), steps=[100])
    assert "its digest is another" in caplog.text
    assert again.metrics == found.metrics
    assert len(CALLS) == 2
    assert len(list(root.rglob("evaluations/*.json"))) == 2  # nothing is rewritten
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="not the bytes that its result names"):
        load_predictions(found)


def test_a_moved_root_and_a_removed_checkpoint(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_checkpoints(root, linear, linear_rows(), data_name="v")
    moved = tmp_path / "moved"
    shutil.move(root, moved)
    choice = select(moved, "max accuracy", data="v")
    assert choice.winner is not None
    assert choice.winner.path.startswith(str(moved))
    next((moved / f"step-{choice.winner.step:010}").glob("manifest*")).unlink()
    with caplog.at_level(logging.WARNING, "distckpt"):
        left = select(moved, "max accuracy", data="v")
    assert f"{choice.winner.name} evaluated, but removed since" in caplog.text
    assert len(left.candidates) == 2
    assert len(evaluations(moved, "v")) == 3


def test_results_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    evaluate_checkpoints(root, linear, linear_rows(), results=tmp_path / "results")
    assert files(root) == {}
    assert [c.step for c in evaluated_candidates(tmp_path / "results", "data")] == [100, 200, 300]
    evaluate_checkpoints(root, linear, linear_rows(), results=tmp_path / "results")
    assert len(CALLS) == 3
    with pytest.raises(CheckpointNotFound, match="no step 7; there are 100, 200, 300"):
        evaluate_checkpoints(root, linear, linear_rows(), steps=[7])


def test_shares_have_each_row_once_in_batches_that_do_not_depend_on_ranks() -> None:
    data = evaluation_data(linear_rows(101))
    alone = [list(batch.ids) for batch in share_of(data, 8, 0, 1).batches()]
    for world in (2, 3, 20):
        shares = [share_of(data, 8, rank, world) for rank in range(world)]
        assert sorted(int(i) for share in shares for i in share.ids) == list(range(101))
        batches = [list(batch.ids) for share in shares for batch in share.batches()]
        assert sorted(batches) == sorted(alone)


def test_data_has_a_digest_that_every_change_changes(tmp_path: Path) -> None:
    import torch

    rows: list[Any] = [
        {"text": "a", "label": 1},
        ("b", 2.0, None, True),
        [b"c", np.arange(3)],
        torch.ones(2, dtype=torch.bfloat16),
    ]
    others: list[Any] = [
        [{"text": "a", "label": True}, *rows[1:]], [*rows[:3], torch.ones(2)], [rows[1], rows[0], *rows[2:]], rows[:3],
        [*rows[:2], [b"c", np.arange(3, dtype=np.int32)], rows[3]], [{"text": "a", "label": "1"}, *rows[1:]],
    ]  # fmt: skip
    digests = [evaluation_data(one).id.digest for one in (rows, *others)]
    assert len(set(digests)) == len(digests)
    assert evaluation_data(list(rows)).id.digest == digests[0]
    with pytest.raises(ConfigError, match="row 0: a value of type object"):
        evaluation_data([object()])
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}\n')
    (tmp_path / "test.csv").write_text('text,label\n"a, b",1\n')
    assert evaluation_data(tmp_path / "test.jsonl").id.name == "test"
    assert evaluation_data(tmp_path / "test.jsonl").rows == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert evaluation_data(str(tmp_path / "test.csv")).rows == [{"text": "a, b", "label": "1"}]
    with pytest.raises(ConfigError, match="no such file"):
        evaluation_data("nowhere.jsonl")


# ---------------------------------------------------------------- ensembles


def test_ensembles_come_from_what_was_kept(root: Path) -> None:
    found = evaluate_checkpoints(root, linear, linear_rows(), data_name="v")
    kept = [load_predictions(one) for one in found]
    joint, predictions = ensemble_evaluations(found)
    assert len(CALLS) == 3
    scores = [p.scores() for p in kept]
    np.testing.assert_allclose(predictions.scores(), np.mean(scores, axis=0), atol=1e-15)  # type: ignore[arg-type]
    weighted = ensemble_predictions(kept, [2, 1, 1]).scores()
    np.testing.assert_allclose(weighted, np.average(scores, axis=0, weights=[2, 1, 1]), atol=1e-15)  # type: ignore[arg-type]
    logits = np.mean([p.logits.astype(float) for p in kept], axis=0)  # type: ignore[union-attr]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ensemble_predictions(kept, average="logits").scores(), expected, atol=1e-12)  # type: ignore[arg-type]
    assert joint.metrics["loss"] <= np.mean([one.metrics["loss"] for one in found])  # type: ignore[operator, arg-type]
    choice = select([*found, joint], "min loss")
    assert "ensemble of 3 (probabilities)" in {c.name for c in choice.candidates}
    with pytest.raises(ConfigError, match="one number from 0 on"):
        ensemble_predictions(kept, [1, -1, 1])
    with pytest.raises(IncompatibleState, match="cannot be paired"):
        ensemble_predictions([kept[0], kept[1].take(np.arange(50))])


def test_ensembles_of_language_models_average_the_next_tokens_probability() -> None:
    rng = np.random.default_rng(0)
    made = [Predictions(ids=[0, 1], terms=[3, 2], token_logprobs=np.log(rng.random(5))) for _ in range(3)]
    joint = ensemble_predictions(made, [1, 2, 3])
    chances = np.average([np.exp(p.token_logprobs) for p in made], axis=0, weights=[1, 2, 3])  # type: ignore[arg-type]
    np.testing.assert_allclose(joint.token_logprobs, np.log(chances), rtol=1e-6)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use Ensemble with the models"):
        ensemble_predictions(made, average="logits")


# ---------------------------------------------------------------- the command line

MODULE = """
from evaluation_support import linear, linear_rows, zeros_share

def validation():
    return linear_rows(101)

def test():
    return linear_rows(77, seed=9)
"""


def test_the_commands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_eval.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    asked = ["--evaluator", "my_eval:linear", "--metric", "zeros=my_eval:zeros_share", "--cost", "negative:positive=5"]
    code, out, err = run(capsys, "evaluate", root, "--data", "my_eval:validation", *asked)
    assert (code, err) == (0, "")
    assert "linear on validation@" in out
    assert all(f"step {step}" in out for step in (100, 200, 300))
    assert "rows of each class: negative " in out
    code, found = run_json(capsys, "evaluate", root, "--data", "my_eval:test", *asked)
    assert code == 0
    assert [one["n"]["accuracy"] for one in found] == [77] * 3
    assert CALLS == [101] * 3 + [77] * 3

    rule = "accuracy >= 0.3, then max f1_negative, then max recall_negative"
    code, out, err = run(
        capsys, "select", root, "--by", rule, "--data", "validation", "--bootstrap", 50, "--test", "test"
    )
    assert (code, err) == (0, "")
    assert "3 candidates on validation@" in out
    assert "the highest score decides" in out
    assert "chosen: step" in out
    assert "chosen again on 50 resamples of 101 rows" in out
    assert "which had no part in it" in out
    code, told = run_json(
        capsys, "select", root, "--by", "min cost", "--data", "validation", "--top", 2, "--bootstrap", 20
    )
    assert (code, len(told["chosen"])) == (0, 2)
    assert told["chosen"][0]["n"]["cost"] == 101
    assert sum(told["bootstrap"]["wins"].values()) == pytest.approx(1.0)
    code, out, _ = run(
        capsys, "select", root, "--by", "max f1_negative", "--data", "validation", "--threshold", "negative=f1"
    )
    assert code == 0
    assert "each candidate has its own threshold (best f1 of negative), chosen on this data" in out
    code, told = run_json(
        capsys, "select", root, "--by", "max recall_negative, max precision_negative", "--data", "test", "--pareto"
    )
    assert code == 0
    assert 1 <= len(told) <= 3
    code, out, _ = run(capsys, "select", root, "--by", "min loss")
    assert (code, "the run's own metrics" in out, "step 300" in out) == (0, True, True)


def test_the_commands_refuse(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_checkpoints(root, linear, linear_rows(), data_name="v")
    assert run(capsys, "select", root, "--by", "max accuracy, accuracy > 2", "--data", "v")[0] == 2
    code, out, _ = run(capsys, "select", root, "--by", "accuracy > 2, max accuracy", "--data", "v")
    assert (code, "no candidate meets the rule" in out) == (1, True)
    assert run(capsys, "select", root, "--by", "max f7", "--data", "v")[0] == 1
    assert run(capsys, "select", root, "--by", "max loss", "--bootstrap", 9)[0] == 2
    for wrong in (["--cost", "a=1"], ["--tokenizer", "x"], ["--metric", "no.such.module:f"]):
        assert (
            run(
                capsys,
                "evaluate",
                root,
                "--data",
                "evaluation_support:linear_rows",
                "--evaluator",
                "evaluation_support:linear",
                *wrong,
            )[0]
            == 2
        )
    assert run(capsys, "evaluate", root, "--data", "no_such_file.jsonl")[0] == 2


def test_listing_and_choosing_import_no_torch(root: Path) -> None:
    import subprocess

    code = (
        "import sys; from distckpt.cli.main import main; code = main(['select', sys.argv[1], '--by', 'min loss']); "
        "assert code == 0; assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'too much'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
