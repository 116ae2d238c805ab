"""Greedy soups: what is kept, how often the held-out data was looked at, and that ranks look together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from averaging_support import contents, root, step_of
from ranks import run_ranks
from torch import nn

from distckpt import average_checkpoints, open_checkpoint
from distckpt.averaging.blend import Blend
from distckpt.averaging.sources import Term, open_members
from distckpt.errors import ConfigError, IncompatibleState, ReplicasDiffer, SaveFailed

VALUES = [4.0, 1.0, -2.0, 9.0]
"""Distance from 0 is the loss: 2 and 3 alone are best, and their mean is better still; with 1 it is worse, then equal."""
CALLS: list[float] = []


def loss(blend: Blend) -> float:
    value = float(blend.state_dict()["w"][0])
    CALLS.append(value)
    return abs(value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    CALLS.clear()
    return root(tmp_path / "run", [{"w": torch.full((3,), value)} for value in VALUES])


def test_it_adds_what_does_no_harm_and_counts_its_looks(tmp_path: Path, run: Path) -> None:
    report = average_checkpoints(run, tmp_path / "out", "greedy", evaluate=loss, mode="min")
    # Alone 4, 1, 2, 9. From [1]: with -2 0.5, kept; with 4 as well 1.0, not; with 9 2.67, not.
    assert pytest.approx([4.0, 1.0, -2.0, 9.0, -0.5, 1.0, 8 / 3]) == CALLS
    assert [row["step"] for row in report.members] == [2, 3]
    assert torch.equal(contents(tmp_path / "out")["w"], torch.full((3,), -0.5))
    soup = report.soup
    assert soup is not None
    assert (soup.looks, soup.evaluated, soup.score, soup.best_single) == (7, 7, 0.5, 1.0)
    said = open_checkpoint(tmp_path / "out").provenance["soup"]
    assert (said["looks"], len(said["history"])) == (7, 7)


def test_an_equal_score_is_not_worse(tmp_path: Path) -> None:
    same = root(tmp_path / "same", [{"w": torch.ones(3)}, {"w": torch.ones(3)}, {"w": torch.zeros(3) + 3}])
    report = average_checkpoints(same, tmp_path / "out", "greedy", evaluate=loss, mode="min")
    assert [row["step"] for row in report.members] == [1, 2]


def test_it_can_end_as_the_best_single_checkpoint(tmp_path: Path, run: Path) -> None:
    report = average_checkpoints(run, tmp_path / "out", "greedy", evaluate=loss, mode="max")
    assert [row["step"] for row in report.members] == [4]


def test_nan_never_wins_and_never_blocks(tmp_path: Path, run: Path) -> None:
    def broken(blend: Blend) -> float:
        value = loss(blend)
        return {1.0: float("nan"), 2.0: float("-inf")}.get(value, value)

    report = average_checkpoints(run, tmp_path / "out", "greedy", evaluate=broken, mode="min")
    assert [row["step"] for row in report.members] == [1]
    with pytest.raises(ConfigError, match="measured none of 4"):
        average_checkpoints(run, tmp_path / "none", "greedy", evaluate=lambda blend: float("nan"), mode="min")


def test_scores_are_cached_by_member_set_and_evaluation(tmp_path: Path, run: Path) -> None:
    cache = tmp_path / "scores.json"
    average_checkpoints(run, tmp_path / "one", "greedy", evaluate=loss, mode="min", cache=cache)
    report = average_checkpoints(run, tmp_path / "two", "greedy", evaluate=loss, mode="min", cache=cache)
    assert len(CALLS) == 7
    assert report.soup is not None
    assert (report.soup.looks, report.soup.evaluated) == (7, 0)  # earlier looks are looks all the same
    assert len(json.loads(cache.read_text())) == 7
    average_checkpoints(run, tmp_path / "three", "greedy", evaluate="test_soup:loss", mode="min", cache=cache)
    assert len(CALLS) == 7  # the same function by its import path
    cache.write_text("{broken")
    average_checkpoints(run, tmp_path / "four", "greedy", evaluate=loss, mode="min", cache=cache)
    assert len(CALLS) == 14
    with pytest.raises(ConfigError, match="named function"):
        average_checkpoints(run, tmp_path / "x", "greedy", evaluate=lambda blend: 1.0, mode="min", cache=cache)


@pytest.mark.parametrize("path", ["no.such:fn", "test_soup:nothing", "test_soup:VALUES", "test_soup"])
def test_functions_that_are_not_there(tmp_path: Path, run: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="function"):
        average_checkpoints(run, tmp_path / "out", "greedy", evaluate=path, mode="min")


def test_errors_of_the_evaluation_come_out_as_they_are(tmp_path: Path, run: Path) -> None:
    def wrong(blend: Blend) -> float:
        raise ZeroDivisionError("no rows")

    with pytest.raises(ZeroDivisionError, match="no rows"):
        average_checkpoints(run, tmp_path / "out", "greedy", evaluate=wrong, mode="min")
    with pytest.raises(ConfigError, match="needs mode"):
        average_checkpoints(run, tmp_path / "out", "greedy", evaluate=wrong)


# ---------------------------------------------------------------- ranks


def together(rank: int, run: Path, out: Path, evaluate: Callable[[Blend], float]) -> tuple[str, object, int]:
    try:
        report = average_checkpoints(run, out, "greedy", evaluate=evaluate, mode="min", timeout_s=20.0)
    except (ReplicasDiffer, SaveFailed, ZeroDivisionError) as error:
        return type(error).__name__, str(error), len(CALLS)
    return "ok", [row["step"] for row in report.members], len(CALLS)


def by_rank(blend: Blend) -> float:
    import torch.distributed as dist

    return loss(blend) + dist.get_rank()


def fails_on_one(blend: Blend) -> float:
    import torch.distributed as dist

    return loss(blend) / (1 - dist.get_rank())


def test_ranks_evaluate_together_and_must_agree(tmp_path: Path, run: Path) -> None:
    found = run_ranks(2, together, run, tmp_path / "out", loss)
    assert found == [("ok", [2, 3], 7)] * 2
    found = run_ranks(2, together, run, tmp_path / "differ", by_rank)
    assert [kind for kind, *_ in found] == ["ReplicasDiffer"] * 2
    assert "4.0 on rank 0 and 5.0 on rank 1" in found[1][1]
    found = run_ranks(2, together, run, tmp_path / "fail", fails_on_one)
    assert [kind for kind, *_ in found] == ["SaveFailed", "ZeroDivisionError"]
    assert "rank 1" in found[0][1]


# ---------------------------------------------------------------- a blend is a model to look at


def blend_of(run: Path, steps: tuple[int, ...]) -> Blend:
    from distckpt.averaging.structure import Rules

    return Blend(open_members([Term(str(step_of(run, step))) for step in steps]), Rules())


def test_a_blend_loads_into_a_model_or_says_what_does_not_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)) for _ in range(2)]
    run = root(tmp_path / "run", [model.state_dict() for model in models])
    blend = blend_of(run, (1, 2))
    other = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).bfloat16()
    blend.load_into(other)
    exact = (models[0][1].weight + models[1][1].weight) / 2
    assert torch.equal(other[1].weight, exact.bfloat16())
    with pytest.raises(IncompatibleState, match=r"only in the model.*2\.weight"):
        blend.load_into(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2), nn.Linear(2, 2)))
    with pytest.raises(IncompatibleState, match="another shape"):
        blend.load_into(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)))


def load_sharded(rank: int, run: Path) -> bool:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    fully_shard(model)
    blend = blend_of(run, (1, 2))
    blend.load_into(model)
    return all(
        torch.equal(value.full_tensor(), blend.read(f"model.{name}")) for name, value in model.state_dict().items()
    )


def test_each_rank_loads_its_own_boxes_of_a_blend(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)) for _ in range(2)]
    run = root(tmp_path / "run", [model.state_dict() for model in models])
    assert run_ranks(2, load_sharded, run) == [True, True]
