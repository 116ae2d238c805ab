"""Averages of local shards under every torch layout and ZeRO stage: the same numbers, no communication, any layout next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import LAYOUTS, build, reference, same_bits, whole
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from distckpt import CheckpointConfig, CheckpointManager, EMAModel, open_checkpoint
from distckpt.dcp.leaves import TensorLeaf, tensor_leaf
from distckpt.engines.base import clean_fqn

TORCH = ["ddp-2", "fsdp2-3", "fsdp2-4", "hsdp-4", "tp-3", "fsdp2+tp-4", "pp-2"]


def manager(root: Path, **objects: Any) -> CheckpointManager:
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, threads=2, timeout_s=30,
                              max_consecutive_failures=0)  # fmt: skip
    return CheckpointManager(config, **objects)


@torch.no_grad()
def fill(model: torch.nn.Module, salt: str) -> None:
    """Put values in place that depend on salt and name; whether they lie right, torch's own gathering tells later."""
    for name, parameter in model.named_parameters():
        value = reference(f"{salt}/{clean_fqn(name)}", tuple(parameter.shape), torch.float32)
        for box, local in tensor_leaf(name, parameter).parts:
            local.copy_(value[box.slices])


def wrong_parameters(model: torch.nn.Module, wanted: Any) -> list[str]:
    """Return the names of parameters that, gathered by torch itself, are not ``wanted(name, shape)``."""
    wrong = []
    for name, parameter in model.named_parameters():
        found = whole(parameter).detach()
        if not torch.allclose(found, wanted(clean_fqn(name), tuple(found.shape)), rtol=1e-6, atol=1e-7):
            wrong.append(name)
    return wrong


def mean(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return (reference(f"a/{name}", shape, torch.float32) + reference(f"b/{name}", shape, torch.float32)) / 2


def average(rank: int, name: str, root: Path) -> list[str]:
    kind, world = LAYOUTS[name]
    model, optimizer = build(kind, rank, world)
    fill(model, "a")
    ema = EMAModel(model, decay=0.5)
    fill(model, "b")
    with CommDebugMode() as communication:
        assert ema.update()
    wrong = [] if communication.get_total_counts() == 0 else ["communicated"]
    with ema.averaged():
        wrong += wrong_parameters(model, mean)
    wrong += [f"after: {n}" for n in wrong_parameters(model, lambda n, s: reference(f"b/{n}", s, torch.float32))]
    for fqn, value in ema.state_dict()["shadow"].items():
        if isinstance(value, DTensor):  # shapes and strides are the parameters', also of uneven and empty shards
            parameter = dict(model.named_parameters())[fqn]
            assert (value.shape, value.stride(), value.placements) == (parameter.shape, parameter.stride(), parameter.placements)
            wrong += [] if torch.allclose(value.full_tensor(), mean(fqn, tuple(value.shape)), atol=1e-6) else [f"state {fqn}"]
    with manager(root, model=model, optimizer=optimizer, stateful={"ema": ema}) as m:
        m.save(step=1)
    fill(model, "c")
    ema.reset()
    with manager(root, model=model, optimizer=optimizer, stateful={"ema": ema}) as m:
        m.load(1, prove=True)
    with ema.averaged():
        wrong += [f"loaded: {n}" for n in wrong_parameters(model, mean)]
    return wrong


@pytest.mark.parametrize("name", TORCH)
def test_every_torch_layout(name: str, tmp_path: Path) -> None:
    assert run_ranks(LAYOUTS[name][1], average, name, tmp_path) == [[]] * LAYOUTS[name][1]
    found = open_checkpoint(tmp_path).state_dict("ema.")
    assert "head.weight" in found
    for fqn, value in found.items():
        if value.is_floating_point() and fqn in ("emb.weight", "blocks.1.up.weight", "odd", "one", "blocks.2.norm.bias"):
            torch.testing.assert_close(value, mean(fqn, tuple(value.shape)), rtol=1e-6, atol=1e-7)
    if name != "pp-2":
        assert same_bits(found["head.weight"], found["emb.weight"])


def refused(rank: int) -> str:
    model, _ = build("fsdp1", rank, 2)
    with pytest.raises(ValueError, match="fully_shard") as error:
        EMAModel(model)
    return str(error.value)


def test_fsdp1_is_refused_by_name() -> None:
    assert "FSDP2" in run_ranks(2, refused)[0]


def evaluate_in_a_swap(rank: int) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)
    ema = EMAModel(model, decay=0.5)
    x = torch.ones(2, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        ema.update()
        before = model(x).sum()
        with ema.averaged():
            inside = model(x).sum()  # leaves weights unsharded, which are the averaged ones
        after = model(x).sum()
    ema.update()  # and so does this forward pass: the average must not take gathered weights for its shards
    return [float(before), float(inside), float(after)]


def test_weights_that_forward_left_unsharded_are_not_stale() -> None:
    for before, inside, after in run_ranks(2, evaluate_in_a_swap):
        assert before == after != inside


def disagree(rank: int, how: str, root: Path) -> str:
    model, _ = build("ddp", rank, 2)
    ema = EMAModel(model, decay=0.9 if how == "count" or rank else 0.99)
    for number in range(3):
        ema.update(skipped=how == "count" and rank == 1 and number == 1)
    with manager(root, model=model, stateful={"ema": ema}) as m, pytest.raises(Exception, match="'ema' differs") as error:
        m.save(step=1)
    return type(error.value).__name__


@pytest.mark.parametrize("how", ["count", "decay"])
def test_ranks_that_disagree_are_an_error_for_all(how: str, tmp_path: Path) -> None:
    assert len(set(run_ranks(2, disagree, how, tmp_path))) == 1
    assert not list(tmp_path.glob("step-*/manifest-*"))


def diverge(rank: int, root: Path) -> str:
    model, _ = build("ddp", rank, 2)
    fill(model, "a")
    ema = EMAModel(model, decay=0.9)
    with torch.no_grad():
        model.module.odd.add_(rank)
    ema.update()
    fill(model, "a")
    with manager(root, model=model, stateful={"ema": ema}) as m, pytest.raises(Exception, match=r"ema\.odd \(ranks") as error:
        m.save(step=1)
    return type(error.value).__name__


def test_averages_of_replicas_that_drifted_apart_are_an_error_for_all(tmp_path: Path) -> None:
    assert len(set(run_ranks(2, diverge, tmp_path))) == 1


def test_leaves_of_an_average_are_the_weights_own_layout() -> None:
    model = torch.nn.Linear(3, 2)
    leaf = EMAModel(model).leaves("ema").tensors["ema.weight"]
    assert isinstance(leaf, TensorLeaf)
    assert (leaf.fqn, leaf.dtype, leaf.shape, leaf.layout) == ("ema.weight", "float32", (2, 3), None)
