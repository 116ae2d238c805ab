"""An outer step over replicas: the arithmetic of torch's SGD, the same bits everywhere, and state that moves with layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dist"))

import pytest
import torch
import torch._dynamo
from manager_support import manager
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import average_across_ranks, clock, open_checkpoint
from distckpt.averaging.outer import OuterStep
from distckpt.dcp.leaves import tensor_leaf
from distckpt.errors import ConfigError, IncompatibleState, ReplicasDiffer


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    return model


@torch.no_grad()
def drift(model: nn.Module, seed: int) -> None:
    """Move weights as training on some data would; sharded ones by their part of the same noise."""
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(tuple(parameter.shape), generator=torch.Generator().manual_seed(100 * seed + number))
        for box, local in tensor_leaf("", parameter).parts:
            local.add_(noise[box.slices].to(local.device), alpha=0.1)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()}


def reference(rounds: int, *, lr: float, momentum: float, nesterov: bool) -> dict[str, torch.Tensor]:
    """Return what torch's own SGD makes of the pseudo-gradients of two replicas."""
    anchor = net()
    sgd = torch.optim.SGD([p for p in anchor.parameters() if p.requires_grad], lr=lr, momentum=momentum, nesterov=nesterov)
    for number in range(rounds):
        moved = []
        for replica in range(2):
            model = net()
            model.load_state_dict(anchor.state_dict())
            drift(model, 2 * number + replica)
            moved.append(whole(model))
        for name, parameter in anchor.named_parameters():
            if parameter.requires_grad:
                parameter.grad = parameter.detach() - (moved[0][name] * 0.5 + moved[1][name] * 0.5)
        sgd.step()
    return whole(anchor)


def local_sgd(rank: int, sharded: bool, settings: dict[str, Any], root: Path) -> Any:
    model = net()
    if sharded:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    outer = OuterStep(model, **settings)
    for number in range(3):
        drift(model, 2 * number + (rank // 2 if sharded else rank))
        report = outer.step(bucket=11, timeout_s=20.0)
    assert report.collectives > 2
    copy = OuterStep(model, **settings)
    copy.load_state_dict(outer.state_dict())
    assert copy.steps == 3
    drift(model, 50 + (rank // 2 if sharded else rank))
    before = whole(model)
    copy.step(timeout_s=20.0)
    after = whole(model)
    for parameter, value in zip(model.parameters(), before.values(), strict=True):
        for box, local in tensor_leaf("", parameter).parts:
            local.data.copy_(value[box.slices])
    outer.step(timeout_s=20.0)
    assert all(torch.equal(after[name], value) for name, value in whole(model).items())
    with manager(root, model, stateful={"outer": outer}) as m:
        m.save(step=4)
    return after


@pytest.mark.parametrize(
    ("sharded", "settings"),
    [(False, {}), (True, {}), (False, {"lr": 0.5, "momentum": 0.8, "nesterov": False}), (False, {"lr": 1.0, "momentum": 0.0})],
)
def test_the_step_is_that_of_sgd_over_the_pseudo_gradient(sharded: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    found = run_ranks(4 if sharded else 2, local_sgd, sharded, settings, tmp_path)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    own = {"lr": 0.7, "momentum": 0.9, "nesterov": True, **settings}
    own["nesterov"] = own["nesterov"] and own["momentum"] > 0
    rounds = run_ranks(1, lambda rank: reference_with_last(own))[0]
    for name, value in rounds.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
    # The state is ordinary tensors in the model's layout: one process goes on with it.
    model = net()
    outer = OuterStep(model, **settings)
    with manager(tmp_path, model, stateful={"outer": outer}) as m:
        m.load("latest")
    assert outer.steps == 4
    stored = open_checkpoint(tmp_path).state_dict("outer.anchor.")
    assert stored.keys() == {"0.weight", "1.weight", "1.bias"}
    for name, value in stored.items():
        assert torch.equal(value, found[0][name])
        assert torch.equal(outer.state_dict()["anchor"][name], value)


def reference_with_last(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the reference after the three rounds and the one with other noise."""
    global drift
    original, seeds = drift, {6: 50, 7: 51}
    drift = lambda model, seed: original(model, seeds.get(seed, seed))  # noqa: E731
    try:
        return reference(4, **own)
    finally:
        drift = original


def different(rank: int) -> str:
    model = net()
    drift(model, rank)
    outer = OuterStep(model)
    before = whole(model)
    with pytest.raises(ReplicasDiffer, match="start from different plain tensors") as error:
        outer.step(timeout_s=20.0)
    assert all(torch.equal(before[name], value) for name, value in whole(model).items())
    average_across_ranks(model)
    outer.reset()
    assert outer.step(timeout_s=20.0).tensors == 3
    return str(error.value)


def test_replicas_that_start_apart_are_refused_before_anything_moves() -> None:
    assert len(run_ranks(2, different)) == 2


def another_model(rank: int) -> tuple[str, bool, int]:
    model = net()
    outer = OuterStep(model)
    drift(model, rank)
    before, started = whole(model), clock.monotonic()
    with pytest.raises(ConfigError, match="another model") as error:
        average_across_ranks(nn.Linear(2, 2) if rank == 1 else model, op=outer)  # the usual time: half an hour
    assert all(torch.equal(before[name], value) for name, value in whole(model).items())
    in_time = clock.monotonic() - started < 15.0
    outer.step(timeout_s=20.0)  # and the group can be used
    return str(error.value), in_time, outer.steps


def test_another_model_on_one_rank_is_an_error_of_all_at_once() -> None:
    found = run_ranks(2, another_model)
    assert [f[1:] for f in found] == [(True, 1)] * 2
    assert "rank 1" in found[0][0]


def test_wrong_use() -> None:
    model = net()
    for settings in ({"lr": 0.0}, {"momentum": 1.0}, {"lr": float("nan")}, {"dtype": torch.bfloat16}):
        with pytest.raises(ConfigError):
            OuterStep(model, **settings)
    outer = OuterStep(model)
    with pytest.raises(ConfigError, match="another model"):
        average_across_ranks(net(), op=outer)
    with pytest.raises(IncompatibleState, match=r"1\.bias"):
        outer.load_state_dict({**outer.state_dict(), "anchor": {}})
    with pytest.raises(IncompatibleState, match="progress"):
        outer.load_state_dict({**outer.state_dict(), "progress": {}})
    average_across_ranks(model, op=outer)
    assert outer.steps == 1


def test_a_checkpoint_without_it_begins_again(tmp_path: Path) -> None:
    model = net()
    with manager(tmp_path, model) as m:
        m.save(step=1)
    drift(model, 1)
    outer = OuterStep(model)
    with manager(tmp_path, model, stateful={"outer": outer}) as m:
        report = m.load("latest", strict=False)
    assert report.rederived == ["outer: not in the checkpoint; begins again from the loaded weights"]
    assert torch.equal(outer.state_dict()["anchor"]["1.bias"], net()[1].bias)


def on_device(rank: int, device: str, offload: bool) -> dict[str, torch.Tensor]:
    """Return weights and a buffer after two outer steps and a plain mean, of a model on a device that is still at work."""
    if device != "cpu":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    model = net()
    model.register_buffer("level", torch.zeros(9))
    model.to(device)
    outer = OuterStep(model, device="cpu" if offload else None)
    for number in range(3):
        if device != "cpu":
            torch.cuda._sleep(50_000_000)  # what follows has not run when the call below looks at the weights
        drift(model, 2 * number + rank)
        with torch.no_grad():
            model.level.add_(1.0 + rank)
        settings: dict[str, Any] = {"bucket": 7, "timeout_s": 60.0}
        report = outer.step(**settings) if number < 2 else average_across_ranks(model, **settings)
        assert (report.tensors, report.buffers) == (3, 1)
        assert report.collectives > 8  # 59 elements of weights, at most 7 at a time
        with torch.no_grad():
            for parameter in model.parameters():  # at once, on the stream that training uses
                parameter.mul_(0.5)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def compare_with_the_host(backend: str, world: int, device: str) -> None:
    for offload in (True, False):
        wanted = run_ranks(world, on_device, "cpu", offload)[0]
        found = run_ranks(world, on_device, device, offload, backend=backend, timeout_s=120)
        for own in found:
            assert own.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)
                assert torch.equal(own[name], found[0][name])


def test_the_comparison_of_devices_holds_on_the_host() -> None:
    compare_with_the_host("gloo", 2, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "world"), [("nccl", 1), ("gloo", 2)])  # NCCL wants a device for each rank, gloo does not
def test_on_a_gpu_means_and_outer_steps_are_what_they_are_on_the_host(backend: str, world: int) -> None:
    # In a process of its own: ranks are forked, and this process may have looked for a device, which no fork survives.
    call = f"import test_outer_step; test_outer_step.compare_with_the_host({backend!r}, {world}, 'cuda')"
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here, os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
