"""From rows to medians and ratios. A ratio to a limit needs the probe of its own turn: without it there is none."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import OURS, is_dcp
from benchmarks.zero_report import cpu_model, file_system

Row = Mapping[str, Any]
LIMITS = {
    "first save": "write", "save": "write", "cold load": "read", "warm load": "copy", "background": "copy",
    "first background": "copy", "same layout": "read", "reshard": "read", "resume": "read", "increment": "write",
    "first save after resume": "write", "steady save after resume": "write", "train": "copy",
    "load": "read", "save + reshard": "", "ema update": "triad", "ema stall": "copy", "average": "average",
}  # fmt: skip
"""Part: the limit that it is a fraction of. Of ``background`` and ``train`` it is the stall, not the whole."""
STALLS = {
    "background": "free_seconds", "first background": "free_seconds", "train": "stall_seconds", "ema stall": "stall_seconds",
}  # fmt: skip
PACKAGES = ("torch", "numpy", "safetensors", "xxhash", "torch_checkpointing", "torchsnapshot", "deepspeed")


class NoProbe(ValueError):
    """A ratio to a limit was asked for, of a row that has no probe of that limit from its own turn."""


def machine(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the figures depend on; no path and no name of the machine."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "kind": "machine", "cores": os.cpu_count(), "cpu": cpu_model(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "kernel": platform.release(),
        "file_system": file_system(folder), "python": platform.python_version(), "versions": found,
        "governor": governor.read_text().strip() if governor.exists() else "unknown",
        "load_average": os.getloadavg(), "settings": dict(settings),
    }  # fmt: skip


# ---------------------------------------------------------------------- one row


def fraction_of_limit(row: Row, kind: str = "") -> float:
    """Return the row's share of its limit: 1.0 is the raw machine. A stall: the copy's time over the stall's.

    ``kind``: another limit than the usual one of the row's part. Raises ``NoProbe`` where the row has no probe of that
    limit, before and after, and ``ValueError`` where it has no time.
    """
    kind = kind or LIMITS.get(row["part"], "")
    if not kind or kind not in row.get("limit", {}) or len(row.get("probes", ())) != 2:
        raise NoProbe(
            f"{row['workload']}, {row['part']}, {row['peer']}: no probe of {kind or 'any limit'} in this turn"
        )
    seconds = row.get(STALLS.get(row["part"], "seconds"))
    if not seconds:
        raise ValueError(f"{row['workload']}, {row['part']}, {row['peer']}: no time was measured")
    return float(row["nbytes"] / row["limit"][kind] / seconds)


def lost_seconds(row: Row) -> float:
    """Return the training time that each save of a window has cost; raises ``NoProbe`` without steps without saves."""
    if "steps" not in row.get("limit", {}) or len(row.get("probes", ())) != 2:
        raise NoProbe(f"{row['workload']}, {row['peer']}: no steps without saves in this turn")
    return float((row["seconds"] - row["steps"] / row["limit"]["steps"]) / row["saves"])


# ---------------------------------------------------------------------- many rows


@dataclass(frozen=True)
class Summary:
    """One peer at one part of one workload: medians of the turns that count, or the reason why there are none."""

    workload: str
    part: str
    world: int
    peer: str
    rows: tuple[Row, ...] = ()
    error: str = ""
    void: int = 0
    """Turns that were void."""
    only_void: bool = False
    wrong: str = ""
    """What a comparison of loaded bytes has found."""

    def median(self, key: str) -> float | None:
        """Return the median of a field over the turns; None if the peer failed or has it nowhere."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def seconds(self) -> float | None:
        return self.median("seconds")

    def spread(self) -> str:
        values = [row["seconds"] for row in self.rows]
        return f"{min(values):.3f} – {max(values):.3f}" if values else ""

    def fraction(self, kind: str = "") -> float | None:
        """Return the median share of the limit; None if a turn lacks its probe or nothing was measured."""
        try:
            return statistics.median(fraction_of_limit(row, kind) for row in self.rows) if self.rows else None
        except ValueError:
            return None

    def limit(self, kind: str) -> float | None:
        """Return the median of a limit, bytes a second; None if no turn has probed it."""
        found = [row["limit"][kind] for row in self.rows if kind in row.get("limit", {})]
        return statistics.median(found) if found else None

    def lost(self) -> float | None:
        """Return the median of lost training seconds a save."""
        try:
            return statistics.median(lost_seconds(row) for row in self.rows) if self.rows else None
        except ValueError:
            return None

    def cpu_per_gb(self) -> float | None:
        """Return CPU seconds per 10^9 bytes of state."""
        values = [row["cpu_seconds"] / row["nbytes"] * 1e9 for row in self.rows if "cpu_seconds" in row]
        return statistics.median(values) if values else None


@dataclass
class Results:
    """All rows of a run."""

    rows: Sequence[Row]
    machine: Row = field(default_factory=dict)

    @property
    def absent(self) -> dict[str, str]:
        """Return peers that could not be used, and why."""
        return {row["peer"]: row["error"] for row in self.rows if row.get("kind") == "absent"}

    @property
    def versions(self) -> dict[str, str]:
        return {row["peer"]: row["version"] for row in self.rows if row.get("kind") == "peer"}

    def summaries(self) -> list[Summary]:
        """Return one summary per workload, part, world and peer, in the order in which they were measured."""
        groups: dict[tuple[str, int, str, str], list[Row]] = {}
        for row in self.rows:
            if row.get("kind") == "row":
                groups.setdefault((row["workload"], row["world"], row["part"], row["peer"]), []).append(row)
        order = {key: i for i, key in enumerate(dict.fromkeys(key[:3] for key in groups))}
        return [summary(*key, rows) for key, rows in sorted(groups.items(), key=lambda item: order[item[0][:3]])]

    def one(self, workload: str, part: str, peer: str = OURS, world: int = 1) -> Summary:
        """Return one summary; empty if nothing was measured, with the reason if the peer is absent."""
        rows = [
            r for r in self.rows
            if r.get("kind") == "row" and (r["workload"], r["part"], r["peer"], r["world"]) == (workload, part, peer, world)
        ]  # fmt: skip
        if not rows and peer in self.absent:
            return Summary(workload, part, world, peer, error=f"absent: {self.absent[peer]}")
        return summary(workload, world, part, peer, rows)

    def best(
        self, workload: str, part: str, peers: Iterable[str], world: int = 1, key: str = "seconds"
    ) -> Summary | None:
        """Return the fastest of these peers at a part; None if none of them has a figure."""
        found = [self.one(workload, part, peer, world) for peer in peers]
        timed = [(value, s) for s in found if (value := s.median(key)) is not None and not s.wrong]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    def dcp(self) -> list[str]:
        """Return the settings of DCP that were measured."""
        return sorted({row["peer"] for row in self.rows if row.get("kind") == "row" and is_dcp(row["peer"])})


def summary(workload: str, world: int, part: str, peer: str, rows: Sequence[Row]) -> Summary:
    """Condense rows. One error among them is the result: figures of before it are not shown."""
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        return Summary(workload, part, world, peer, error=errors[-1])
    valid = [row for row in rows if not row["void"]]
    wrong = next((row["check"] for row in rows if row.get("check", "equal") != "equal"), "")
    warm_cold = next((f"{row['resident_pages']} pages were cached" for row in rows if row.get("resident_pages")), "")
    return Summary(
        workload, part, world, peer, tuple(valid or rows), "", len(rows) - len(valid), bool(rows) and not valid,
        wrong or warm_cold,
    )  # fmt: skip


# ---------------------------------------------------------------------- what is shown

SHOWN = (
    "first save", "save", "cold load", "warm load", "background", "train", "same layout", "reshard", "increment",
    "first save after resume", "steady save after resume", "resume", "ema update", "ema stall", "average",
)  # fmt: skip
HEADINGS = (
    "workload", "ranks", "part", "peer", "median s", "min – max", "GB/s slowest rank", "of limit", "best DCP ÷ this",
    "CPU-s/GB", "extra MB", "written", "read", "requests", "notes",
)  # fmt: skip


def lines(results: Results, parts: Sequence[str] = SHOWN) -> list[list[str]]:
    """Return the table, one list of cells a line, in the order of ``HEADINGS``."""
    out = []
    for s in results.summaries():
        if s.part not in parts and not s.workload.startswith("ZeRO-"):
            continue
        best = results.best(s.workload, s.part, results.dcp(), s.world) if s.part != "train" else None
        ratio = best.seconds / s.seconds if best is not None and best.seconds and s.seconds else None
        nbytes = s.median("nbytes") or 0.0
        steps = s.part == "train"  # a window of training: its wall time is not that of a transfer
        cells = [
            s.workload, str(s.world), s.part, s.peer, _number(s.seconds, 3), s.spread(),
            "" if steps else _number(s.median("min_rank_bytes_s"), 2, 1e9), _share(s), f"{ratio:.2f}×" if ratio else "",
            "" if steps else _number(s.cpu_per_gb(), 2), _number(s.median("peak_extra_bytes"), 0, 1e6),
            _share_of(s.median("written_bytes"), nbytes), _share_of(s.median("read_bytes"), nbytes),
            _number(s.median("requests"), 0), notes(s),
        ]  # fmt: skip
        out.append(cells)
    return out


def _share(s: Summary) -> str:
    if not s.rows or not LIMITS.get(s.part):
        return ""
    share = s.fraction()
    return f"{share:.2f}" if share is not None else "no probe"


def _share_of(value: float | None, nbytes: float) -> str:
    return f"{value / nbytes:.2f}×" if value is not None and nbytes else ""


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return f"{value / unit:.{digits}f}" if value is not None else ""


def notes(s: Summary) -> str:
    """Return what must be known beside the figures."""
    found = [f"failed: {s.error}"] if s.error else []
    found += [f"WRONG: {s.wrong}"] if s.wrong else []
    for key, text in (("free_seconds", "stall"), ("stall_seconds", "stall"), ("durable_seconds", "durable after")):
        value = s.median(key)
        found += [f"{text} {value:.3f} s"] if value is not None else []
    lost = s.lost() if s.part == "train" else None
    found += [f"lost {lost:.3f} s a save"] if lost is not None else []
    if s.void:
        found.append(f"{s.void} void" + (", no other" if s.only_void else ""))
    return "; ".join(found)


def table(results: Results, console: Console | None = None) -> None:
    """Print all summaries, and the peers that are absent."""
    console = console or Console(width=230)
    shown = Table(title="medians; limits probed around each turn", show_lines=False)
    for name in HEADINGS:
        left = name in ("workload", "part", "peer", "notes")
        shown.add_column(name, justify="left" if left else "right", overflow="fold")
    before = None
    for cells in lines(results):
        if before is not None and cells[:3] != before:
            shown.add_section()
        before = cells[:3]
        shown.add_row(*cells)
    console.print(shown)
    for peer, error in results.absent.items():
        console.print(f"{peer}: absent: {error}", markup=False, soft_wrap=True)


def read_results(path: Path) -> Results:
    """Read the JSON lines of a run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    facts = next((row for row in rows if row["kind"] == "machine"), {})
    return Results([row for row in rows if row["kind"] != "machine"], facts)
