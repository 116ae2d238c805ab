"""The benchmark suite: distckpt beside its peers and beside the raw machine, in one interleaved run.

    python -m benchmarks                        quick: about 200 MB a state, under 10 minutes on 2 quiet cores
    python -m benchmarks --full                 1.76 GB a state, 5 rounds, more workloads: an hour or two
    python -m benchmarks --only train --peers distckpt,dcp-async-thread

Results go to OUT as JSON lines, PNG files and one HTML page; the tables are printed. Exit status 1 if anything that was
loaded was not what was saved, or a job could not go on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import measures, plots, report
from benchmarks.jobs import Job, all_jobs, peer_names
from benchmarks.pool import TUNABLES, RanksFailed
from benchmarks.run import Bench, Settings, json_lines

QUICK_BYTES, FULL_BYTES = 200_000_000, 1_760_000_000


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--full", action="store_true", help="large states, five rounds, all workloads")
    out.add_argument("--only", metavar="WORKLOAD", action="append", default=[], help="may be repeated; see --list")
    out.add_argument("--peers", default="", help="comma-separated names instead of all that fit a workload")
    out.add_argument("--rounds", type=int, help="passes there and back over the peers (quick 1, full 5)")
    out.add_argument("--again", type=int, help="how often a void turn is repeated (quick 1, full 2)")
    out.add_argument("--mbytes", type=float, help="bytes of a state, in MB; tensor counts stay")
    out.add_argument("--folder", type=Path, help="on the disk to measure (default: the folder for temporary files)")
    out.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where results go (runs/benchmarks)")
    out.add_argument("--list", action="store_true", help="print workloads and peers, and stop")
    return out


def settings_of(args: argparse.Namespace) -> Settings:
    """Return what is asked for, with defaults filled in; raises ``SystemExit`` for unknown names."""
    peers = tuple(name for name in args.peers.split(",") if name)
    unknown = sorted(set(peers) - set(peer_names())) + sorted(set(args.only) - {job.name for job in all_jobs()})
    if unknown:
        parser().error(f"unknown: {', '.join(unknown)}; --list names workloads and peers")
    nbytes = args.mbytes * 1e6 if args.mbytes else FULL_BYTES if args.full else QUICK_BYTES
    return Settings(
        full=args.full, nbytes=int(nbytes), rounds=args.rounds or (5 if args.full else 1),
        again=(2 if args.full else 1) if args.again is None else args.again, peers=peers, only=tuple(args.only),
    )  # fmt: skip


def chosen(jobs: list[Job], settings: Settings) -> list[Job]:
    """Return the jobs to run."""
    if settings.only:
        return [job for job in jobs if job.name in settings.only]
    return [job for job in jobs if settings.full or not job.full]


def run(settings: Settings, folder: Path, out: Path) -> report.Results:
    """Run the jobs and return all rows; they are written as they come. A job whose ranks fail is left, not the others."""
    sink = json_lines(out / "results.jsonl")
    bench = Bench(settings, folder, sink)
    facts = report.machine(folder, asdict(settings))
    sink(facts)
    try:
        bench.calibrate()
        for job in chosen(all_jobs(), settings):
            started = time.monotonic()
            print(f"== {job.name}: {job.title}", file=sys.stderr, flush=True)
            row = {"kind": "job", "job": job.name}
            if settings.full:  # at full size what peers keep adds up to more than the memory
                bench.close()
            try:
                job.run(bench)
            except RanksFailed as error:
                row["error"] = str(error)
                print(f"{job.name} was left: {error}", file=sys.stderr, flush=True)
                bench.close()  # memory that other ranks hold may be why
            bench.add({**row, "seconds": time.monotonic() - started})
    finally:
        bench.close()
    return report.Results(bench.rows, facts)


def show(results: report.Results, out: Path) -> None:
    """Print the tables and write the pictures."""
    report.table(results)
    measures.print_scorecard(results)
    pictures = plots.plots(results, out)
    (out / "report.html").write_text(plots.page(results, pictures), encoding="utf-8")
    print(f"{out / 'results.jsonl'}, {out / 'report.html'}, {len(pictures)} pictures")


def main(argv: list[str] | None = None) -> int:
    """Run the suite; see the module's own text."""
    args = parser().parse_args(argv)
    if args.list:
        print("\n".join(f"{job.name:14} {job.title}{' (full)' if job.full else ''}" for job in all_jobs()))
        print("peers:", ", ".join(peer_names()))
        return 0
    settings = settings_of(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends ranks and removes what was written
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmarks-") as folder:
        results = run(settings, Path(folder), args.out.resolve())
    show(results, args.out)
    left = [row["job"] for row in results.rows if row["kind"] == "job" and "error" in row]
    if left:
        print(f"LEFT: {', '.join(left)}; see the rows of kind 'job'", file=sys.stderr)
    wrong = [s for s in results.summaries() if s.wrong]
    for s in wrong:
        print(f"WRONG: {s.workload} x{s.world}, {s.part}, {s.peer}: {s.wrong}", file=sys.stderr)
    return 1 if wrong or left else 0


if __name__ == "__main__":
    if not TUNABLES.keys() <= os.environ.keys():  # the driver's probes copy like the ranks
        os.execve(sys.executable, sys.orig_argv, {**TUNABLES, **os.environ})
    sys.exit(main())
