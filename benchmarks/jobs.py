"""What is measured: one job per workload, each a sequence of passes over the peers.

Work that others bring along plugs in by ``SLOTS``: a module with ``jobs() -> list[Job]`` and ``measures() ->
list[Measure]`` (benchmarks.measures).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from benchmarks import tasks
from benchmarks.limits import drop_caches
from benchmarks.peers import HOMES, NO_CHECKSUMS, OURS
from benchmarks.peers.base import files_of
from benchmarks.pool import Pool
from benchmarks.run import Bench, Row, folder_for, merged, palindrome, settle, together
from benchmarks.shapes import CHANGING, COLUMNS, FLAT, ROWS, Workload, make_workload
from distckpt.storage.probes import warm_caches

SLOTS = {
    "ema": "benchmarks.ema",
    "averaging": "benchmarks.averaging",
    "plan": "benchmarks.sim.suite",
}
"""Name of a slot: the module that fills it."""

SAVERS = (
    "distckpt", "torch.save", "safetensors", "dcp", "dcp-threads", "dcp-hf", "torch_checkpointing", "torchsnapshot",
    "bytecheckpoint",
)  # fmt: skip
BACKGROUND = ("distckpt", "dcp-async-thread", "dcp-async-process", "torch_checkpointing", "torchsnapshot")
SHARDED = ("distckpt", "dcp", "dcp-threads", "dcp-hf", "torch_checkpointing")
FEW = ("distckpt", "dcp-threads")


@dataclass(frozen=True)
class Job:
    """One entry of the suite. ``full`` ones run only with ``--full`` or when they are asked for by name."""

    name: str
    title: str
    run: Callable[[Bench], None]
    full: bool = False


# ---------------------------------------------------------------------- one state, saved and loaded


@dataclass
class Pass:
    """One state on so many ranks, in a folder of its own."""

    bench: Bench
    workload: Workload
    world: int
    root: Path

    def __post_init__(self) -> None:
        self.failed: set[str] = set()
        self.saved: dict[str, tuple[int, Path]] = {}
        """Peer: step and folder of its newest checkpoint."""
        self._met: dict[tuple[str, str], int] = {}
        """Part and peer: which start of the processes it has had its first time in."""

    @property
    def nbytes(self) -> int:
        return self.workload.nbytes

    def about(self, part: str, peer: str, number: int) -> Row:
        name = self.workload.name
        return {"workload": name, "world": self.world, "part": part, "peer": peer, "round": number}

    def writer(self) -> Pool:
        return self.bench.hold(self.world, "writer", self.workload, filled=True)

    def reader(self) -> Pool:
        return self.bench.hold(self.world, "reader", self.workload, filled=False)

    def left(self, peers: Sequence[str]) -> list[str]:
        return [peer for peer in peers if peer not in self.failed]

    def rounds(self, peers: Sequence[str]) -> list[tuple[int, str]]:
        """Return (round, peer) of all turns: round 0 is each peer's first time."""
        there_and_back = [(n, p) for n in range(1, 1 + self.bench.settings.rounds) for p in palindrome(peers)]
        return [(0, peer) for peer in peers] + there_and_back

    def turns(self, part: str, peers: Sequence[str], pool: Callable[[], Pool]) -> Iterator[tuple[int, str]]:
        """Yield the turns of those that have not failed; where processes are new after a failure a first time comes first."""
        for number, peer in self.rounds(peers):
            if peer in self.failed:
                continue
            starts = pool().starts
            if number and self._met.get((part, peer)) != starts:
                yield 0, peer
            self._met[part, peer] = starts
            if peer not in self.failed:
                yield number, peer

    # ------------------------------------------------------------------ parts

    def saves(self, peers: Sequence[str]) -> None:
        """Save durably; a peer's first save in these processes is a part of its own."""
        peers = self.bench.usable(peers, self.writer())
        raw = self.bench.write_limit(self.nbytes)
        both = together(raw, self.bench.verified_write_limit(self.nbytes))
        for number, peer in self.turns("save", peers, self.writer):
            about = self.about("save" if number else "first save", peer, number)
            probe = both if peer == OURS else raw
            with self.bench.once() if number == 0 else nullcontext():  # the second would not be the first
                row = self.bench.measure(about, partial(self._save, peer), probe, shared=True, failed=self.failed)
            if row is None:
                self.saved.pop(peer, None)

    def _save(self, peer: str, operation: Callable[..., object] = tasks.save) -> Row:
        writer, step = self.writer(), self.bench.step()
        settle()
        row = merged(writer.call(operation, peer, self.root, step), self.nbytes)
        files = files_of(Path(row["folder"]))
        row |= {"files": len(files), "stored_bytes": sum(path.stat().st_size for path in files)}
        before, self.saved[peer] = self.saved.get(peer), (step, Path(row["folder"]))
        if before is not None:
            writer.call(tasks.remove, str(before[1]))
        return row

    def loads(self, peers: Sequence[str], *, warm: bool = True, part: str = "cold load") -> None:
        """Load what was saved last, in other processes; cold with the disk as the limit, then from the page cache."""
        peers = [peer for peer in peers if peer in self.saved and peer not in self.failed]
        peers = [peer for peer in peers if peer != "dcp-threads" or "dcp" not in peers]  # the same reader
        for number, peer in self.turns("load", peers, self.reader):
            files = files_of(self.saved[peer][1])
            if number == 0:  # imports, threads, first touch
                self.bench.measure(self.about("first load", peer, 0), partial(self._load, peer, files), dict,
                                   failed=self.failed)  # fmt: skip
                continue
            cold, probe = partial(self._load, peer, files), self.bench.read_limit(files)
            if peer in (OURS, NO_CHECKSUMS):
                probe = together(probe, self.bench.verified_read_limit(files, hashed=peer == OURS))
            self.bench.measure(self.about(part, peer, number), cold, probe, failed=self.failed)
            if warm and peer not in self.failed:
                copy, cached = self.bench.copy_limit(self.reader(), self.nbytes), self.bench.cached_limit(files)
                hot = partial(self._load, peer, files, warm=True)
                self.bench.measure(self.about("warm load", peer, number), hot, together(copy, cached),
                                   failed=self.failed)  # fmt: skip

    def _load(self, peer: str, files: Sequence[Path], *, warm: bool = False) -> Row:
        reader, files = self.reader(), list(files)
        pages = warm_caches(files) if warm else drop_caches(files)
        replies = reader.call(tasks.load, peer, self.root, self.saved[peer][0])
        row = merged(replies, self.nbytes)
        return {**row, ("absent_pages" if warm else "resident_pages"): pages}

    def backgrounds(self, peers: Sequence[str]) -> None:
        """Save in the background with nothing else to do: how long the caller stalls, and when it is durable."""
        root, self.root = self.root, self.root / "background"
        saved, self.saved = self.saved, {}
        self.root.mkdir()
        for number, peer in self.turns("background", self.bench.usable(peers, self.writer()), self.writer):
            about = self.about("background" if number else "first background", peer, number)
            probe = self.bench.copy_limit(self.writer(), self.nbytes)
            if peer == OURS:
                probe = together(probe, self.bench.staging_limit(self.writer()))
            work = partial(self._save, peer, tasks.background)
            with self.bench.once() if number == 0 else nullcontext():
                self.bench.measure(about, work, probe, failed=self.failed)
        self.root, self.saved = root, saved


def state(workload: str, world: int, savers: Sequence[str], *, background: Sequence[str] = (), warm: bool = True,
          bench: Bench) -> None:  # fmt: skip
    """Save, load cold and warm, and save in the background."""
    load = make_workload(workload, bench.settings.nbytes)
    with folder_for(bench, f"{workload}-{world}") as root:
        here = Pass(bench, load, world, root)
        here.saves(savers)
        here.loads(savers, warm=warm)
        if background:
            here.backgrounds(background)


def checksums(bench: Bench) -> None:
    """Save and load with and without digests, in turn."""
    with folder_for(bench, "checksums") as root:
        here = Pass(bench, _named(make_workload("llama8b", bench.settings.nbytes), "checksums"), 1, root)
        peers = (OURS, NO_CHECKSUMS)
        here.saves(peers)
        here.loads(peers, warm=False)


def _named(workload: Workload, name: str) -> Workload:
    return Workload(name, workload.title, workload.tensors, workload.placement)


# ---------------------------------------------------------------------- layouts

PAIRS = (
    ("2 ranks to 1", (2, ROWS), (1, ROWS)),
    ("1 rank to 2", (1, ROWS), (2, ROWS)),
    ("rows to columns", (2, ROWS), (2, COLUMNS)),
    ("ZeRO flat to rows", (2, FLAT), (2, ROWS)),
)
"""Saved as, loaded as: ranks and placement."""


def reshard(bench: Bench) -> None:
    """Load the same bytes into the same layout, once from that layout and once from another, in turn."""
    base = make_workload("llama8b", bench.settings.nbytes)
    peers = ("distckpt", "dcp-threads")
    for title, (source_world, source), (world, target) in PAIRS:
        with folder_for(bench, "reshard") as root:
            named = _named(base, f"reshard: {title}")
            same = Pass(bench, named.placed(target), world, root / "same")
            cross = Pass(bench, named.placed(source), source_world, root / "cross")
            for here in (same, cross):
                here.root.mkdir()
                usable = bench.usable(peers, here.writer())
                for peer in [p for p in usable if p == "distckpt" or here.workload.placement != FLAT]:
                    bench.measure(here.about("source save", peer, 0), partial(here._save, peer), dict,
                                  failed=here.failed)  # fmt: skip
            arrived = Pass(bench, same.workload, world, cross.root)
            arrived.saved = cross.saved
            _in_turn(bench, same, arrived, cross.failed | same.failed)


def _in_turn(bench: Bench, same: Pass, arrived: Pass, failed: set[str]) -> None:
    peers = [p for p in same.saved if p in arrived.saved and p not in failed]
    for number, peer in same.rounds(peers):
        for here, part in ((same, "same layout"), (arrived, "reshard")):
            files = files_of(here.saved[peer][1])
            probe = bench.read_limit(files) if number else dict
            about = here.about(part if number else "first load", peer, number)
            if peer not in failed:
                bench.measure(about, partial(here._load, peer, files), probe, failed=failed)


# ---------------------------------------------------------------------- what changes little; fresh processes


def incremental(bench: Bench) -> None:
    """Save a frozen model with adapters, train the adapters, save again: bytes written the second time."""
    workload = make_workload("lora", bench.settings.nbytes)
    with folder_for(bench, "lora") as root:
        here = Pass(bench, workload, 1, root)
        for peer in bench.usable(("distckpt-incremental", "distckpt", "dcp-threads"), here.writer()):
            bench.release(1, "writer")  # each peer begins with the same values
            bench.measure(here.about("full", peer, 0), partial(_kept, here, peer), dict, failed=here.failed)
            for number in range(1, 2 + bench.settings.rounds):
                if peer not in here.failed:
                    changed = here.writer().call(tasks.change, CHANGING)[0]
                    with bench.once():  # nothing has changed any more the second time
                        row = bench.measure(here.about("increment", peer, number), partial(_kept, here, peer, changed),
                                            bench.write_limit(here.nbytes), failed=here.failed)  # fmt: skip
                    if row is not None:
                        here.reader().call(tasks.expect, here.writer().call(tasks.versions)[0])
                        files = files_of(here.root / peer)
                        about = here.about("increment load", peer, number)
                        bench.measure(about, partial(here._load, peer, files), dict, failed=here.failed)


def _kept(here: Pass, peer: str, changed: int = 0) -> Row:
    """Save, and keep the checkpoints before: an increment refers to them."""
    here.saved.pop(peer, None)
    return {**here._save(peer), "changed_bytes": changed}


def resumed(bench: Bench) -> None:
    """In fresh processes: load, then the first save, then a steady one."""
    workload = _named(make_workload("llama8b", bench.settings.nbytes), "resume")
    with folder_for(bench, "resume") as root:
        here = Pass(bench, workload, 2, root)
        for peer in bench.usable(("distckpt", "dcp-threads", "torch_checkpointing"), here.writer()):
            first = bench.measure(here.about("source save", peer, 0), partial(here._save, peer), dict,
                                  failed=here.failed)  # fmt: skip
            if first is None:
                continue
            for number in range(1, 1 + bench.settings.rounds):
                _one_resume(bench, here, peer, number)
                bench.release(2, "writer")


def _one_resume(bench: Bench, here: Pass, peer: str, number: int) -> None:
    bench.release(2, "writer")
    here.writer()
    step, folder = here.saved[peer]
    files = files_of(folder)

    def load() -> Row:
        pages = drop_caches(files)
        return {**merged(here.writer().call(tasks.resume, peer, here.root, step), here.nbytes), "resident_pages": pages}

    with bench.once():  # a second try would not be the first any more
        bench.measure(here.about("resume", peer, number), load, bench.read_limit(files), failed=here.failed)
        probe = bench.write_limit(here.nbytes)
        for part in ("first save after resume", "steady save after resume"):
            if peer not in here.failed:
                bench.measure(here.about(part, peer, number), partial(here._save, peer), probe, failed=here.failed)


# ---------------------------------------------------------------------- the list


def all_jobs() -> list[Job]:
    """Return every job, slots included, in the order in which they run."""
    from benchmarks.train import training
    from benchmarks.zero_peer import zero

    small = ("distckpt", "safetensors", "dcp", "dcp-threads")
    jobs = [
        Job("llama8b", "llama8b, one rank", partial(_state, "llama8b", 1, SAVERS, BACKGROUND)),
        Job("llama8b-2", "llama8b, two ranks", partial(_state, "llama8b", 2, SHARDED, BACKGROUND[:3])),
        Job("small", "18,867 small tensors", partial(_state, "small", 1, small, (), warm=False)),
        Job("one-big", "four large tensors", partial(_state, "one-big", 1, ("distckpt", *SAVERS[1:5]), ()), full=True),
        Job("replicated", "the same on both ranks", partial(_state, "replicated", 2, (*FEW, "torchsnapshot"), ()), full=True),
        Job("zero-flat", "ZeRO flat partitions", partial(_state, "zero-flat", 2, FEW, (), warm=False), full=True),
        Job("checksums", "checksums on and off", checksums),
        Job("reshard", "from one layout into another", reshard),
        Job("lora", "incremental saves of a frozen model", incremental),
        Job("train", "saving in a training loop", training),
        Job("resume", "first save after a resume", resumed, full=True),
        Job("zero", "DeepSpeed's own checkpoints, ZeRO-2 and 3", zero, full=True),
    ]
    jobs += [
        Job(
            name, f"tensor count of {name}", partial(_state, name, 1, ("distckpt", "dcp", "dcp-threads"), ()), full=True
        )
        for name in ("llama70b", "llama405b", "llama1t")
    ]
    for slot in SLOTS:
        jobs += slot_module(slot).jobs()
    return jobs


def peer_names() -> list[str]:
    """Return all that ``--peers`` may name: adapters, and those of slots whose names have no comma."""
    slots = [name for slot in SLOTS for name in getattr(slot_module(slot), "PEERS", ())]
    return list(dict.fromkeys([*HOMES, *(name for name in slots if "," not in name)]))


def _state(workload: str, world: int, savers: Sequence[str], background: Sequence[str], bench: Bench, *,
           warm: bool = True) -> None:  # fmt: skip
    if not bench.settings.full:
        savers = [name for name in savers if name != "dcp"]  # dcp-threads is the faster one
    state(workload, world, savers, background=background, warm=warm, bench=bench)


def slot_module(slot: str) -> ModuleType:
    """Return the module that fills a slot; imported late, as it imports this one."""
    return importlib.import_module(SLOTS[slot])
