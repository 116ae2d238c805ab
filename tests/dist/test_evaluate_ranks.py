"""Evaluation shared over ranks is that of one process, bit for bit; one rank's error is every rank's."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_support import linear, linear_root, linear_rows, texts, tiny_bert, tiny_tokenizer
from ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from distckpt import evaluate_checkpoints
from distckpt.cli.main import main
from distckpt.selection.cache import load_predictions
from distckpt.selection.evaluation import Evaluation
from distckpt.selection.huggingface import SequenceClassification
from distckpt.selection.predictions import Predictions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("bert")
    for epoch in (1, 2, 3):
        tiny_bert(epoch).save_pretrained(top / f"epoch_{epoch}")
        tiny_tokenizer(top / f"epoch_{epoch}")
    return top


def outcome(found: list[Evaluation]) -> list[Any]:
    """Everything that a result says but when; and every row's prediction."""
    return [(e.checkpoint, e.data, e.metrics, e.counts, e.n, e.confusion, e.key, load_predictions(e).to_bytes()) for e in found]


def bert(rank: int, folders: Path, results: Path, share: Any) -> list[Any]:
    rows = texts(45)
    return outcome(evaluate_checkpoints(folders, SequenceClassification(), rows, results=results, share=share, batch_size=4))


def test_two_ranks_are_one_process(folders: Path, tmp_path: Path) -> None:
    alone = bert(0, folders, tmp_path / "alone", "auto")
    for share in ("data", "checkpoint"):
        shared = run_ranks(2, bert, folders, tmp_path / share, share)
        assert shared[0] == alone, share
        assert shared[1] == alone, share
    # What two ranks stored is found by one.
    assert bert(0, folders, tmp_path / "data", "auto") == alone
    assert len(list((tmp_path / "data").rglob("*.json"))) == 3


def padded(model: Any, rows: Any) -> Predictions:
    """An evaluator that deals rows out itself, as a padding sampler does: 101 rows on 3 ranks are 34 each."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ids = [i % len(rows.data) for i in range(rank, -(-len(rows.data) // world) * world, world)]
    return linear(model, type(rows)(rows.data, np.array(ids), rows.batch_size))


def three(rank: int, root: Path) -> Any:
    found = evaluate_checkpoints(root, padded, linear_rows(), version="1", steps=[100], share="data")
    return found[0].metrics, found[0].counts, found[0].n["accuracy"]


def test_padding_is_counted_once(tmp_path: Path) -> None:
    whole = evaluate_checkpoints(linear_root(tmp_path / "a"), linear, linear_rows(), steps=[100], batch_size=1)[0]
    found = run_ranks(3, three, linear_root(tmp_path / "b"))
    assert found[0] == found[1] == found[2]
    assert found[0][1:] == (whole.counts, 101)


def failing(model: Any, rows: Any) -> Predictions:
    if os.environ["RANK"] == "1":
        raise RuntimeError("out of memory")
    return linear(model, rows)


def finished(model: Any, rows: Any) -> dict[str, float]:
    return {"rows": float(len(rows))}


def refused(rank: int, root: Path, function: Any, share: Any, rows: int) -> str:
    try:
        evaluate_checkpoints(root, function, linear_rows(rows + rank * (rows == 50)), version="1", share=share)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize(
    ("function", "share", "rows", "words"),
    [
        (failing, "data", 101, "rank 1 .*RuntimeError: out of memory"),
        (failing, "checkpoint", 101, "rank 1 .*RuntimeError: out of memory"),
        (finished, "data", 101, "cannot be merged over ranks"),
        (linear, "data", 50, "rank 1 was given other data"),
    ],
    ids=["a rank fails on its rows", "a rank fails on its checkpoint", "metrics are no rows", "ranks have different data"],
)
def test_one_ranks_error_is_every_ranks(tmp_path: Path, function: Any, share: str, rows: int, words: str) -> None:
    told = run_ranks(2, refused, linear_root(tmp_path / "run"), function, share, rows)
    assert told[0] == told[1]
    assert re.search(words, told[0]), told[0]
    kept = len(list(tmp_path.rglob("evaluations/*.json")))
    assert kept <= (2 if share == "checkpoint" else 0)  # what a rank has finished alone is not lost


def metrics_alone(rank: int, root: Path) -> list[float | None]:
    return [e.metrics["rows"] for e in evaluate_checkpoints(root, finished, linear_rows(), version="1")]


def test_finished_metrics_are_shared_by_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(2, metrics_alone, linear_root(tmp_path / "run")) == [[101.0] * 3] * 2


def command(rank: int, root: Path) -> tuple[int, str]:
    import torch.distributed as dist

    options = ["--data", "evaluation_support:linear_rows", "--evaluator", "evaluation_support:linear", "--share", "data"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["evaluate", str(root), *options])
    assert not dist.is_initialized()
    return code, out.getvalue()


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """As torchrun starts ranks: no process group yet, a store of the agent, everything else in the environment."""
    root = linear_root(tmp_path / "run")
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    told = run_ranks(2, command, root, backend=None, env=agent, store_host="agent")
    assert [code for code, _ in told] == [0, 0]
    assert (told[0][1].count("linear on linear_rows@"), told[1][1]) == (1, "")
    whole = evaluate_checkpoints(linear_root(tmp_path / "alone"), linear, linear_rows)
    again = evaluate_checkpoints(root, linear, linear_rows)
    assert [e.metrics for e in again] == [e.metrics for e in whole]
    assert len(list(root.rglob("evaluations/*.json"))) == 3
