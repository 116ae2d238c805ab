"""Real DeepSpeed checkpoints (ZeRO 1 to 3, two ranks, bf16) into distckpt, against DeepSpeed's own idea of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, IncompatibleState
from distckpt.format.checkpoint import Checkpoint, open_checkpoint
from distckpt.importers.convert import convert, kind_of

pytest.importorskip("deepspeed")
JOB = Path(__file__).with_name("deepspeed_job.py")
STAGES = ["z1", "z2", "z3", "z1-elastic"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every configuration on two ranks; returns the folder of all."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(2)]
    jobs = [
        subprocess.Popen([sys.executable, str(JOB), str(r), "2", str(folder)], env=environment, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [job.wait(150) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    texts = [Path(log.name).read_text()[-3000:] for log in logs]
    assert codes == [0, 0], "\n".join(texts)
    return folder


@pytest.fixture(scope="module")
def imported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {}
    for name in (*STAGES, "z1-universal", "z3-universal"):
        target = tmp_path_factory.mktemp("imported") / name
        report = convert(saved / name, target)
        assert report.source == ("universal" if "universal" in name else "deepspeed")
        found[name] = open_checkpoint(target)
    return found


def live(saved: Path, name: str) -> dict[str, Any]:
    return torch.load(saved / f"{name}.live.pt", weights_only=True)


@pytest.mark.parametrize("name", STAGES)
def test_weights_equal_those_of_zero_to_fp32(saved: Path, imported: dict[str, Checkpoint], name: str) -> None:
    expected = live(saved, name)["fp32"]
    found = imported[name].state_dict()
    # zero_to_fp32 gives stage 1 no frozen parameters, and casts buffers.
    assert set(expected) | {"frozen.weight", "frozen.bias"} == set(found)
    for fqn, tensor in expected.items():
        same = found[fqn].float() if fqn in ("mean", "frozen.weight", "frozen.bias") else found[fqn]
        assert torch.equal(same, tensor.float() if same.is_floating_point() else tensor), fqn


@pytest.mark.parametrize("name", ["z1", "z3", "z1-elastic"])
def test_masters_equal_the_live_ones(saved: Path, imported: dict[str, Checkpoint], name: str) -> None:
    for fqn, tensor in live(saved, name)["weights"].items():
        found = imported[name].read(f"model.{fqn}")
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor), fqn


def test_masters_in_round_robin_order_are_those_of_the_low_precision_weights(
    saved: Path, imported: dict[str, Checkpoint]
) -> None:
    # DeepSpeed's live accessors mix parameters up under round_robin_gradients; the weights that it trained tell.
    module = torch.load(saved / "z2/global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
    found = imported["z2"].state_dict()
    assert all(torch.equal(found[fqn].to(tensor.dtype), tensor) for fqn, tensor in module.items())


@pytest.mark.parametrize("name", STAGES)
def test_frozen_weights_buffers_and_ties_are_as_they_trained(imported: dict[str, Checkpoint], name: str) -> None:
    found = imported[name]
    assert found.read("model.frozen.weight").dtype == torch.bfloat16
    assert torch.equal(found.read("model.counts"), torch.arange(5))
    assert torch.equal(found.read("model.mean"), torch.linspace(0, 1, 3))
    assert found.manifest.aliases["model.head.weight"] == "model.embed.weight"
    assert found.manifest.aliases["optim.state.head.weight.exp_avg"] == "optim.state.embed.weight.exp_avg"
    assert not any(name.startswith("optim.state.frozen") for name in found.manifest.tensors)


def test_optimizer_state_equals_the_live_one_of_stage_3(saved: Path, imported: dict[str, Checkpoint]) -> None:
    for fqn, states in live(saved, "z3")["state"].items():
        for key, tensor in states.items():
            assert torch.equal(imported["z3"].read(f"optim.state.{fqn}.{key}"), tensor), (fqn, key)
            assert tensor.abs().sum() > 0


@pytest.mark.parametrize("name", ["z1", "z3"])
def test_optimizer_state_equals_what_ds_to_universal_wrote(
    saved: Path, imported: dict[str, Checkpoint], name: str
) -> None:
    found, seen = imported[name], 0
    for file in (saved / f"{name}-universal/global_step2/zero").glob("*/exp_avg*.pt"):
        content = torch.load(file, weights_only=True)
        expected = content["param"] if isinstance(content, dict) else content
        tensor = found.read(f"optim.state.{file.parent.name}.{file.stem}")
        assert torch.equal(tensor.reshape(expected.shape), expected)
        seen += 1
    assert seen == 10


@pytest.mark.parametrize("name", STAGES)
def test_steps_groups_counters_scheduler_and_client_state(imported: dict[str, Checkpoint], name: str) -> None:
    found = imported[name]
    step = found.read("optim.state.layer.bias.step")
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 2.0)
    groups = found.objects["optim.param_groups"]
    assert {"embed.weight", "layer.weight", "back.weight"} == set(groups[0]["params"])
    assert {"scale", "layer.bias"} == set(groups[1]["params"])
    if name != "z1-elastic":  # elastic files hold no settings
        assert (groups[0]["weight_decay"], groups[1]["lr"], groups[0]["betas"]) == (0.1, 1e-3, (0.9, 0.999))
    counters = found.objects["engine.deepspeed"]
    assert {k: counters[k] for k in ("global_steps", "global_samples", "skipped_steps", "micro_steps")} == {
        "global_steps": 2, "global_samples": 8, "skipped_steps": 0, "micro_steps": 2,
    }  # fmt: skip
    assert counters["loss_scale"] == {"cur_scale": 1.0, "dynamic": False}
    assert found.objects["scheduler"]["last_epoch"] == 2
    assert found.objects["extra_state"] == {"note": "hello", "epoch": 3, "pair": (1, 2.5)}
    assert (found.step, found.epoch) == (2, 3)
    assert found.provenance["imported_from"] == "deepspeed"
    assert found.verify("full").ok


@pytest.mark.parametrize("name", ["z1", "z3"])
def test_universal_gives_the_same_as_native(imported: dict[str, Checkpoint], name: str) -> None:
    native, universal = imported[name], imported[f"{name}-universal"]
    assert native.manifest.tensors.keys() == universal.manifest.tensors.keys()
    assert native.manifest.aliases == universal.manifest.aliases
    for fqn in native.manifest.tensors:
        a, b = native.read(fqn), universal.read(fqn)
        assert a.dtype == b.dtype, fqn
        assert torch.equal(a, b), fqn
    settings = [
        [{**g, "params": sorted(g["params"])} for g in c.objects["optim.param_groups"]] for c in (native, universal)
    ]
    assert settings[0] == settings[1]


def test_a_plain_model_and_optimizer_resume_from_it(imported: dict[str, Checkpoint], tmp_path: Path) -> None:
    sys.path.insert(0, str(JOB.parent))
    from deepspeed_job import Tiny, groups

    from distckpt import CheckpointConfig, CheckpointManager

    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=1.0)
    found = imported["z3"]
    root = found.store.root  # type: ignore[attr-defined]
    config = CheckpointConfig(root, preemption_signals=(), verbose=False, strict=False)
    with CheckpointManager(config, model=model, optimizer=optimizer) as manager:
        manager.load("latest", load_rng_state=False)
    assert torch.equal(model.layer.weight, found.read("model.layer.weight"))
    assert torch.equal(optimizer.state[model.scale]["exp_avg"], found.read("optim.state.scale.exp_avg"))
    assert optimizer.state[model.embed.weight]["step"].item() == 2
    assert optimizer.param_groups[1]["lr"] == 1e-3


# ---------------------------------------------------------------- what is not whole


def copied(saved: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / name, tmp_path / name))


@pytest.mark.parametrize("name", ["z2", "z3"])
def test_a_missing_rank_is_named_and_nothing_is_written(saved: Path, tmp_path: Path, name: str) -> None:
    folder = copied(saved, name, tmp_path)
    (folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match="saved by \\[2\\] ranks, 1 optimizer files"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_optimizer_files_weights_come_in_their_own_dtype(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "z1", tmp_path)
    for file in folder.glob("*/*optim_states.pt"):
        file.unlink()
    convert(folder, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    module = torch.load(folder / "global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
    for fqn, tensor in module.items():
        assert torch.equal(found.read(f"model.{fqn}"), tensor)
    assert not any(name.startswith("optim.") for name in (*found.manifest.tensors, *found.objects))


def test_stage_3_without_optimizer_files_has_no_weights(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "z3", tmp_path)
    for file in folder.glob("*/*optim_states.pt"):
        file.unlink()
    with pytest.raises(CorruptCheckpoint, match="nowhere whole"):
        convert(folder, tmp_path / "out")


def test_weights_alone_on_request(saved: Path, tmp_path: Path) -> None:
    convert(saved / "z3", tmp_path / "out", optimizer=False)
    found = open_checkpoint(tmp_path / "out")
    assert found.read("model.layer.weight").dtype == torch.float32
    assert not any(name.startswith("optim.") for name in (*found.manifest.tensors, *found.objects))


def test_steps_and_tags(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "z1", tmp_path)
    convert(folder, tmp_path / "a", step=2)
    convert(folder / "global_step2", tmp_path / "b")
    with pytest.raises(CheckpointNotFound, match="global_step7"):
        convert(folder, tmp_path / "c", step=7)
    (folder / "latest").write_text("../../etc")
    assert not (tmp_path / "c").exists()
    with pytest.raises(CheckpointNotFound, match="no such folder"):
        convert(folder, tmp_path / "c", kind="deepspeed")


def test_tensor_parallel_shards_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "z1", tmp_path)
    tag = folder / "global_step2"
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(IncompatibleState, match="mp_rank_01"):
        convert(folder, tmp_path / "out")


def test_kinds_are_told_apart(saved: Path) -> None:
    assert kind_of(saved / "z1") == kind_of(saved / "z3/global_step2") == "deepspeed"
    assert kind_of(saved / "z1-universal") == kind_of(saved / "z1-universal/global_step2") == "universal"
