"""DeepSpeed as a peer: ``benchmarks.zero`` compares it on its own ground, live engines; here its rows join the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.pool import ROOT
from benchmarks.run import Bench, Row

PEERS = {"native": "deepspeed", "ours": "distckpt", "ours+verify": "distckpt, verified"}
TIMEOUT_S = 3600


def zero(bench: Bench) -> None:
    """Run it in a process of its own, with the size and rounds of this run."""
    out = bench.folder / "zero.json"
    command = [
        sys.executable, "-m", "benchmarks.zero", "--rounds", str(bench.settings.rounds), "--folder", str(bench.folder),
        "--mbytes", str(bench.settings.nbytes / 1e6), "--again", str(bench.settings.again), "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    rows = rows_of(out) if out.exists() else []
    for row in rows:
        bench.add(row)
    if not rows:
        error = " ".join(done.stderr.split())[-300:] or f"status {done.returncode}"
        bench.absent["deepspeed"] = error
        bench.add({"kind": "absent", "peer": "deepspeed", "error": error})


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a result of ``benchmarks.zero`` as rows of this suite."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    settings = next(r["settings"] for r in records if r["kind"] == "machine")
    return [_row(record, settings) for record in records if record["kind"] == "row"]


def _row(record: Row, settings: Row) -> Row:
    limit = {kind: record[f"raw_{kind}_bytes_s"] for kind in ("write", "read") if f"raw_{kind}_bytes_s" in record}
    kept = ("seconds", "cpu_seconds", "returned_seconds", "attempt", "void", "load_average", "round", "probes")
    row = {key: record[key] for key in kept if key in record} | {
        "kind": "row", "workload": f"ZeRO-{record['stage']}", "part": record["what"], "peer": PEERS[record["peer"]],
        "world": settings["to"] if "reshard" in record["what"] else settings["ranks"], "limit": limit,
        "nbytes": settings["state_bytes"],
    }  # fmt: skip
    if "equal" in record:
        row["check"] = "equal" if record["equal"] else f"different: {', '.join(record.get('different', []))}"
    return row
