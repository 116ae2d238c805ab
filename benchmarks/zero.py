"""DeepSpeed ZeRO: native checkpoints and distckpt's, same engine and ranks, in one interleaved run.

    python -m benchmarks.zero [--ranks 2] [--to 1] [--rounds 5] [--mbytes 600] [--stages 2 3] [--out benchmarks/results/zero.json]

Each round does, for each ZeRO stage, native and ours in the order A B B A (B A A B in every second round):

- save: on ``--ranks`` ranks. Both durable: DeepSpeed syncs nothing, so every file and folder of its checkpoint is
  fsynced afterwards, by all ranks, inside the clock; ``returned_seconds`` is when ``save_checkpoint`` came back.
- load: cold, by new processes, into a new engine that has not trained.
- reshard: cold load on ``--to`` ranks; DeepSpeed needs ``ds_to_universal`` before. With and without the save before.
- export: cold, one safetensors file of fp32 weights, durable; ours also with every byte read back and compared.

Free memory is touched before each clock starts, so that nobody pays for what a virtual machine's host took away.
Loaded, resharded and exported values are compared with the live ones outside the clock. Raw limits are probed before and
after each of these; where they differ by more than a quarter, it is void and done again, at most ``--again`` times.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported: ranks are forked, and OpenMP pools do not survive that
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("RES_OPTIONS", "attempts:0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import argparse  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import logging  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

from ranks import run_ranks  # noqa: E402

from benchmarks import zero_job as job  # noqa: E402
from benchmarks import zero_report as report  # noqa: E402
from benchmarks.limits import disk_read, disk_write  # noqa: E402

VOID = 0.25
"""Most by which the raw probes before and after may differ."""
RANK_TIMEOUT_S = 600

Row = dict[str, Any]
Limit = Callable[[], dict[str, float]]


@dataclass
class Round:
    """One round of one stage: where it writes, and what it has measured."""

    args: argparse.Namespace
    stage: int
    number: int
    folder: Path
    rows: list[Row] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """What was live when it was saved (``zero_job.fingerprint``)."""

    @property
    def nbytes(self) -> int:
        return int(self.args.mbytes * 1e6)

    @property
    def order(self) -> list[tuple[str, int]]:
        """Return (peer, which of its two) in the order of this round."""
        a, b = ("native", "ours") if self.number % 2 == 0 else ("ours", "native")
        return [(a, 1), (b, 1), (b, 2), (a, 2)]

    def source(self, peer: str) -> Path:
        return self.folder / peer

    # ------------------------------------------------------------------ raw limits

    def write_limit(self) -> dict[str, float]:
        """Probe the disk with the bytes of the state, or enough of them."""
        return {"write": disk_write(self.folder, max(256 << 20, self.state_bytes))}

    def read_limit(self) -> dict[str, float]:
        """Probe the disk with the largest files of the checkpoints themselves."""
        files = [path for path in job.files_of(self.source("ours")) if path.suffix == ".safetensors"]
        return {"read": disk_read(files)}

    def both_limits(self) -> dict[str, float]:
        return self.write_limit() | self.read_limit()

    @property
    def state_bytes(self) -> int:
        return int(self.args.state_bytes)

    # ------------------------------------------------------------------ what is measured

    def measure(self, what: str, work: Callable[[], list[Row]], limit: Limit) -> None:
        """Run one part between two probes, again where the machine was not steady."""
        for attempt in range(1 + self.args.again):
            load, before = os.getloadavg()[0], limit()
            found = work()
            after = limit()
            void = any(abs(after[k] - before[k]) > VOID * min(after[k], before[k]) for k in before)
            mean = {f"raw_{k}_bytes_s": (before[k] + after[k]) / 2 for k in before}
            about = {"stage": self.stage, "round": self.number, "attempt": attempt, "void": void, "load_average": load}
            self.rows += [{**row, **about, **mean, "probes": [before, after]} for row in found]
            if not void:
                break
        shown = [r for r in found if r["what"] == what]
        seconds = " ".join(f"{r['peer']} {r['seconds']:.2f}" for r in shown)
        state = " VOID" if void else ""
        print(f"round {self.number} ZeRO-{self.stage} {what}: {seconds}{state}", file=sys.stderr, flush=True)

    def run(self) -> list[Row]:
        self.measure("save", self._save, self.write_limit)
        self.measure("load", self._load, self.read_limit)
        self.measure("reshard", self._reshard, self.read_limit)
        self.measure("export", self._export, self.both_limits)
        return self.rows

    def _save(self) -> list[Row]:
        for peer in ("native", "ours"):
            shutil.rmtree(self.source(peer), ignore_errors=True)
        run = run_ranks(
            self.args.ranks, job.save_session, self.stage, self.nbytes, self.folder, self.order,
            timeout_s=RANK_TIMEOUT_S,
        )[0]  # fmt: skip
        self.saved = run["fingerprint"]
        sizes = {peer: job.stored_bytes(self.source(peer)) // 2 for peer in ("native", "ours")}
        return [{**row, "bytes": sizes[row["peer"]]} for row in run["rows"]]

    def _load(self) -> list[Row]:
        return [self._load_once("load", *turn, self.args.ranks) for turn in self.order]

    def _load_once(self, what: str, peer: str, number: int, ranks: int, folder: Path | None = None) -> Row:
        kind = "universal" if folder is not None else peer
        run = run_ranks(
            ranks, job.load_session, self.stage, self.nbytes, kind, folder or self.source(peer), str(number),
            timeout_s=RANK_TIMEOUT_S,
        )[0]  # fmt: skip
        return self._checked({**run, "what": what, "peer": peer, "number": number, "first": number == 1})

    def _reshard(self) -> list[Row]:
        """Measure what comes after the save; the whole path adds the save of the same round, peer and number."""
        rows = []
        for peer, number in self.order:
            if peer == "ours":
                rows.append(self._load_once("reshard", peer, number, self.args.to))
            else:
                rows.append(self._universal(number))
        saves = {(r["peer"], r["number"]): r for r in self.rows if r["what"] == "save"}  # of the last attempt
        whole = []
        for row in rows:
            save = saves[row["peer"], row["number"]]
            sums = {key: row[key] + save[key] for key in ("seconds", "cpu_seconds")}
            whole.append({**row, **sums, "what": "save + reshard"})
        return rows + whole

    def _universal(self, number: int) -> Row:
        folder = self.folder / "universal"
        shutil.rmtree(folder, ignore_errors=True)
        target = folder / str(number)
        source = self.source("native") / str(number)
        made = run_ranks(
            1, job.to_universal, self.stage, source, target, backend=None, timeout_s=RANK_TIMEOUT_S
        )[0]  # fmt: skip
        row = self._load_once("reshard", "native", number, self.args.to, folder)
        shutil.rmtree(folder)
        parts = {"convert_seconds": made["seconds"], "load_seconds": row["seconds"], "bytes": made["bytes"]}
        cpu = made["cpu_seconds"] + row["cpu_seconds"]
        resident = made["resident_pages"] + row["resident_pages"]
        seconds = made["seconds"] + row["seconds"]
        return {**row, **parts, "seconds": seconds, "cpu_seconds": cpu, "resident_pages": resident}

    def _export(self) -> list[Row]:
        rows = []
        for peer, number in self.order:
            ours = ("ours", "ours+verify") if number == 1 else ("ours+verify", "ours")  # the first pays for cold disks
            for kind in ("native",) if peer == "native" else ours:
                target = self.folder / "export"
                run = run_ranks(
                    1, job.export, kind, self.source(peer), str(number), target, backend=None,
                    timeout_s=RANK_TIMEOUT_S,
                )[0]  # fmt: skip
                shutil.rmtree(target)
                rows.append(self._checked({**run, "what": "export", "peer": kind, "number": number}))
        return rows

    def _checked(self, row: Row) -> Row:
        """Replace the values' fingerprint by whether they are those that were saved, and say which are not."""
        found = row.pop("fingerprint")
        wanted = {k: v for k, v in self.saved.items() if k in found or row["what"] != "export"}
        wrong = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        return {**row, "equal": not wrong, "different": wrong[:5]}


def warm_up(folder: Path) -> None:
    """Import here whatever any part imports late, so that no forked rank does so inside the clock.

    What lives now is then hidden from the garbage collector: a collection in a forked rank, as zero_to_fp32 asks for,
    would copy every page of it, which a process of its own does not.
    """
    loaded: set[str] = set()
    for stage in (2, 3):
        at = folder / f"warm-{stage}"
        at.mkdir()
        turns = [("native", 1), ("ours", 1)]
        parts: list[tuple[Any, ...]] = [(job.save_session, stage, 1, at, turns)]
        parts += [(job.load_session, stage, 1, peer, at / peer, "1") for peer in ("native", "ours")]
        for part in parts:
            loaded |= set(run_ranks(1, job.modules_after, *part, timeout_s=RANK_TIMEOUT_S)[0])
        parts = [(job.to_universal, stage, at / "native" / "1", at / "universal" / "1")]
        kinds = {"native": "native", "ours": "ours", "ours+verify": "ours"}
        parts += [(job.export, kind, at / where, "1", at / kind / "out") for kind, where in kinds.items()]
        for part in parts:
            loaded |= set(run_ranks(1, job.modules_after, *part, backend=None, timeout_s=RANK_TIMEOUT_S)[0])
        shutil.rmtree(at)
    for name in sorted(loaded - set(sys.modules)):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--to", type=int, default=1, help="ranks that resharding loads on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mbytes", type=float, default=600, help="fp32 masters and moments, in MB")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], choices=[1, 2, 3])
    parser.add_argument("--again", type=int, default=2, help="how often a void part is repeated")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the folder for temporary files)")
    parser.add_argument("--out", type=Path, help="where all rows go, as JSON lines")
    args = parser.parse_args(argv)
    args.state_bytes = job.state_bytes(int(args.mbytes * 1e6))
    logging.getLogger("distckpt").setLevel(logging.ERROR)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        warm_up(Path(scratch))
        facts = report.machine(Path(scratch), vars(args))
        for number in range(args.rounds):
            for stage in args.stages:
                folder = Path(scratch, f"{number}-{stage}")
                folder.mkdir()
                rows += Round(args, stage, number, folder).run()
                shutil.rmtree(folder)
                if args.out is not None:
                    report.write(args.out, facts, rows)
    facts["load_average_after"] = os.getloadavg()
    if args.out is not None:
        report.write(args.out, facts, rows)
    report.table(facts, rows)
    return 0 if all(row.get("equal", True) for row in rows if row["peer"] != "native") else 1


if __name__ == "__main__":
    sys.exit(main())
