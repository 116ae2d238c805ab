"""A soup on several ranks where one cannot import the evaluation, or read: all are told at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from averaging_support import root
from ranks import run_ranks
from safetensors.torch import save_file

from distckpt import average_checkpoints
from distckpt.averaging import soup
from distckpt.averaging.blend import Blend

TIMEOUT_S = 30.0


def loss(blend: Blend) -> float:
    return abs(float(blend.state_dict()["w"][0]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return root(tmp_path / "run", [{"w": torch.full((3,), value)} for value in (4.0, 1.0, -2.0)])


def outcome(run: Path, out: Path, evaluate: str) -> tuple[str, str, bool]:
    """Return what was raised, its text, and whether it was raised before the others gave up waiting."""
    began = time.monotonic()
    try:
        average_checkpoints(run, out, "greedy", evaluate=evaluate, mode="min", timeout_s=TIMEOUT_S)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began < TIMEOUT_S / 2
    return "ok", "", True


def without_evaluation(rank: int, run: Path, out: Path) -> tuple[str, str, bool]:
    return outcome(run, out, "test_soup_ranks:loss" if rank == 0 else "not_on_this_node:loss")


def test_an_evaluation_that_one_rank_lacks_fails_all_at_once(tmp_path: Path, run: Path) -> None:
    found = run_ranks(2, without_evaluation, run, tmp_path / "out")
    assert [(kind, quick) for kind, _, quick in found] == [("ConfigError", True)] * 2
    assert "rank 1" in found[0][1]
    assert all("not_on_this_node:loss" in text for _, text, _ in found)
    assert not (tmp_path / "out").exists()


def read_error(rank: int, run: Path, out: Path, after: int) -> tuple[str, str, bool]:
    made = 0

    def blend(*args: object) -> Blend:
        nonlocal made
        made += 1
        if rank == 1 and made > after:
            raise OSError("stale file handle")
        return Blend(*args)  # type: ignore[arg-type]

    soup.Blend = blend  # type: ignore[assignment, misc, attr-defined]
    return outcome(run, out, "test_soup_ranks:loss")


@pytest.mark.parametrize("after", [0, 2, 4])  # at the start, of a single checkpoint, of a mean
def test_a_mean_that_one_rank_cannot_make_fails_all_at_once(tmp_path: Path, run: Path, after: int) -> None:
    found = run_ranks(2, read_error, run, tmp_path / "out", after)
    assert [(kind, quick) for kind, _, quick in found] == [("SaveFailed", True), ("OSError", True)]
    assert "rank 1" in found[0][1]
    assert "stale file handle" in found[0][1]
    assert not (tmp_path / "out").exists()


def own_copies(rank: int, folder: Path, cache: Path) -> int:
    """Average copies of one's own, whose files have times of their own, twice; returns the scores taken at last."""
    dist.barrier()
    paths = []
    for step, value in ((1, 4.0), (2, 1.0)):
        path = folder / f"node-{rank}" / f"checkpoint-{step}"
        path.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.full((3,), value)}, path / "model.safetensors")
        os.utime(path / "model.safetensors", ns=(rank + 1, rank + 1))
        paths.append(path)
    taken = 0
    for _ in range(2):
        report = soup.greedy_soup(
            soup_members(paths), "test_soup_ranks:loss", mode="min", cache=cache, timeout_s=TIMEOUT_S
        ).report
        taken = report.evaluated
    return taken


def soup_members(paths: list[Path]) -> list[soup.Member]:
    from distckpt.averaging.sources import Term, open_members

    return open_members([Term(str(path)) for path in paths])


def test_ranks_agree_about_kept_scores_of_copies_of_their_own(tmp_path: Path) -> None:
    assert run_ranks(2, own_copies, tmp_path, tmp_path / "scores.json") == [0, 0]
