"""Many SIGKILLs at random moments of saves, with the crash tests' supervisor and its six invariants.

    python -m benchmarks.soak --kills 1000 --seed 1 --out soak.json [--ranks 2] [--async | --sync] [--chains 8]

Each kill hits one rank or all of them, from outside, while a small job saves step after step; the next job on the same
root has to resume the newest checkpoint bit for bit and to save. Exits with 1 if anything was lost, torn or hung.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported: ranks are forked, and OpenMP pools do not survive that
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "faults")]

from supervisor import GRACE_S, Result, random_kills, run_chains  # noqa: E402

BATCH = 100  # kills between two lines of progress; each batch has fresh roots
TIMEOUT_S = 2.0


def report(result: Result, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the result file's content; ``violations`` holds every text, by invariant."""
    times = sorted(result.verdict_s)
    counts = {name: sum(f" {name}: " in v or f": {name}: " in v for v in result.violations) for name in INVARIANTS}
    return {
        "command": f"python -m benchmarks.soak --kills {args.kills} --ranks {args.ranks} --seed {args.seed}"
        + (" --async" if args.mode is True else " --sync" if args.mode is False else ""),
        "kills": result.landed,
        "kills_missed": len(result.missed),
        "kills_per_phase": dict(result.phases.most_common()),
        "saves_acknowledged": result.acknowledged,
        "checkpoints_read_whole": result.checked,
        "violations": {INVARIANTS[name]: count for name, count in counts.items()},
        "violation_texts": result.violations[:50],
        "most_litter_after_a_kill": result.most_litter,
        "verdict_seconds": {
            "agreement_timeout": TIMEOUT_S,
            "limit": TIMEOUT_S + GRACE_S,
            "median": round(statistics.median(times), 3) if times else None,
            "p99": round(times[min(len(times) - 1, int(0.99 * len(times)))], 3) if times else None,
            "most": round(times[-1], 3) if times else None,
        },
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


INVARIANTS = {
    "I1": "acknowledged lost or changed",
    "I2": "torn or damaged offered",
    "I3": "resumed from another than the newest",
    "I4": "no verdict in time, or different ones",
    "I5": "next save failed",
    "I6": "litter left, or more than litter removed",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--chains", type=int, default=8, help="jobs that run side by side; most of their time is waiting"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--async", dest="mode", action="store_const", const=True, help="background saves only")
    mode.add_argument("--sync", dest="mode", action="store_const", const=False, help="synchronous saves only")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON (default: standard output)")
    args = parser.parse_args(argv)
    logging.getLogger("distckpt").setLevel(logging.CRITICAL)
    total, started = Result(), time.monotonic()
    kills = random_kills(args.kills, args.seed, args.ranks, args.mode)
    for at in range(0, len(kills), BATCH):
        with tempfile.TemporaryDirectory() as folder:
            batch = kills[at : at + BATCH]
            total.add(run_chains(Path(folder), batch, args.chains, args.ranks, TIMEOUT_S))
        done, bad = total.landed, len(total.violations)
        print(f"{done} kills in {time.monotonic() - started:.0f} s, {bad} violations", file=sys.stderr, flush=True)
    text = json.dumps(report(total, args, time.monotonic() - started), indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")
    return 1 if total.violations or total.missed else 0


if __name__ == "__main__":
    sys.exit(main())
