"""What the ranks of ``benchmarks.zero`` do: the engine under test, and each timed operation of DeepSpeed's and of ours.

Every operation begins at a barrier, after dirty pages of whatever ran before were written back, and ends when the last
rank is done. Making ranks, models and engines, and comparing values, is outside the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed_support  # of tests/: DeepSpeed on the CPU, without compiling anything
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as convert_to_universal
from deepspeed.utils.tensor_fragment import safe_get_local_fp32_param, safe_get_local_optimizer_state
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from safetensors.torch import load_file
from torch import nn

from benchmarks.limits import drop_caches
from distckpt import CheckpointConfig, CheckpointManager
from distckpt.export.huggingface import export_huggingface
from distckpt.importers.convert import convert
from distckpt.importers.source import Options, open_distckpt
from distckpt.storage.direct import anonymous

WIDTH = 1024
"""Of GPT-2 medium; a real model has the same layers, only more of them."""
STATES = ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12
"""Of the state that has to be kept: fp32 master and two fp32 moments. The bf16 weights are their rounding."""


class Block(nn.Module):
    """The parameters of a transformer block, used one after the other so that each has a gradient everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(torch.tanh(q + k) + v)
        return x + self.down(nn.functional.gelu(self.up(x)))


def build_model(nbytes: int) -> nn.Module:
    """Return a model with about ``nbytes`` of fp32 masters and moments."""
    each = sum(p.numel() for p in Block().parameters())
    return nn.Sequential(*(Block() for _ in range(max(1, round(nbytes / BYTES_PER_PARAMETER / each)))))


def state_bytes(nbytes: int) -> int:
    """Return the exact bytes of masters and moments of ``build_model(nbytes)``."""
    return BYTES_PER_PARAMETER * sum(p.numel() for p in build_model(nbytes).parameters())


def build_engine(stage: int, nbytes: int, *, seed: int, universal: bool = False) -> Any:
    """Return an engine in bf16 with fp32 masters and AdamW; nothing is equal between two seeds."""
    torch.manual_seed(seed)
    model = build_model(nbytes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    more: dict[str, Any] = {"checkpoint": {"load_universal": True}} if universal else {}
    return deepspeed_support.initialize(
        model, optimizer, {"stage": stage}, micro_batch=1, bf16={"enabled": True}, **more
    )


def train_step(engine: Any) -> None:
    """Take one step, on other data on every rank."""
    x = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    engine.backward(engine(x).float().square().mean())
    engine.step()


# ---------------------------------------------------------------------- values, as DeepSpeed itself keeps them


def fingerprint(engine: Any) -> dict[str, int]:
    """Return, for every master, moment and bf16 weight, a sum of its bits weighted by position.

    The sum is over all ranks, modulo 2**64, so it does not depend on how the values are partitioned. Collective.
    """
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        for key, (start, values) in _mine(engine, parameter).items():
            sums[f"{name}.{key}"] = _weighted(values, start)
    names = sorted(sums)
    total = torch.stack([sums[name] for name in names])
    dist.all_reduce(total)
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return dict(zip(names, total.tolist(), strict=True)) | {"step": max(steps), "steps": len(steps)}


def _mine(engine: Any, parameter: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Return this rank's elements of a parameter by kind, and where they begin in it."""
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.ds_numel
        start = size * dist.get_rank()
        held = max(0, min(size, parameter.ds_numel - start))  # the rest of the last partition is padding
        found = {"master": safe_get_local_fp32_param(parameter), "weight": parameter.ds_tensor.detach()}
        found |= {key: safe_get_local_optimizer_state(parameter, key) for key in STATES}
        return {key: (start, value.flatten()[:held]) for key, value in found.items()}
    rank, world = dist.get_rank(), dist.get_world_size()
    weight = parameter.detach().flatten()
    low, high = rank * weight.numel() // world, (rank + 1) * weight.numel() // world
    out = {key: (0, torch.empty(0)) for key in ("master", *STATES)} | {"weight": (low, weight[low:high])}
    if getattr(parameter, "_hp_mapping", None) is not None:
        mapping, wrapper = parameter._hp_mapping, engine.optimizer
        flat = wrapper.single_partition_of_fp32_groups[0]
        place = mapping.hp_fragment_address
        for key, tensor in {"master": flat, **{k: wrapper.optimizer.state[flat][k] for k in STATES}}.items():
            out[key] = (mapping.lp_fragment_address.start, tensor.detach().narrow(0, place.start, place.numel))
    return out


def _weighted(values: torch.Tensor, start: int) -> torch.Tensor:
    bits = values.contiguous().view(torch.int16 if values.itemsize == 2 else torch.int32).long()
    return (bits * (torch.arange(start, start + values.numel()) * 2_654_435_761 + 1)).sum()


# ---------------------------------------------------------------------- the clock


def timed(work: Callable[[], Any], nbytes: int) -> dict[str, Any]:
    """Run ``work`` on all ranks at once; wall seconds to the last rank, and CPU seconds of all ranks and their children.

    ``work`` may return moments of its own by name: each becomes ``<name>_seconds``. ``nbytes`` of free memory are
    touched before, whoever is measured.
    """
    _touch(nbytes)
    many = dist.is_initialized() and dist.get_world_size() > 1
    os.sync()
    if many:
        dist.barrier()
    cpu, started = _cpu(), time.perf_counter()
    marks = work() or {}
    row: Any = (started, time.perf_counter(), _cpu() - cpu, marks)
    rows: list[Any] = [row]
    if many:
        rows = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
    first = min(r[0] for r in rows)  # CLOCK_MONOTONIC: one clock for all processes
    out = {f"{name}_seconds": max(r[3][name] for r in rows) - first for name in marks}
    return {"seconds": max(r[1] for r in rows) - first, "cpu_seconds": sum(r[2] for r in rows), **out}


def _touch(nbytes: int) -> None:
    """Touch free memory, in small and in huge pages, and give it back.

    A virtual machine's host takes free memory away; to get it back, page by page, costs more than reading a disk, and
    whom it hits is chance.
    """
    once = bytes(-(-nbytes // mmap.PAGESIZE))
    small, huge = mmap.mmap(-1, nbytes), anonymous(nbytes)
    small[:: mmap.PAGESIZE] = huge[:: mmap.PAGESIZE] = once
    small.close()


def _cpu() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def files_of(folder: Path) -> list[Path]:
    """Return all files under a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def evict(folder: Path) -> int:
    """Drop a folder's files from the page cache; returns the pages that stayed (0: the next read is cold)."""
    for _ in range(5):
        left = drop_caches(files_of(folder))
        if not left:
            break
        time.sleep(0.2)
    return left


def sync_tree(folder: Path, *, share: int = 0, of: int = 1) -> None:
    """fsync this rank's share of the files and folders under ``folder``, itself and its parent included."""
    paths = [*files_of(folder), *sorted(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent]
    for path in paths[share::of]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's scripts from printing."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


# ---------------------------------------------------------------------- on every rank


def _config(root: Path) -> CheckpointConfig:
    return CheckpointConfig(root, save_total_limit=None, preemption_signals=(), control_file=None, verbose=False)


def save_session(rank: int, stage: int, nbytes: int, folder: Path, order: list[tuple[str, int]]) -> dict[str, Any]:
    """Train a step, save in this order (peer, number), and return a row for each save and the state's fingerprint."""
    engine = build_engine(stage, nbytes, seed=1)
    train_step(engine)
    saved = fingerprint(engine)
    rows = []
    with CheckpointManager(_config(folder / "ours"), engine=engine) as manager:
        for peer, number in order:
            if peer == "ours":
                rows.append(timed(lambda n=number: manager.save(step=n) and None, nbytes))
            else:
                rows.append(timed(lambda n=number: _save_natively(engine, folder / "native", str(n)), nbytes))
            rows[-1] |= {"what": "save", "peer": peer, "number": number, "first": number == 1}
    assert fingerprint(engine) == saved, "a save changed the state"
    return {"rows": rows, "fingerprint": saved}


def _save_natively(engine: Any, folder: Path, tag: str) -> dict[str, float]:
    engine.save_checkpoint(str(folder), tag=tag)
    returned = time.perf_counter()
    dist.barrier()
    sync_tree(folder, share=dist.get_rank(), of=dist.get_world_size())
    return {"returned": returned}


def load_session(rank: int, stage: int, nbytes: int, peer: str, folder: Path, tag: str) -> dict[str, Any]:
    """Load cold into a new engine. ``peer``: ``native``, ``universal`` or ``ours``."""
    engine = build_engine(stage, nbytes, seed=7, universal=peer == "universal")
    resident = torch.tensor(evict(folder) if rank == 0 else 0)
    dist.all_reduce(resident)

    managers = []

    def load() -> None:
        if peer == "ours":
            managers.append(CheckpointManager(_config(folder), engine=engine))
            managers[0].load(int(tag))
        else:
            assert engine.load_checkpoint(str(folder), tag=tag)[0] is not None, "nothing was loaded"

    row = timed(load, nbytes)
    for manager in managers:
        manager.close()
    return {**row, "resident_pages": int(resident), "fingerprint": fingerprint(engine)}


def to_universal(rank: int, stage: int, source: Path, target: Path) -> dict[str, Any]:
    """Convert a native checkpoint with DeepSpeed's script at its own defaults, cold; its output is not made durable."""
    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=4, num_merge_workers=2,
        keep_temp_folder=False, strict=True, inject_missing_state=stage < 3,
    )  # fmt: skip
    resident = evict(source)
    with quiet():
        row = timed(lambda: convert_to_universal(options), stored_bytes(source))
    return {**row, "resident_pages": resident, "bytes": stored_bytes(target)}


def export(rank: int, peer: str, source: Path, tag: str, target: Path) -> dict[str, Any]:
    """Write fp32 weights as one safetensors file, durably. ``ours+verify`` also reads back every byte."""
    resident = evict(source)

    def work() -> None:
        if peer == "native":
            convert_zero_checkpoint_to_fp32_state_dict(
                str(source), str(target), max_shard_size=None, safe_serialization=True, tag=tag
            )
            sync_tree(target)
        elif peer == "ours":
            tensors = open_distckpt(str(source), Options(step=int(tag), optimizer=False)).tensors
            weights = {name.removeprefix("model."): s for name, s in tensors.items() if name.startswith("model.")}
            export_huggingface(weights, target)
        else:
            convert(source, target, to="huggingface", step=int(tag), optimizer=False)

    with quiet():
        row = timed(work, stored_bytes(source))
    return {**row, "resident_pages": resident, "fingerprint": _exported(target)}


def _exported(folder: Path) -> dict[str, int]:
    tensors = load_file(folder / "model.safetensors")
    return {f"{name}.master": int(_weighted(value.flatten(), 0)) for name, value in tensors.items()}


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def modules_after(rank: int, work: Callable[..., Any], *args: Any) -> list[str]:
    """Run one of the above and return the modules that are loaded then, for the parent to import before it forks."""
    work(rank, *args)
    return sorted(sys.modules)
