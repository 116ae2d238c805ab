"""What a kept score stands for: other rules, or a folder that was written anew, are looked at again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_support import root, step_of
from evaluation_support import linear, linear_rows
from safetensors.torch import save_file
from torch import nn

from distckpt import average_checkpoints, compare_candidates, open_checkpoint
from distckpt.averaging.average import RecomputeBatchNorm
from distckpt.averaging.blend import Blend
from distckpt.averaging.jury import draft_of
from distckpt.averaging.sources import Term, open_members
from distckpt.averaging.structure import Rules
from distckpt.errors import ConfigError
from distckpt.selection.evaluation import CheckpointId
from distckpt.selection.subjects import Subject

CALLS: list[float] = []


def loss(blend: Blend) -> float:
    value = float(blend.state_dict()["running_mean"][0])
    CALLS.append(value)
    return abs(value)


def state(value: float) -> dict[str, torch.Tensor]:
    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(value)
    return {name: tensor.clone() for name, tensor in norm.state_dict().items()}


def huggingface(folder: Path, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state(value), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def soup(tmp_path: Path) -> Any:
    CALLS.clear()
    count = iter(range(100))

    def make(paths: Any, **rules: Any) -> int:
        """Make a soup with the cache that all share; returns how many scores were taken."""
        before, out = len(CALLS), tmp_path / f"out-{next(count)}"
        average_checkpoints(paths, out, "greedy", evaluate=loss, mode="min", cache=tmp_path / "scores.json", **rules)
        return len(CALLS) - before

    return make


def test_other_rules_are_other_scores(tmp_path: Path, soup: Any) -> None:
    run = root(tmp_path / "run", [state(1.0), state(2.0)])
    batches = [torch.ones(4, 2) * i for i in range(3)]
    recompute = RecomputeBatchNorm(nn.BatchNorm1d(2), batches)
    every: list[dict[str, Any]] = [
        {"batchnorm": "copy_newest"},
        {"batchnorm": recompute},
        {"batchnorm": RecomputeBatchNorm(nn.BatchNorm1d(2), batches[1:])},
        {"batchnorm": "copy_newest", "dtype": "bfloat16"},
        {"batchnorm": "copy_newest", "copy": ["weight"]},
    ]
    assert [soup(run, **rules) for rules in every] == [3] * len(every)
    assert [soup(run, **rules) for rules in every] == [0] * len(every)
    # Other objects of the same kind are the same rule, as in the next run of the same script.
    assert soup(run, batchnorm=RecomputeBatchNorm(nn.BatchNorm1d(2), list(batches))) == 0


def test_a_folder_that_was_written_anew_is_scored_anew(tmp_path: Path, soup: Any) -> None:
    paths = [huggingface(tmp_path / f"checkpoint-{i}", float(i)) for i in (1, 2)]
    assert soup(paths, batchnorm="copy_newest") == 3
    assert soup(paths, batchnorm="copy_newest") == 0
    (paths[0] / "trainer.log").write_text("read by nobody")
    assert soup(paths, batchnorm="copy_newest") == 0
    huggingface(paths[0], -8.0)  # as many bytes as before
    assert soup(paths, batchnorm="copy_newest") == 2
    assert CALLS[-2:] == [-8.0, 2.0]  # the mean has the newest's statistics
    file = tmp_path / "one.pt"
    torch.save(state(4.0), file)
    assert soup([file, paths[1]], batchnorm="copy_newest") == 2
    torch.save(state(5.0) | {"weight": torch.zeros(2)}, file)
    assert soup([file, paths[1]], batchnorm="copy_newest") == 2


def test_the_provenance_tells_files_by_names_sizes_and_times(tmp_path: Path) -> None:
    folder = huggingface(tmp_path / "checkpoint-1", 1.0)
    run = root(tmp_path / "run", [state(1.0)])
    average_checkpoints([folder, step_of(run, 1)], tmp_path / "out")
    rows = {row["kind"]: row for row in open_checkpoint(tmp_path / "out").provenance["averaged_from"]}
    assert "files" not in rows["distckpt"]
    (member,) = open_members([Term(str(folder))])
    assert rows["huggingface"]["manifest"] is None
    assert rows["huggingface"]["files"] == member.files
    os.utime(folder / "config.json", ns=(1, 1))
    (touched,) = open_members([Term(str(folder))])
    assert touched.files != member.files
    assert touched.identity == member.identity
    with pytest.raises(ConfigError, match="same checkpoint"):
        open_members([Term(str(folder)), Term(f"{folder}/")])


def test_a_draft_is_known_by_content_rules_and_statistics(tmp_path: Path) -> None:
    paths = [huggingface(tmp_path / f"checkpoint-{i}", float(i)) for i in (1, 2)]
    members = open_members([Term(str(path)) for path in paths])

    def draft(contents: tuple[str, str] = ("a", "b"), value: float | None = None, **rules: Any) -> str:
        blend = Blend(members, Rules(batchnorm="copy_newest", **rules))
        blend.replace({} if value is None else {"running_mean": torch.full((2,), value)})
        newest = Subject(CheckpointId("two", str(paths[1]), "b", 2), None)
        return draft_of(blend, newest, str(tmp_path / "results"), contents).id.digest

    every = [draft(), draft(("a", "c")), draft(value=7.0), draft(dtype="bfloat16")]
    assert len(set(every)) == len(every)
    huggingface(paths[0], 1.0)
    os.utime(paths[0] / "model.safetensors", ns=(1, 1))  # the same content, copied
    members = open_members([Term(str(path)) for path in paths])
    assert draft() == every[0]


def test_soups_of_folders_that_were_written_anew_are_evaluated_anew(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    pytest.importorskip("sklearn")

    def written(seed: int) -> list[str]:
        paths = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
        for number, path in enumerate(paths):
            path.mkdir(exist_ok=True)
            torch.manual_seed(seed + number)
            save_file({"w": torch.randn(4, 2)}, path / "model.safetensors")
            (path / "config.json").write_text("{}")
        return [str(path) for path in paths]

    def histories(paths: list[str], out: Path) -> Any:
        compare_candidates(paths, linear, linear_rows(), rule="max accuracy", out=out, ensembles=(), resamples=200)
        made: list[Any] = [open_checkpoint(path).provenance for path in out.glob("soup-*")]
        return [provenance["soup"]["history"] for provenance in made]

    first = histories(written(3), tmp_path / "out")
    paths = written(30)
    both, fresh = histories(paths, tmp_path / "out"), histories(paths, tmp_path / "fresh")
    assert len(both) == 2
    assert first != fresh
    assert fresh[0] in both
