"""Averaging K checkpoints: ours beside an eager loop and a per-tensor one, and beside the disk's own limit.

    python -m benchmarks.average [--k 2 8 32] [--mbytes 750] [--rounds 5] [--dtype bfloat16] [--out results/average.json]

``--mbytes``: what is read and written in one average, so that every K moves as many bytes. Each round does, for each K,
every kind once, in turning order; each in a new process, with files that are not in the page cache (checked page by
page). The limit is what direct reads of the same files and a durable direct write of one would take, probed before and
after each round of a K; where the probes differ by more than a quarter, the round is void and done again, at most
``--again`` times. Results are compared with the mean in fp64 outside the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.average_job import KINDS
from benchmarks.limits import disk_read, disk_write, drop_caches
from benchmarks.zero_report import cpu_model, file_system
from distckpt import open_checkpoint
from distckpt.export.stream import Stream
from distckpt.importers.commit_source import commit_source
from distckpt.importers.source import Source

VOID = 0.25
LAYERS = 8
Row = dict[str, Any]


def write_checkpoints(folder: Path, count: int, nbytes: int, dtype: torch.dtype) -> list[Path]:
    """Write roots of one step each, as a transformer's weights: few large tensors and many small; return their shards."""
    shards = []
    width = 256
    rows = max(1, nbytes // dtype.itemsize // width // (LAYERS * 4))
    for number in range(count):
        torch.manual_seed(number)
        tensors = {
            f"model.layers.{i}.{part}.weight": torch.randn(rows, width).to(dtype)
            for i in range(LAYERS)
            for part in "qkvo"
        }
        tensors |= {f"model.layers.{i}.norm.weight": torch.randn(width).to(dtype) for i in range(LAYERS)}
        source = Source("torch", "made", step=number + 1)
        for name, tensor in tensors.items():
            data = tensor.view(torch.uint8).numpy().data.cast("B")
            source.tensors[name] = Stream(str(dtype)[6:], tuple(tensor.shape), lambda a, b, data=data: data[a:b])
        written = commit_source(source, folder / f"{number:02}")
        shards += sorted(Path(written.path).glob("*/*.safetensors"))
    return shards


def run_one(kind: str, out: Path, shards: list[Path], small: list[Path]) -> Row:
    """Run one kind in a new process on cold files."""
    environment = {**os.environ, "SMALL": os.pathsep.join(map(str, small))}
    command = [sys.executable, "-m", "benchmarks.average_job", kind, str(out), *map(str, shards)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        resident = drop_caches(shards)
        child.stdin.write("go\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    if child.returncode:
        raise SystemExit(f"{kind} ended with {child.returncode}")
    return {"kind": kind, "resident_pages": resident, **json.loads(answer)}


def greatest_error(kind: str, out: Path, wanted: dict[str, torch.Tensor]) -> float:
    """Return how far a result is from the fp64 mean, in units of half the spacing at the largest value."""
    found = open_checkpoint(out).state_dict("") if kind == "ours" else load_file(out / "model.safetensors")
    worst = 0.0
    for name, value in found.items():
        exact = wanted[name]
        spacing = torch.finfo(value.dtype).eps * exact.abs().max()
        worst = max(worst, float((value.double() - exact).abs().max() / spacing))
    return worst


def mean_of(shards: list[Path]) -> dict[str, torch.Tensor]:
    totals: dict[str, torch.Tensor] = {}
    for shard in shards:
        for name, value in load_file(shard).items():
            totals[name] = totals.get(name, torch.zeros(())) + value.double()
    return {name: total / len(shards) for name, total in totals.items()}


def measure(args: argparse.Namespace, folder: Path, k: int, number: int, rows: list[Row]) -> None:
    """Do one round of one K: every kind once between two probes of the disk."""
    dtype = getattr(torch, args.dtype)
    each = int(args.mbytes * 1e6 / (k + 1))
    shards = write_checkpoints(folder / "sources", k, each, dtype)
    small = write_checkpoints(folder / "small", 2, 1 << 20, dtype)
    wanted = mean_of(shards)
    read_bytes, written_bytes = sum(s.stat().st_size for s in shards), shards[0].stat().st_size

    def probe() -> dict[str, float]:
        return {"read": disk_read(shards), "write": disk_write(folder, written_bytes)}

    for attempt in range(1 + args.again):
        before, found = probe(), []
        for kind in KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]:
            found.append(run_one(kind, folder / "out", shards, small))
            found[-1]["error"] = greatest_error(kind, folder / "out", wanted)
            shutil.rmtree(folder / "out")
        after = probe()
        void = any(abs(after[p] - before[p]) > VOID * min(after[p], before[p]) for p in before)
        limit = sum(2 * n / (before[p] + after[p]) for p, n in (("read", read_bytes), ("write", written_bytes)))
        about = {"k": k, "round": number, "attempt": attempt, "void": void, "limit_seconds": limit,
                 "probes": [before, after], "bytes": read_bytes + written_bytes, "load_average": os.getloadavg()[0]}  # fmt: skip
        rows += [{**row, **about} for row in found]
        shown = ", ".join(f"{r['kind']} {r['seconds']:.2f} s" for r in found)
        print(
            f"round {number} K={k}: limit {limit:.2f} s, {shown}{' VOID' if void else ''}", file=sys.stderr, flush=True
        )
        if not void:
            break
    shutil.rmtree(folder / "sources")
    shutil.rmtree(folder / "small")


def summaries(rows: list[Row]) -> list[Row]:
    """Return one record per K and kind: medians, the share of the raw limit, and the ratio to ours."""
    out = []
    for k in sorted({row["k"] for row in rows}):
        for kind in KINDS:
            here = [row for row in rows if (row["k"], row["kind"]) == (k, kind)]
            used = [row for row in here if not row["void"]] or here
            seconds = statistics.median(row["seconds"] for row in used)
            mine = [row["seconds"] for row in rows if (row["k"], row["kind"]) == (k, "ours")]
            out.append({
                "k": k, "kind": kind, "samples": len(used), "void": len(here) - len(used), "seconds": seconds,
                "of_raw_limit": statistics.median(row["limit_seconds"] / row["seconds"] for row in used),
                "peak_extra_mib": max(row["peak_extra_bytes"] for row in used) / 2**20,
                "cpu_seconds": statistics.median(row["cpu_seconds"] for row in used),
                "times_ours": seconds / statistics.median(mine),
                "error_in_spacings": max(row["error"] for row in used),
                "cold": all(row["resident_pages"] == 0 for row in used),
            })  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--mbytes", type=float, default=750, help="read and written by one average, in MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", type=int, default=2, help="how often a void round is repeated")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the folder for temporary files)")
    parser.add_argument("--out", type=Path, help="where all rows go, as JSON lines")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        facts = {
            "cores": os.cpu_count(),
            "cpu": cpu_model(),
            "file_system": file_system(Path(scratch)),
            "torch": str(torch.__version__),
            "settings": {name: getattr(args, name) for name in ("k", "mbytes", "rounds", "dtype")},
        }
        for number in range(args.rounds):
            for k in args.k:
                measure(args, Path(scratch), k, number, rows)
    done = summaries(rows)
    for record in done:
        print(
            f"K={record['k']:<3} {record['kind']:<11} {record['seconds']:6.2f} s  {record['of_raw_limit']:.2f} of the raw limit"
            f"  +{record['peak_extra_mib']:.0f} MiB  {record['times_ours']:.2f} x ours  error {record['error_in_spacings']:.2f}"
        )
    if args.out is not None:
        records = [{"record": "machine", **facts}, *({"record": "row", **r} for r in rows)]
        records += [{"record": "summary", **s} for s in done]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
