"""Checkpoints to compare: of given arrays under given layouts, and the same state in every format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import builders
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from distckpt.analysis.diff import Diff, TensorDiff
from distckpt.format.lineage import create_generation, ensure_root
from distckpt.storage import open_store

Arrays = Mapping[str, np.ndarray]
FORMATS = ("distckpt", "dcp", "huggingface", "torch")


def saved(where: Path | str, tensors: Arrays, *, step: int = 1, **more: Any) -> str:
    """Commit arrays as a step of a root (``world``, ``cut``, ``dtypes``, ... as builders take them)."""
    store = open_store(where)
    if not list(store.list("generations")):
        ensure_root(store)
        create_generation(store, resumed_from=None, owner="test")
    committed = builders.build_checkpoint(store, step, tensors=tensors, **more)
    return f"{where}/{committed.folder}"


def weights(seed: int = 0, rows: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.layers.0.up.weight": rng.standard_normal((rows, 24)).astype(np.float32),
        "model.layers.0.up.bias": rng.standard_normal(rows).astype(np.float32),
        "model.scale": np.array(rng.standard_normal(), np.float64),
        "model.empty": np.zeros((0, 3), np.float32),
        "model.count": np.array(7 + seed, np.int64),
    }


def written(folder: Path, kind: str, tensors: Arrays) -> str:
    """Write a model's arrays in one of ``FORMATS``, by that format's own writer."""
    folder.mkdir(parents=True)
    if kind == "distckpt":
        return saved(folder / "root", tensors, world=3)
    values = {name.removeprefix("model."): torch.from_numpy(np.array(a)) for name, a in tensors.items()}
    if kind == "dcp":
        dcp.save({"model": values}, checkpoint_id=folder / "dcp", no_dist=True)
        return str(folder / "dcp")
    if kind == "torch":
        torch.save(values, folder / "weights.pt")
        return str(folder / "weights.pt")
    save_file(values, folder / "model.safetensors")
    return str(folder)


def by_name(found: Diff) -> dict[str, TensorDiff]:
    return {tensor.name: tensor for tensor in found.tensors}


def flags_of(found: Diff) -> dict[str, tuple[str, ...]]:
    return {flag.kind: flag.names for flag in found.flags}
