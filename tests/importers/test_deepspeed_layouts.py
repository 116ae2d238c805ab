"""Layouts of DeepSpeed's files that today's version does not write, or not here: made by hand, for any world size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.errors import CorruptCheckpoint
from distckpt.format.checkpoint import open_checkpoint
from distckpt.importers.convert import convert

GROUPS = [{"a": (3, 5), "b": (2,), "c": (1,)}, {"d": (7, 2, 2), "e": ()}]
GAPS = [[1, 0, 3], [0, 5]]


def tensors(offset: float) -> dict[str, torch.Tensor]:
    out, at = {}, offset
    for group in GROUPS:
        for name, shape in group.items():
            out[name] = torch.arange(at, at + math.prod(shape)).reshape(shape)
            at += 1000
    return out


def write(folder: Path, optimizers: list[dict[str, Any]], **more: Any) -> None:
    folder.mkdir(parents=True)
    model = {
        "module": {name: tensor.bfloat16() for name, tensor in tensors(0).items()}, "param_shapes": GROUPS,
        "buffer_names": [], "shared_params": {}, "global_steps": 4, "ds_config": {"gradient_accumulation_steps": 3}, **more,
    }  # fmt: skip
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank, optimizer in enumerate(optimizers):
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, file)


def flat(offset: float, index: int, gaps: bool, world: int) -> tuple[torch.Tensor, int]:
    """Return a group's padded vector, and how much padding is at its end."""
    parts = []
    for (name, _), gap in zip(GROUPS[index].items(), GAPS[index], strict=True):
        parts += [tensors(offset)[name].reshape(-1).float(), torch.full((gap if gaps else 0,), -1.0)]
    whole = torch.cat(parts)
    padding = -whole.numel() % world
    return torch.cat([whole, torch.full((padding,), -2.0)]), padding


def optimizers(world: int, form: str) -> list[dict[str, Any]]:
    """``today``; ``oldest``: no paddings are noted, and the last partition is cut short; ``bf16``: padding is saved."""
    out = []
    for rank in range(world):
        weights, state, paddings = [], {}, []
        for index in range(2):
            for offset, key in ((0.0, "fp32"), (0.25, "exp_avg")):
                whole, padding = flat(offset, index, form == "today", world)
                size = whole.numel() // world
                mine = whole[rank * size : (rank + 1) * size]
                kept = max(0, min(size, whole.numel() - padding - rank * size))
                if key == "fp32":
                    weights.append((mine if form == "bf16" else mine[:kept]).clone())
                    paddings.append(size - kept)
                else:
                    state[index] = {key: mine.clone()}
        groups = [{"lr": 0.5, "step": 4, "params": [index]} for index in range(2)]
        one: dict[str, Any] = {
            "base_optimizer_state": {"state": state, "param_groups": groups}, "partition_count": [world] * 2,
            "single_partition_of_fp32_groups": weights,
        }  # fmt: skip
        if form == "today":
            one |= {"group_paddings": paddings, "param_alignment_paddings": GAPS, "zero_stage": 2}
        if form == "bf16":
            one["group_paddings"] = paddings
        out.append(one)
    return out


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=st.integers(1, 9), form=st.sampled_from(["today", "oldest", "bf16"]))
def test_stages_1_and_2(tmp_path_factory: pytest.TempPathFactory, world: int, form: str) -> None:
    folder = tmp_path_factory.mktemp("layout")
    write(folder / "global_step4", optimizers(world, form))
    convert(folder / "global_step4", folder / "out")
    found = open_checkpoint(folder / "out")
    for name, tensor in tensors(0).items():
        assert torch.equal(found.read(f"model.{name}"), tensor.float()), name
        assert torch.equal(found.read(f"optim.state.{name}.exp_avg"), tensors(0.25)[name].float()), name
        # The fused optimizers count in the group; torch's want it with each parameter.
        assert found.read(f"optim.state.{name}.step").item() == 4
    assert [g["params"] for g in found.objects["optim.param_groups"]] == [["a", "b", "c"], ["d", "e"]]
    assert found.objects["engine.deepspeed"]["micro_steps"] == 12


@pytest.mark.parametrize("damage", ["short", "shapes", "count"])
def test_partitions_that_do_not_fit(tmp_path: Path, damage: str) -> None:
    states = optimizers(3, "today")
    more: dict[str, Any] = {}
    if damage == "short":
        states[1]["single_partition_of_fp32_groups"][0] = states[1]["single_partition_of_fp32_groups"][0][:-1].clone()
    elif damage == "shapes":
        more["param_shapes"] = [GROUPS[0], {**GROUPS[1], "f": (100,)}]
        for state in states:
            state["param_alignment_paddings"] = [GAPS[0], [*GAPS[1], 0]]
    else:
        states = states[:2]
    write(tmp_path / "ds", states, **more)
    with pytest.raises(CorruptCheckpoint):
        convert(tmp_path / "ds", tmp_path / "out")
    assert not (tmp_path / "out").exists()
