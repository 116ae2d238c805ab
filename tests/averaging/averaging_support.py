"""Small checkpoints with given tensors, of every kind, and their exact means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distckpt import open_checkpoint
from distckpt.export.stream import Stream
from distckpt.importers.commit_source import commit_source
from distckpt.importers.source import Source

Tensors = Mapping[str, torch.Tensor]


def root(
    folder: Path,
    steps: Sequence[Tensors],
    *,
    aliases: Mapping[str, str] | None = None,
    config: Any = None,
    metrics: Sequence[Mapping[str, float]] = (),
    shard_bytes: int = 1 << 20,
) -> Path:
    """Write one checkpoint a step (1, 2, ...) of tensors named without ``model.``; small shards make several files."""
    for number, tensors in enumerate(steps, 1):
        source = Source("torch", "made", step=number, config=config)
        for name, tensor in tensors.items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = str(tensor.dtype).removeprefix("torch.")
            source.tensors[full(name)] = Stream(dtype, tuple(tensor.shape), lambda a, b, data=data: data[a:b])
        source.aliases = {full(n): full(t) for n, t in (aliases or {}).items()}
        source.metrics = dict(metrics[number - 1]) if metrics else {}
        commit_source(source, folder, shard_bytes=shard_bytes)
    return folder


def full(name: str) -> str:
    return name if name.startswith(("model.", "ema.", "optim.")) else f"model.{name}"


def step_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010d}"


def mean(values: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """Return the mean in fp64, rounded once; for half formats through fp32, which holds such sums exactly enough."""
    weights = weights or [1.0] * len(values)
    total = sum(w / sum(weights) * v.double() for w, v in zip(weights, values, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(values[-1].dtype)


def contents(path: Path | str, prefix: str = "model.") -> dict[str, torch.Tensor]:
    found = open_checkpoint(path)
    assert found.verify("full").ok
    return found.state_dict(prefix)


def same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8) if tensor.dim() else found[name],
                           tensor.view(torch.uint8) if tensor.dim() else tensor), name  # fmt: skip
