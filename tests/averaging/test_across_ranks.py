"""Averages over live replicas: exact and the same on all ranks under every layout; one rank's fault is all ranks' error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dist"))

import layout_models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from layout_models import Net, reference, whole
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distckpt import average_across_ranks, clock
from distckpt.averaging.buckets import checksum
from distckpt.averaging.outer import OuterStep
from distckpt.dcp.leaves import tensor_leaf
from distckpt.engines.base import clean_fqn
from distckpt.errors import AgreementError, ConfigError, DistckptError, IncompatibleState


def replicas(kind: str, rank: int) -> tuple[nn.Module, int]:
    """Return the awkward model on 4 ranks (2 for ddp) as two replicas, and which replica this rank is of."""
    net = Net(strided=kind == "ddp" and rank == 1)  # partners may differ in strides
    if kind == "ddp":
        return DistributedDataParallel(net, init_sync=False), rank
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net, mesh=mesh)
        return net, rank // 2
    if kind == "fsdp2, a mesh each":
        own = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))["shard"]  # of 2 of the 4 ranks
        for block in net.blocks.values():
            fully_shard(block, mesh=own)
        fully_shard(net, mesh=own)
        return net, rank // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "tp"))
    layout_models._tensor_parallel(net, mesh["tp"])
    return net, rank // 2


@torch.no_grad()
def fill(model: nn.Module, salt: str) -> None:
    for name, parameter in model.named_parameters():
        value = reference(f"{salt}/{clean_fqn(name)}", tuple(parameter.shape), torch.float32)
        for box, local in tensor_leaf(name, parameter).parts:
            local.copy_(value[box.slices])
    for name, buffer in model.named_buffers():
        buffer.copy_(reference(f"{salt}/{clean_fqn(name)}", tuple(buffer.shape), buffer.dtype))


def mean(name: str, like: torch.Tensor, shares: list[float]) -> torch.Tensor:
    values = [reference(f"{r}/{name}", tuple(like.shape), like.dtype) for r in range(len(shares))]
    wide = torch.complex128 if like.is_complex() else torch.float64
    return sum(share * value.to(wide) for share, value in zip(shares, values, strict=True)).to(like.dtype)  # type: ignore


def wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.complex128)


def average(rank: int, kind: str, weights: list[float] | None) -> Any:
    model, replica = replicas(kind, rank)
    model.blocks["2"].norm.bias.requires_grad_(False) if kind != "ddp" else None
    fill(model, str(replica))
    shares = [0.5, 0.5] if weights is None else [w / sum(weights) for w in weights]
    own = None if weights is None else weights[replica]
    report = average_across_ranks(model, weights=own, bucket=37, timeout_s=20.0)  # tensors are cut, and packed
    wrong = []
    for name, parameter in model.named_parameters():
        name, found = clean_fqn(name), whole(parameter).detach()
        wanted = mean(name, found, shares)
        if not parameter.requires_grad:
            wanted = reference(f"{replica}/{name}", tuple(found.shape), found.dtype)  # frozen: its own
        if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-6):
            wrong.append(name)
    for name, buffer in model.named_buffers():
        name = clean_fqn(name)
        numbers = buffer.is_floating_point() or buffer.is_complex()
        wanted = mean(name, buffer, shares) if numbers else reference(f"0/{name}", tuple(buffer.shape), buffer.dtype)
        if not (torch.allclose(wide(buffer), wide(wanted), rtol=1e-14, atol=0) if numbers else torch.equal(buffer, wanted)):
            wrong.append(name)
    tied = model.module if kind == "ddp" else model
    wrong += [] if tied.head.weight is tied.emb.weight else ["untied"]
    trained = [p for p in model.parameters() if p.requires_grad]
    locals_ = [part for p in trained for _, part in tensor_leaf("", p).parts]
    return wrong, report.tensors == len(trained), report.collectives > 5, checksum(locals_), replica


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("kind", ["ddp", "hsdp", "fsdp2, a mesh each", "tp"])
def test_every_layout_has_the_mean_and_the_same_bits(kind: str, weights: list[float] | None) -> None:
    world = 2 if kind == "ddp" else 4
    found = run_ranks(world, average, kind, weights)
    assert [f[:3] for f in found] == [([], True, True)] * world
    half = world // 2
    assert [f[3] for f in found[:half]] == [f[3] for f in found[half:]]  # the same shards of the other replica


def average_odd(rank: int) -> list[Any]:
    """Uneven and empty shards: 3 rows on 2 ranks a replica, 1 row, and none at all."""
    net = nn.ParameterDict({"three": torch.zeros(3, 2), "one": torch.zeros(1, 4), "none": torch.zeros(0, 4)})
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))["shard"])
    with torch.no_grad():
        for parameter in net.values():
            parameter.to_local().fill_(1.0 + rank // 2)
    average_across_ranks(net, timeout_s=20.0)
    return [net[name].full_tensor().tolist() for name in ("three", "one", "none")]


def test_uneven_and_empty_shards() -> None:
    assert run_ranks(4, average_odd) == [[[[1.5, 1.5]] * 3, [[1.5] * 4], []]] * 4


# ---------------------------------------------------------------- numbers


def plain(rank: int, dtype: torch.dtype = torch.float32, value: float | None = None) -> nn.Module:
    model = nn.Linear(5, 3, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(rank) if value is None else value)
    return model


def values(model: nn.Module) -> list[float]:
    return sorted({float(v) for p in model.parameters() for v in p.detach().reshape(-1)})


def low_precision(rank: int) -> Any:
    half = plain(rank, torch.float16, 40000.0)
    average_across_ranks(half)
    fine = plain(rank, torch.bfloat16, 1.0 + rank / 128)  # neighbours in bf16: their sum of four is none of them
    average_across_ranks(fine)
    same = plain(rank, torch.float32, 0.1)
    average_across_ranks(same, dtype=torch.float64)
    return values(half), values(fine), values(same) == [float(torch.tensor(0.1))]


def test_fp16_cannot_overflow_and_equal_replicas_stay_what_they_are() -> None:
    # 1, 1 + 1/128, 1 + 2/128: the mean is the middle one, which a running bf16 sum misses.
    assert run_ranks(3, low_precision) == [([40000.0], [1.0078125], True)] * 3


def many_low(rank: int, dtype: torch.dtype) -> int:
    """Return how many of 4,096 means are not the rounding of their exact values."""

    def of(rank: int) -> torch.Tensor:
        return torch.randn(64, 64, generator=torch.Generator().manual_seed(rank)).to(dtype)

    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(of(rank))
    average_across_ranks(model, weights=[1, 2, 4])
    exact = (of(0).double() + 2 * of(1).double() + 4 * of(2).double()) / 7
    return int((model.weight != exact.to(dtype)).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_narrow_weights_are_summed_wide_and_rounded_once(dtype: torch.dtype) -> None:
    # A mean in the middle of two neighbours may go to either (one in 300 here); sums in their own dtype miss every second.
    found = run_ranks(3, many_low, dtype)
    assert max(found) <= 64
    assert len(set(found)) == 1


def absent(rank: int) -> Any:
    model = plain(rank, value=float("nan") if rank == 1 else float(rank))
    report = average_across_ranks(model, weights=[1, 0, 3])
    return values(model), report.weights


def test_a_rank_of_weight_0_takes_the_mean_of_the_others_whatever_it_holds() -> None:
    assert run_ranks(3, absent) == [([1.5], (0.25, 0.0, 0.75))] * 3


def in_a_group(rank: int) -> list[float]:
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    model = plain(rank)
    for _ in range(2):
        report = average_across_ranks(model, group=groups[rank % 2], weights=1.0 + rank)
    assert report.ranks == ((0, 2) if rank != 1 else (1,))
    other = plain(rank)
    average_across_ranks(other)
    return values(model) + values(other)


def test_a_group_of_some_ranks_and_calls_that_not_all_make() -> None:
    assert run_ranks(3, in_a_group) == [[1.5, 1.0], [1.0, 1.0], [1.5, 1.0]]


def test_one_process_without_a_group() -> None:
    model = plain(3)
    report = average_across_ranks(model)
    assert (values(model), report.ranks, report.collectives) == ([3.0], (0,), 0)


class Norm(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=None)
        self.norm.train()
        self.norm(torch.tensor([[-1.0, 1000.0], [1.0, 1002.0]]) + 2.0 * rank)


def norms(rank: int, policy: str) -> Any:
    model = Norm(rank)
    if rank == 1:
        model.norm.num_batches_tracked += 4
    report = average_across_ranks(model, buffers=policy)
    norm = model.norm
    return norm.running_mean.tolist(), norm.running_var.tolist(), int(norm.num_batches_tracked), len(report.notes)


def test_buffers_by_policy() -> None:
    # Each rank's batch has variance 2; the means are 2 apart, which adds 1 to the variance of both together.
    assert run_ranks(2, norms, "average") == [([1.0, 1002.0], [3.0, 3.0], 1, 1)] * 2
    assert run_ranks(2, norms, "first") == [([0.0, 1001.0], [2.0, 2.0], 1, 1)] * 2
    keep = run_ranks(2, norms, "keep")
    assert [found[2] for found in keep] == [1, 5]
    assert keep[1][0] == [2.0, 1003.0]


# ---------------------------------------------------------------- faults


def faulty(rank: int, spoil: Callable[[int, nn.Module], dict[str, Any]]) -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(rank))
    settings = spoil(rank, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        average_across_ranks(model, **{"timeout_s": 20.0, **settings})
    except DistckptError as error:
        found = model.state_dict()
        assert all(torch.equal(found[n].nan_to_num(7.0), before[n].nan_to_num(7.0)) for n in before), "changed"
        return type(error).__name__, str(error)
    return "no error", ""


def one_nan(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        model[1].bias.data[0] = float("nan")
    return {}


def infinite(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        model[1].bias.data[0] = float("inf")
    return {}


def other_shape(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        model[1] = nn.Linear(4, 3)
    return {}


def other_names(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        del model[1].bias
        model[1].register_parameter("shift", nn.Parameter(torch.zeros(2)))
    return {}


def frozen_here(rank: int, model: nn.Module) -> dict[str, Any]:
    model[1].bias.requires_grad_(rank != 2)
    return {}


def other_dtype(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        model[1].bfloat16()
    return {}


def other_buffer(rank: int, model: nn.Module) -> dict[str, Any]:
    if rank == 2:
        model[1].register_buffer("mask", torch.ones(2))
    return {}


STRUCTURES = {
    one_nan: ["IncompatibleState", "rank 2 has weights that are NaN or infinite: 1.bias"],
    infinite: ["IncompatibleState", "rank 2 has weights that are NaN or infinite: 1.bias"],
    other_shape: ["IncompatibleState", "1.bias is float32[3] on rank 2 and float32[2] on rank 0"],
    other_names: ["IncompatibleState", "rank 2 lacks 1.bias; rank 2 alone has 1.shift"],
    frozen_here: ["IncompatibleState", "rank 2 lacks 1.bias"],
    other_dtype: ["IncompatibleState", "1.bias is bfloat16[2] on rank 2"],
    other_buffer: ["IncompatibleState", "rank 2 alone has 1.mask"],
}
CALLS: list[tuple[dict[str, Any], str, str]] = [
    ({"op": "median"}, "ConfigError", "OuterStep"),
    ({"buffers": "forget"}, "ConfigError", "forget"),
    ({"dtype": torch.float16}, "ConfigError", "float16"),
    ({"buffers": "keep"}, "ConfigError", "call it differently"),
    ({"weights": -1.0}, "ConfigError", "rank 2 has weight -1.0"),
    ({"weights": float("nan")}, "ConfigError", "rank 2 has weight nan"),
    ({"weights": [1.0, 2.0]}, "ConfigError", "2 weights for a group of 3"),
    ({"weights": [1.0, 2.0, 3.0]}, "ConfigError", "the same list everywhere"),
    ({"timeout_s": None}, "ConfigError", "timeout_s=None"),
    ({"timeout_s": float("nan")}, "ConfigError", "timeout_s=nan"),
    ({"op": OuterStep}, "ConfigError", "want 'mean' or an OuterStep"),
]


def all_faults(rank: int) -> list[Any]:
    found = [faulty(rank, spoil) for spoil in STRUCTURES]
    found += [faulty(rank, lambda r, _, settings=settings: settings if r == 2 else {}) for settings, _, _ in CALLS]
    found.append(faulty(rank, lambda r, _: {"weights": 0}))
    model = plain(rank)
    average_across_ranks(model)  # and the group can be used
    return [*found, values(model)]


def test_a_fault_of_one_rank_is_an_error_of_all_and_changes_nothing() -> None:
    wanted = [*STRUCTURES.values(), *([kind, text] for _, kind, text in CALLS), ["ConfigError", "no finite sum"]]
    for found in run_ranks(3, all_faults):
        for (kind, text), (wanted_kind, wanted_text) in zip(found[:-1], wanted, strict=True):
            assert kind == wanted_kind, text
            assert wanted_text in text
        assert found[-1] == [1.0]


def spoilt_buffers(rank: int) -> list[Any]:
    found: list[Any] = []
    for value in (float("nan"), float("inf"), None):
        model = Norm(rank)
        model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))  # infinities that belong there
        model.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
        if rank == 1 and value is not None:
            model.norm.running_mean[1] = value
            model.scale[0] = value
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            average_across_ranks(model, timeout_s=20.0)
            found.append((model.norm.running_mean.tolist(), torch.equal(model.mask, before["mask"])))
            continue
        except IncompatibleState as error:
            found.append(str(error))
        assert all(torch.equal(t.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, t in model.state_dict().items())
        average_across_ranks(model, buffers="keep", timeout_s=20.0)
        average_across_ranks(model, weights=[1, 0], timeout_s=20.0)
        found.append(model.norm.running_mean.tolist())
    return found


def test_buffers_of_one_rank_that_no_mean_can_use_are_an_error_of_all_and_change_nothing() -> None:
    for nan, healed, infinite, healed_too, (mean, kept) in run_ranks(2, spoilt_buffers):
        assert "rank 1 has buffers that are NaN: scale, norm.running_mean;" in nan
        assert "rank 1 has infinities in buffers where other ranks have other values: scale, norm.running_mean;" in infinite
        assert healed == healed_too == [0.0, 1001.0]
        assert (mean, kept) == ([1.0, 1002.0], True)


def strange_models(rank: int) -> list[Any]:
    frozen = plain(rank).requires_grad_(False)
    found = []
    for other in ("no module", frozen):
        started = clock.monotonic()
        with pytest.raises(ConfigError) as error:
            average_across_ranks(other if rank == 1 else plain(rank))  # the usual time: half an hour
        found.append((str(error.value), clock.monotonic() - started < 15.0))
    return found


def test_a_model_of_one_rank_that_cannot_be_averaged_keeps_nobody_waiting() -> None:
    for first, second in run_ranks(2, strange_models):
        assert "model=str" in first[0]
        assert "nothing to average" in second[0]
        assert first[1]
        assert second[1]


def one_replica(rank: int) -> str:
    net = nn.Linear(4, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ConfigError, match="one replica") as error:
        average_across_ranks(net, timeout_s=20.0)
    return str(error.value)


def test_shards_of_one_replica_are_not_averaged_with_each_other() -> None:
    assert "S(0)" in run_ranks(2, one_replica)[1]


def uneven_weights(rank: int) -> str:
    model, _ = replicas("hsdp", rank)
    with pytest.raises(ConfigError, match="one weight") as error:
        average_across_ranks(model, weights=1.0 + rank, timeout_s=20.0)
    return str(error.value)


def test_ranks_of_a_replica_have_one_weight() -> None:
    assert len(run_ranks(4, uneven_weights)) == 4


def stages(rank: int) -> str:
    model, _ = layout_models.build("pp", rank, 2)
    with pytest.raises(IncompatibleState, match="ranks of one stage") as error:
        average_across_ranks(model, timeout_s=20.0)
    return str(error.value)


def test_pipeline_stages_are_told_apart() -> None:
    assert all("rank 1 lacks" in text for text in run_ranks(2, stages))


def late(rank: int) -> str:
    if rank == 1:
        return ""
    started = clock.monotonic()
    with pytest.raises(AgreementError, match="rank 1") as error:
        average_across_ranks(plain(rank), timeout_s=0.5)
    assert clock.monotonic() - started < 15.0
    return type(error.value).__name__


def test_a_rank_that_does_not_come_is_named_after_the_deadline() -> None:
    assert run_ranks(2, late)[0] == "AgreementTimeout"


def dies(rank: int) -> str:
    import os

    from distckpt.averaging import across

    model = plain(rank)
    if rank == 1:
        across.pass_fences = lambda: os.kill(os.getpid(), signal.SIGKILL)  # all have agreed, nothing has moved
    with pytest.raises(AgreementError, match="partly averaged") as error:
        average_across_ranks(model, timeout_s=3.0)
    return str(error.value.in_doubt)


def test_a_rank_that_dies_in_the_middle_leaves_nobody_waiting() -> None:
    found = run_ranks(3, dies, expect={1: signal.SIGKILL}, store_host="agent")
    assert [found[0], found[2]] == ["True", "True"]
