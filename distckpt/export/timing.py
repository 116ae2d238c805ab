"""How long a batch takes and how much memory it needs: figures for the record, never a reason to refuse."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch

from distckpt import clock
from distckpt.export.feeds import Inputs
from distckpt.export.outcome import Latency
from distckpt.export.runners import Run, shape_text

_WARM: int = 2
_STATUS = Path("/proc/self/status")


def measure(model: str, run: Run, inputs: Inputs, *, runs: int, budget_s: float = 10.0) -> Latency:
    """Run one batch ``runs`` times (at least 3, and no longer than about ``budget_s``) after two that do not count."""
    for _ in range(_WARM):
        run(inputs)
    peak = peak_bytes(run, inputs)
    taken: list[float] = []
    deadline = clock.Deadline.after(budget_s)
    while len(taken) < 3 or (len(taken) < runs and not deadline.passed):
        start = clock.monotonic()
        run(inputs)
        taken.append(clock.monotonic() - start)
    rows = next(iter(inputs.values())).shape[0]
    p50, p95 = map(float, np.quantile(taken, (0.5, 0.95)))
    per_second = rows * len(taken) / max(1e-9, sum(taken))
    return Latency(model, rows, shape_text(inputs), len(taken), p50 * 1e3, p95 * 1e3, per_second, peak)


def peak_bytes(run: Run, inputs: Inputs) -> int | None:
    """Return how far memory rises during one call: of the GPU if it is used, else of this process (Linux alone)."""
    if any(value.is_cuda for value in inputs.values()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        return int(torch.cuda.max_memory_allocated() - before)
    with contextlib.suppress(OSError, ValueError, KeyError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again: man proc_pid_clear_refs
        before = _kib("VmRSS")
        run(inputs)
        return max(0, _kib("VmHWM") - before) * 1024
    return None


def _kib(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0])
