"""Medians of ``benchmarks.zero``, beside the raw limit of the same minutes, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("save", "load", "reshard", "save + reshard", "export")
PACKAGES = ("torch", "deepspeed", "safetensors", "numpy", "msgspec")


def machine(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the figures depend on; no path and no name of the machine."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    kept = ("ranks", "to", "rounds", "mbytes", "stages", "again", "state_bytes")
    return {
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "memory_bytes": pages * page,
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg(),
        "settings": {name: settings[name] for name in kept},
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds ``folder``."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, found, *_ = line.split()
        inside = where == "/" or folder.resolve().is_relative_to(where)
        if inside and len(where) >= len(best):
            best, kind = where, found
    return kind


def limit_seconds(row: Mapping[str, Any], state_bytes: int) -> float:
    """Return what the raw disk would need for the bytes that this part cannot do without.

    A save writes, a load reads the masters and both moments once; an export reads and writes the masters.
    """
    write = state_bytes / row["raw_write_bytes_s"] if "raw_write_bytes_s" in row else 0.0
    read = state_bytes / row["raw_read_bytes_s"] if "raw_read_bytes_s" in row else 0.0
    return (write + read) / 3 if row["what"] == "export" else write + read


def summaries(rows: Sequence[Mapping[str, Any]], state_bytes: int) -> list[dict[str, Any]]:
    """Return one record per stage, part and peer: median, least, most, and the ratios of medians."""
    out: list[dict[str, Any]] = []
    for stage in sorted({row["stage"] for row in rows}):
        for what in PARTS:
            here = [row for row in rows if row["stage"] == stage and row["what"] == what]
            for peer in dict.fromkeys(sorted((row["peer"] for row in here), key=("native ours ours+verify").find)):
                out.append(_summary(stage, what, peer, [r for r in here if r["peer"] == peer], state_bytes))
    native = {(s["stage"], s["what"]): s["median"] for s in out if s["peer"] == "native"}
    for record in out:
        base = native.get((record["stage"], record["what"]))
        record["times_faster_than_native"] = base / record["median"] if base else None
    return out


def _summary(stage: int, what: str, peer: str, rows: Sequence[Mapping[str, Any]], state_bytes: int) -> dict[str, Any]:
    valid = [row for row in rows if not row["void"]]
    used = valid or rows
    seconds = [row["seconds"] for row in used]
    record: dict[str, Any] = {
        "stage": stage, "what": what, "peer": peer, "samples": len(used), "void": len(rows) - len(valid),
        "only_void": not valid, "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
        "cpu_seconds": statistics.median(row["cpu_seconds"] for row in used),
        "equal": all(row.get("equal", True) for row in rows),
        "cold": all(row.get("resident_pages", 0) == 0 for row in used),
    }  # fmt: skip
    if what != "save + reshard":
        record["limit"] = statistics.median(limit_seconds(row, state_bytes) for row in used)
        record["times_limit"] = statistics.median(row["seconds"] / limit_seconds(row, state_bytes) for row in used)
    for extra in ("returned_seconds", "convert_seconds", "load_seconds", "bytes"):
        values = [row[extra] for row in used if extra in row]
        if values:
            record[extra] = statistics.median(values)
    firsts = {True: "first", False: "steady"}
    for flag, name in firsts.items() if what == "save" else ():
        values = [row["seconds"] for row in used if row["first"] is flag]
        record[name] = statistics.median(values) if values else None
    return record


def write(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the machine, then all rows, then the summaries, one JSON object a line."""
    records = [{"kind": "machine", **facts}, *({"kind": "row", **row} for row in rows)]
    records += [{"kind": "summary", **s} for s in summaries(rows, facts["settings"]["state_bytes"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_rounded(record)) + "\n" for record in records))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def table(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the summaries."""
    settings = facts["settings"]
    title = (
        f"{settings['state_bytes'] / 1e6:.0f} MB of fp32 masters and moments, {settings['ranks']} ranks (resharded to "
        f"{settings['to']}), {settings['rounds']} rounds; {facts['cores']} cores, {facts['file_system']}"
    )
    shown = Table(title=title)
    for name in ("ZeRO", "part", "who", "median s", "min – max", "CPU s", "÷ raw limit", "native ÷ this", "notes"):
        shown.add_column(name, justify="left" if name in ("part", "who", "notes") else "right")
    for s in summaries(rows, settings["state_bytes"]):
        faster, times = s["times_faster_than_native"], s.get("times_limit")
        shown.add_row(
            str(s["stage"]), s["what"], s["peer"], f"{s['median']:.2f}", f"{s['min']:.2f} – {s['max']:.2f}",
            f"{s['cpu_seconds']:.2f}", f"{times:.2f}" if times else "", f"{faster:.2f}×" if faster else "", _notes(s),
            end_section=s["what"] == PARTS[-1] and s["peer"] == "ours+verify",
        )  # fmt: skip
    Console(width=150).print(shown)


def _notes(s: Mapping[str, Any]) -> str:
    notes = []
    if "returned_seconds" in s:
        notes.append(f"returned after {s['returned_seconds']:.2f}")
    if s["what"] == "save":
        notes.append(f"first {s['first']:.2f}, then {s['steady']:.2f}; {s['bytes'] / 1e6:.0f} MB")
    if s["what"] == "reshard" and "convert_seconds" in s:
        notes.append(f"convert {s['convert_seconds']:.2f} + load {s['load_seconds']:.2f}")
    notes += ["VALUES DIFFER"] if not s["equal"] else []
    notes += ["not cold"] if not s["cold"] else []
    notes += [f"{s['void']} void" + (", no other" if s["only_void"] else "")] if s["void"] else []
    return "; ".join(notes)
