"""One awkward model under every torch-native layout, filled with values that depend on name and place alone."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate  # noqa: F401  (import early: forks are warm)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = {
    "one-1": ("one", 1),
    "ddp-2": ("ddp", 2),
    "ddp-3": ("ddp", 3),
    "fsdp1-2": ("fsdp1", 2),
    "fsdp1-4": ("fsdp1", 4),
    "fsdp2-1": ("fsdp2", 1),
    "fsdp2-2": ("fsdp2", 2),
    "fsdp2-3": ("fsdp2", 3),
    "fsdp2-4": ("fsdp2", 4),
    "hsdp-4": ("hsdp", 4),
    "tp-2": ("tp", 2),
    "tp-3": ("tp", 3),
    "fsdp2+tp-4": ("2d", 4),
    "pp-2": ("pp", 2),
    "pp-3": ("pp", 3),
}
BUFFERS = {
    "zero_d": ((), torch.float64),
    "empty": ((0, 4), torch.float32),
    "f16": ((5, 3), torch.float16),
    "bf16": ((7,), torch.bfloat16),
    "f8": ((9, 2), torch.float8_e4m3fn),
    "f8b": ((3, 3), torch.float8_e5m2fnuz),
    "flags": ((11,), torch.bool),
    "count": ((), torch.int64),
    "unsigned": ((4,), torch.uint16),
    "wave": ((3, 2), torch.complex64),
    "wide_wave": ((2, 2), torch.complex128),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)


class Net(nn.Module):
    """Tied weights, uneven dimensions, buffers of many dtypes, and a parameter that may be non-contiguous."""

    def __init__(self, *, strided: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.blocks = nn.ModuleDict({str(i): Block() for i in range(3)})
        self.odd = nn.Parameter(torch.zeros(7, 5).t() if strided else torch.zeros(5, 7))
        self.one = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.emb.weight
        for name, (shape, dtype) in BUFFERS.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        assert self.odd.is_contiguous() != strided


def build(kind: str, rank: int, world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model under a layout with an AdamW whose state exists (all zeros)."""
    net = Net(strided=kind in ("one", "ddp", "tp", "pp"))
    model: nn.Module = net
    if kind == "ddp":
        model = DistributedDataParallel(net, init_sync=False)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for block in net.blocks.values():
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif kind == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        _tensor_parallel(net, init_device_mesh("cpu", (world,)))
    elif kind == "2d":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(net, mesh["tp"])
        fully_shard(net, mesh=mesh["dp"])
    elif kind == "pp":
        _stage(net, rank, world)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if "norm" in n], "lr": 0.5},
            {"params": [p for n, p in model.named_parameters() if "norm" not in n], "lr": 0.25},
        ]
    )
    return model, optimizer


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with zero gradients, so that optimizer state exists."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _tensor_parallel(net: Net, mesh: Any) -> None:
    plan: dict[str, Any] = {"emb": RowwiseParallel(), "head": ColwiseParallel()}
    for name in net.blocks:
        plan |= {f"blocks.{name}.up": ColwiseParallel(), f"blocks.{name}.down": RowwiseParallel()}
    parallelize_module(net, mesh, plan)
    net.head.weight = net.emb.weight


def _stage(net: Net, rank: int, world: int) -> None:
    """Keep what this pipeline stage owns: blocks in turn, the embedding first, head and loose tensors last."""
    for name in list(net.blocks):
        if int(name) % world != rank:
            del net.blocks[name]
    if rank != 0:
        net.emb = None
    if rank != world - 1:
        net.head, net.odd, net.one = None, None, None
        for name in BUFFERS:
            delattr(net, name)


def reference(fqn: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the values that a tensor of this name has: random bytes of its own, the same in every layout."""
    seed = int.from_bytes(hashlib.sha256(fqn.replace("head.weight", "emb.weight").encode()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 1000, shape, generator=generator).to(dtype)


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor gathered by torch itself, so that the check does not rest on our own geometry."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype and bit pattern."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
