"""What a save costs training: how long the call stalls it, and how much time it loses until the save is durable.

    python -m benchmarks.stall [--mbytes 600] [--step-ms 250] [--steps 12] [--rounds 5] [--threads N] [--modes ...]
                               [--out benchmarks/results/stall.json]

A window is a save and then so many training steps of fixed compute (matrix products, then AdamW over the whole state).
Each round runs one window of every mode, between two windows without a save, forwards in even rounds and backwards in odd
ones; the time to copy the state once in memory is probed before and after. Lost time is a window's time less that of the
round's windows without a save. A save that is not durable at the end of its window is waited for outside the clock, and the
wait is reported: it means that ``--steps`` is too small. What each save holds is compared, outside the clock, with what
was live when it was called.

Modes: ``none``; ``blocking`` (async_save) and ``lazy`` (lazy_staging) of distckpt; torch.distributed.checkpoint's
``dcp-thread`` and ``dcp-process`` with a stager and a plan that are kept, and ``dcp-staging``, its thread with staging in
the background, which is waited for before the step. All of them sync their files. The first save of each mode
allocates and plans: it is made before the rounds and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.limits import memory_copy
from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint

LAYERS = 24
SIDE = 512
"""Side of the matrices that a step multiplies."""
Row = dict[str, Any]


class Training:
    """A state of so many bytes under AdamW, and steps of fixed compute."""

    def __init__(self, nbytes: int, step_ms: float) -> None:
        torch.manual_seed(0)
        width = int((nbytes / 12 / LAYERS) ** 0.5)
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self._a, self._b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
        self.products = 1
        self.optimizer.step()
        started = time.perf_counter()
        for _ in range(20):
            self._compute()
        self.products = max(1, int(step_ms / 1e3 * 20 / (time.perf_counter() - started)))

    def _compute(self) -> None:
        for _ in range(self.products):
            torch.mm(self._a, self._b)

    def step(self, before: Any) -> float:
        """Take one step, calling ``before`` where weights are about to change; returns the seconds of the whole."""
        started = time.perf_counter()
        self._compute()
        before()
        self.optimizer.step()
        return time.perf_counter() - started

    def tensors(self) -> dict[str, torch.Tensor]:
        names = {p: n for n, p in self.model.named_parameters()}
        out = {f"model.{n}": p.detach() for p, n in names.items()}
        for parameter, state in self.optimizer.state.items():
            out |= {f"optim.state.{names[parameter]}.{key}": value for key, value in state.items()}
        return out

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Mode(Protocol):
    """One way to save in the background."""

    def save(self, step: int) -> None: ...
    def before_step(self) -> None: ...
    def wait(self) -> None: ...
    def read(self, step: int) -> dict[str, torch.Tensor]: ...
    def close(self) -> None: ...


class Nothing:
    """No save at all."""

    def save(self, step: int) -> None: ...
    def before_step(self) -> None: ...
    def wait(self) -> None: ...
    def read(self, step: int) -> dict[str, torch.Tensor]:
        return {}

    def close(self) -> None: ...


class Ours:
    """distckpt; the fence is in the optimizer's own step."""

    def __init__(self, training: Training, root: Path, *, lazy: bool) -> None:
        config = CheckpointConfig(
            root, async_save=True, lazy_staging=lazy, save_total_limit=2, preemption_signals=(), control_file=None,
            verbose=False,
        )  # fmt: skip
        self._root = root
        self._manager = CheckpointManager(config, training.model, training.optimizer)

    def save(self, step: int) -> None:
        self._manager.save(step=step)

    def before_step(self) -> None: ...

    def wait(self) -> None:
        self._manager.wait()

    def read(self, step: int) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(self._root / f"step-{step:010d}")
        return {name: checkpoint.read(name) for name in checkpoint.tensors}

    def close(self) -> None:
        self._manager.close()


class Dcp:
    """torch.distributed.checkpoint.async_save; on CPU it can neither pin memory nor copy without blocking."""

    def __init__(self, training: Training, root: Path, *, process: bool = False, staging: bool = False) -> None:
        self._training, self._root = training, root
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=process, use_async_staging=staging, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)
        self._planner = DefaultSavePlanner(enable_plan_caching=True)
        self._staged: Future[Any] | None = None
        self._saved: Future[Any] | None = None

    def save(self, step: int) -> None:
        folder = self._root / str(step)
        writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=2)
        answer = dcp.async_save(
            self._training.tensors(), storage_writer=writer, planner=self._planner, async_stager=self._stager,
            async_checkpointer_type=self._kind,
        )  # fmt: skip
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._saved = answer.staging_completion, answer.upload_completion
        else:
            self._saved = answer

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def wait(self) -> None:
        self.before_step()
        if self._saved is not None:
            self._saved.result()
            self._saved = None

    def read(self, step: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty_like(t) for name, t in self._training.tensors().items()}
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(self._root / str(step)))
        for folder in self._root.iterdir():
            shutil.rmtree(folder)
        return tensors

    def close(self) -> None:
        self._stager.close()


def modes_of(names: list[str], training: Training, folder: Path) -> dict[str, Mode]:
    kinds: dict[str, Any] = {
        "blocking": lambda root: Ours(training, root, lazy=False),
        "lazy": lambda root: Ours(training, root, lazy=True),
        "dcp-thread": lambda root: Dcp(training, root),
        "dcp-staging": lambda root: Dcp(training, root, staging=True),
        "dcp-process": lambda root: Dcp(training, root, process=True),
    }
    return {name: kinds[name](folder / name) for name in names}


def window(training: Training, mode: Mode, step: int, steps: int) -> Row:
    """Save, then train; returns seconds of the call, of the window, of each step, and of the wait that was left."""
    before = fingerprint(training.tensors())
    started = time.perf_counter()
    mode.save(step)
    stall = time.perf_counter() - started
    each = [training.step(mode.before_step) for _ in range(steps)]
    seconds = time.perf_counter() - started
    mode.wait()
    waited = time.perf_counter() - started - seconds
    found = mode.read(step)
    return {
        "stall_s": stall, "window_s": seconds, "steps_s": each, "waited_s": waited,
        "equal": fingerprint(found) == before if found else None,
    }  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    training = Training(int(args.mbytes * 1e6), args.step_ms)
    modes = modes_of(args.modes, training, folder)
    rows: list[Row] = []
    number = 0
    try:
        for name, mode in modes.items():
            number += 1
            print(f"{name}: first save {window(training, mode, number, 1)['stall_s'] * 1e3:.0f} ms", flush=True)
        for turn in range(args.rounds):
            order = list(modes.items())[:: 1 if turn % 2 == 0 else -1]
            copies = [memory_copy(training.nbytes)]
            found = []
            for name, mode in [("none", Nothing()), *order, ("none", Nothing())]:
                number += 1
                found.append({"round": turn, "mode": name, **window(training, mode, number, args.steps)})
            copies.append(memory_copy(training.nbytes))
            memcpy_s = training.nbytes / statistics.mean(copies)
            quiet = statistics.mean(row["window_s"] for row in found if row["mode"] == "none")
            for row in found:
                rows.append({**row, "memcpy_s": memcpy_s, "lost_s": row["window_s"] - quiet, "quiet_s": quiet})
            print(f"round {turn}: {training.nbytes / 1e6:.0f} MB, memcpy {memcpy_s * 1e3:.0f} ms", flush=True)
    finally:
        for mode in modes.values():
            mode.close()
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Return one row a mode: medians over its windows, p99 as the highest of fewer than a hundred."""
    out = []
    for name in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == name]
        stalls = sorted(row["stall_s"] for row in own)
        worst = stalls[min(len(stalls) - 1, int(0.99 * len(stalls)))]
        middle = {key: statistics.median(row[key] for row in own) for key in ("stall_s", "lost_s", "waited_s")}
        out.append({
            "mode": name, "windows": len(own), **middle, "stall_p99_s": worst,
            "stall_per_memcpy": statistics.median(row["stall_s"] / row["memcpy_s"] for row in own),
            "lost_per_memcpy": statistics.median(row["lost_s"] / row["memcpy_s"] for row in own),
            "lost_share": statistics.median(row["lost_s"] / row["quiet_s"] for row in own),
            "slowest_step_s": statistics.median(max(row["steps_s"]) for row in own),
            "equal": all(row["equal"] is not False for row in own),
        })  # fmt: skip
    return out


def show(rows: list[Row]) -> None:
    print(f"{'mode':12} {'stall p50':>10} {'p99':>8} {'/memcpy':>8} {'lost/save':>10} {'/memcpy':>8} {'share':>7} "
          f"{'slowest step':>13} {'left':>8}  bits")  # fmt: skip
    for row in rows:
        print(
            f"{row['mode']:12} {row['stall_s'] * 1e3:7.1f} ms {row['stall_p99_s'] * 1e3:5.0f} ms {row['stall_per_memcpy']:8.3f} "
            f"{row['lost_s'] * 1e3:7.0f} ms {row['lost_per_memcpy']:8.2f} {row['lost_share']:7.1%} "
            f"{row['slowest_step_s'] * 1e3:10.0f} ms {row['waited_s']:6.2f} s  {'equal' if row['equal'] else 'DIFFERENT'}"
        )


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Hold a gloo group of one, which DCP's background process needs."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        try:
            yield
        finally:
            dist.destroy_process_group()


def main() -> None:
    every = ["blocking", "lazy", "dcp-thread", "dcp-staging", "dcp-process"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbytes", type=float, default=600)
    parser.add_argument("--step-ms", type=float, default=250)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads of a step")
    parser.add_argument("--modes", nargs="+", choices=every, default=every)
    parser.add_argument("--folder", type=Path, default=None, help="where to save (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with process_group(), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(args, Path(folder))
    table = summary(rows)
    show(table)
    if args.out is not None:
        machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "torch": torch.__version__, "load": os.getloadavg()}
        settings = {key: value for key, value in vars(args).items() if key not in ("folder", "out")}
        result = {"machine": machine, "settings": settings, "summary": table, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"-> {args.out}")


if __name__ == "__main__":
    main()
