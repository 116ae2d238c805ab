"""Averages shared over ranks: the same bits as alone, one verdict for all, nothing committed unless all succeed."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dist"))

import layout_models
import pytest
import torch
import torch._dynamo  # optimizers and DTensor import it at their first use: once here, not in every rank
from averaging_support import contents, root, same, step_of
from ranks import run_ranks

from distckpt import CheckpointConfig, CheckpointManager, average_checkpoints, failpoints, open_checkpoint
from distckpt.cli.main import main
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.leaves import tensor_leaf
from distckpt.errors import CorruptCheckpoint, ReplicasDiffer, SaveFailed

WORLDS = (1, 2, 3)


def states(count: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    return [
        {
            "a": torch.randn(1031, 257),
            "b": torch.randn(700, 300).bfloat16(),
            "c": torch.randn(3, 5),
            "n": torch.tensor(i),
        }
        for i in range(count)
    ]


def average(rank: int, run: Path, out: Path) -> tuple[str, int]:
    report = average_checkpoints(run, out, timeout_s=30.0)
    return report.path, report.averaged


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(tmp_path: Path, shards: int) -> None:
    nbytes = 1031 * 257 * 4 + 700 * 300 * 2
    run = root(tmp_path / "run", states(3), shard_bytes=nbytes // shards)
    wanted = None
    for world in WORLDS:
        out = tmp_path / f"out-{world}"
        found = run_ranks(world, average, run, out)
        assert len(set(found)) == 1
        wanted = wanted or contents(out)
        same(contents(out), wanted)
        assert open_checkpoint(out).world_size % world == 0


def save_sharded(rank: int, kind: str, world: int, folder: Path) -> None:
    model, _ = layout_models.build(kind, rank, world)
    config = CheckpointConfig(
        folder, preemption_signals=(), control_file=None, verbose=False, threads=2, timeout_s=30.0
    )
    with CheckpointManager(config, model=model) as manager:
        manager.resume()
        for step in (1, 2):
            for name, value in model.state_dict().items():
                # A name of its own for each step; the tied pair keeps one.
                name = name.removeprefix("module.").replace("head.weight", "emb.weight")
                wanted = layout_models.reference(f"{step} {name}", tuple(value.shape), value.dtype)
                for box, part in tensor_leaf(name, value).parts:
                    part.copy_(wanted[box.slices])
            manager.save(step=step)


def average_to_one(rank: int, paths: list[Path], out: Path) -> int:
    return average_checkpoints(paths, out, threads=2, timeout_s=30.0).averaged


def test_every_layout_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    layouts = {
        "one-1": ("one", 1),
        "ddp-2": ("ddp", 2),
        "fsdp2-3": ("fsdp2", 3),
        "tp-2": ("tp", 2),
        "fsdp2+tp-4": ("2d", 4),
    }
    for name, (kind, world) in layouts.items():
        run_ranks(world, save_sharded, kind, world, tmp_path / name)
        average_checkpoints(tmp_path / name, tmp_path / f"{name}-out")
        layout = open_checkpoint(tmp_path / name).manifest
        assert open_checkpoint(tmp_path / f"{name}-out").manifest.tensors == layout.tensors  # no resharding
    wanted = contents(tmp_path / "one-1-out")
    for name in layouts:
        same(contents(tmp_path / f"{name}-out"), wanted)
    mixed = [step_of(tmp_path / "tp-2", 1), step_of(tmp_path / "fsdp2-3", 2)]
    run_ranks(2, average_to_one, mixed, tmp_path / "mixed")
    same(contents(tmp_path / "mixed"), wanted)
    run_ranks(3, average_to_one, mixed[::-1], tmp_path / "reversed")
    same(contents(tmp_path / "reversed"), wanted)


def disagree(rank: int, run: Path, out: Path) -> str:
    try:
        average_checkpoints(run, out, integers="newest" if rank == 0 else "equal", timeout_s=20.0)
    except ReplicasDiffer as error:
        return str(error)
    return "no error"


def test_ranks_that_call_it_differently_are_refused(tmp_path: Path) -> None:
    run = root(tmp_path / "run", states(2))
    found = run_ranks(2, disagree, run, tmp_path / "out")
    assert all("otherwise" in text for text in found), found
    assert not list((tmp_path / "out").glob("*/manifest*"))


def with_damage(rank: int, run: Path, out: Path) -> str:
    try:
        average_checkpoints(run, out, timeout_s=20.0)
    except CorruptCheckpoint as error:
        return f"{type(error).__name__} {error}"
    return "no error"


def test_damage_that_one_rank_reads_stops_all(tmp_path: Path) -> None:
    run = root(tmp_path / "run", states(2))
    shard = next(step_of(run, 1).glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    found = run_ranks(2, with_damage, run, tmp_path / "out")
    assert all(text.startswith("ShardError") and shard.name in text for text in found), found
    assert not list((tmp_path / "out").glob("*/manifest*"))


def killed(rank: int, run: Path, out: Path, point: str) -> str:
    logging.disable(logging.WARNING)
    if rank == 1:
        failpoints.arm(f"{point}:1:kill")
    try:
        average_checkpoints(run, out, timeout_s=1.5)
    except SaveFailed as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("point", ["writer.chunk", "writer.synced"])
def test_a_rank_that_dies_leaves_no_result(tmp_path: Path, point: str) -> None:
    run = root(tmp_path / "run", states(2))
    found = run_ranks(2, killed, run, tmp_path / "out", point, expect={1: signal.SIGKILL}, store_host="agent")
    assert "rank 1" in found[0], found
    assert not list((tmp_path / "out").glob("*/manifest*"))
    assert average_checkpoints(run, tmp_path / "out").averaged == 3  # and the root can be used


def dies(rank: int, run: Path, out: Path, point: str) -> None:
    failpoints.arm(f"{point}:1:kill")
    average_checkpoints(run, out)


@pytest.mark.parametrize(
    "point", ["writer.chunk", "shard.before_header", "writer.before_fsync", "create.temp_synced@manifest"]
)
def test_killed_in_the_middle_nothing_is_committed(tmp_path: Path, point: str) -> None:
    run = root(tmp_path / "run", states(2))
    run_ranks(1, dies, run, tmp_path / "out", point, expect={0: signal.SIGKILL}, backend=None)
    assert not list((tmp_path / "out").glob("*/manifest*"))


def test_an_agreement_of_ones_own(tmp_path: Path) -> None:
    run = root(tmp_path / "run", states(2))
    report = average_checkpoints(run, tmp_path / "out", agreement=Agreement(None, 0, 1, timeout_s=5.0))
    assert report.step == 2


def average_whole(rank: int, run: Path, out: Path) -> str:
    return average_checkpoints(run, out, include_optimizer=True, timeout_s=30.0).path


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_rank_stored_for_itself_survives_any_number_of_writers(tmp_path: Path, world: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)

    def manager(folder: Path) -> CheckpointManager:
        config = CheckpointConfig(folder, preemption_signals=(), control_file=None, verbose=False)
        return CheckpointManager(config, model=model, optimizer=torch.optim.AdamW(model.parameters()))

    with manager(tmp_path / "run") as saving:
        for step in (1, 2):
            saving.save(step=step)
    drawn = torch.rand(3)
    run_ranks(world, average_whole, tmp_path / "run", tmp_path / "out")
    torch.rand(5)
    with manager(tmp_path / "out") as resuming:
        report = resuming.resume()
    assert report is not None
    assert report.missing == []
    assert torch.equal(torch.rand(3), drawn)


def command(rank: int, run: Path, out: Path) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(["average", str(run), "--out", str(out)])
    return code, text.getvalue()


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """As torchrun starts ranks: no process group yet, a store of the agent, everything else in the environment."""
    run = root(tmp_path / "run", states(3))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    told = run_ranks(2, command, run, tmp_path / "out", backend=None, env=agent, store_host="agent")
    assert [code for code, _ in told] == [0, 0]
    assert ("average of 3" in told[0][1], told[1][1]) == (True, "")
    assert open_checkpoint(tmp_path / "out").world_size == 2
    average_checkpoints(run, tmp_path / "alone")
    same(contents(tmp_path / "out"), contents(tmp_path / "alone"))


def alone_and_together(rank: int, run: Path, out: Path) -> str:
    if rank == 0:
        average_checkpoints(run, out / "alone", agreement=Agreement(None, 0, 1, timeout_s=5.0))
    return average_checkpoints(run, out / "together", timeout_s=30.0).path


def test_what_one_rank_averages_alone_does_not_part_it_from_the_others(tmp_path: Path) -> None:
    run = root(tmp_path / "run", states(2))
    assert len(set(run_ranks(2, alone_and_together, run, tmp_path))) == 1
    same(contents(tmp_path / "together"), contents(tmp_path / "alone"))
