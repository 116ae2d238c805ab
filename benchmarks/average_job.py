"""One average in a process of its own, for ``benchmarks.average``: seconds, processor time, most memory beyond the start.

    python -m benchmarks.average_job KIND OUT SHARD... (the K files with the weights; ours takes their step folders)

All kinds read the same files (a shard is plain safetensors) and end durably. Imports, a first call of everything on a
small example, and what they keep in memory come before the clock.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distckpt.averaging.average import average_checkpoints

KINDS = ("ours", "eager", "per-tensor")


def ours(shards: list[Path], out: Path) -> None:
    average_checkpoints([shard.parents[1] for shard in shards], out)


def eager(shards: list[Path], out: Path) -> None:
    """Load all, sum in fp32, divide, save: the loop that people write."""
    loaded = [load_file(shard) for shard in shards]
    mean = {}
    for name, first in loaded[0].items():
        total = first.float()
        for other in loaded[1:]:
            total += other[name]
        mean[name] = total.div_(len(loaded)).to(first.dtype)
    _save(mean, out)


def per_tensor(shards: list[Path], out: Path) -> None:
    """One tensor at a time from lazily opened files, summed in fp32, outputs kept until written, as mergekit's linear merge."""
    files = [safe_open(shard, "pt") for shard in shards]
    mean = {}
    for name in files[0].keys():  # noqa: SIM118
        tensors = [file.get_tensor(name) for file in files]
        mean[name] = torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0].dtype)
    _save(mean, out)


def _save(tensors: dict[str, torch.Tensor], out: Path) -> None:
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    for path in (out / "model.safetensors", out):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


WORK: dict[str, Callable[[list[Path], Path], None]] = {"ours": ours, "eager": eager, "per-tensor": per_tensor}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measured(kind: str, shards: list[Path], out: Path) -> dict[str, Any]:
    """Run one kind and return what it took."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    base, started = _memory("VmRSS"), time.perf_counter()
    WORK[kind](shards, out)
    seconds = time.perf_counter() - started
    end = resource.getrusage(resource.RUSAGE_SELF)
    used = end.ru_utime + end.ru_stime - cpu.ru_utime - cpu.ru_stime
    return {"seconds": seconds, "cpu_seconds": used, "peak_extra_bytes": _memory("VmHWM") - base}


def main() -> None:
    kind, out, *shards = sys.argv[1:]
    small = [Path(shard) for shard in os.environ["SMALL"].split(os.pathsep)]
    scratch = Path(tempfile.mkdtemp(dir=Path(out).parent))
    WORK[kind](small, scratch / "warm")
    shutil.rmtree(scratch)
    print(flush=True)  # ready: the parent empties the page cache, then says go
    sys.stdin.readline()
    print(json.dumps(measured(kind, list(map(Path, shards)), Path(out))))


if __name__ == "__main__":
    main()
