"""Kills crash jobs and checks, from outside, what is left of each: the six invariants of a checkpoint root.

A chain is a series of jobs on one root, each of which resumes, saves, and is killed; the next one is the proof that
the one before did no harm. The oracle is what ranks said before they died (see ``crash_job``).

I1 every acknowledged checkpoint that is not retired loads bit-equal. I2 whatever a reader offers is whole and
bit-equal. I3 a resume takes the newest of the lineage. I4 survivors get one verdict, or an error, in time. I5 the next
job saves on the same root. I6 litter is bounded, and the next job's gc removes it and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from crash_job import LIMIT, Job, digest_of, run
from ranks import RankOutcome, run_ranks

from distckpt import list_checkpoints, open_checkpoint
from distckpt.format import names
from distckpt.storage.paths import TEMP_PREFIX

GRACE_S = 5.0  # what an agreement may take beyond its timeout
NOTE = "notes-of-the-user.txt"


@dataclass(frozen=True)
class Kill:
    """Where one job dies: at a failpoint's n-th hit, or (without one) at a random moment of its saves."""

    victims: tuple[int, ...]
    background: bool
    point: tuple[str, int] | None = None
    moment: float = 0.0  # without a point: when, in units of one save
    store_host: Literal["rank0", "agent"] = "agent"

    def __str__(self) -> str:
        where = f"{self.point[0]}#{self.point[1]}" if self.point else f"{self.moment:.2f} saves"
        mode = "background" if self.background else "synchronous"
        return f"ranks {list(self.victims)} at {where}, {mode}, store on {self.store_host}"


@dataclass
class Result:
    """What a chain saw: kills that landed, the last failpoint passed before each, violations, seconds to a resume."""

    landed: int = 0
    missed: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    verdict_s: list[float] = field(default_factory=list)
    acknowledged: int = 0
    checked: int = 0
    most_litter: int = 0

    def add(self, other: Result) -> None:
        self.landed += other.landed
        self.missed += other.missed
        self.violations += other.violations
        self.phases += other.phases
        self.verdict_s += other.verdict_s
        self.acknowledged += other.acknowledged
        self.checked += other.checked
        self.most_litter = max(self.most_litter, other.most_litter)


class Chain:
    """Jobs on one root, one after the other, and the oracle's memory of them."""

    def __init__(self, folder: Path, world: int = 2, timeout_s: float = 2.0, incremental: bool = False) -> None:
        self.incremental = incremental
        self.root, self.oracle, self.world, self.timeout_s = folder / "root", folder / "oracle.jsonl", world, timeout_s
        self.root.mkdir(parents=True)
        (self.root / NOTE).write_text("mine")
        self.result = Result()
        self.jobs, self.read_to = 0, 0
        self.held: dict[tuple[int, int], dict[int, dict[str, str]]] = {}  # (generation, step) to rank to digests
        self.acknowledged: list[tuple[int, int]] = []
        self.litter: set[str] = set()

    def kill(self, kill: Kill) -> None:
        """Run one job, kill it, and check everything."""
        endless = 0 if kill.point else 40
        job = Job(
            self.root, self.oracle, self.jobs, kill.background, kill.point, kill.victims, timeout_s=self.timeout_s,
            endless=endless, trace=kill.point is None, incremental=self.incremental,
        )  # fmt: skip
        newest = newest_committed(self.root)
        killer = None if kill.point else self._killer(kill)
        outcomes = run_ranks(self.world, run, self.prepared(job), check=False, timeout_s=60, store_host=kill.store_host)
        self.recover()
        if killer is not None:
            os.waitpid(killer, 0)
        self.jobs += 1
        self._judge(kill, outcomes, newest)

    def prepared(self, job: Job) -> Job:
        """Return the job as this chain runs it."""
        return job

    def recover(self) -> None:
        """Do what happens to the storage between a death and the next start."""

    def finish(self) -> Result:
        """Run a last job that nobody kills, and return what the chain saw."""
        newest = newest_committed(self.root)
        job = Job(self.root, self.oracle, self.jobs, timeout_s=60, incremental=self.incremental)
        outcomes = run_ranks(self.world, run, job, check=False, timeout_s=60)
        self._judge(Kill((), False), outcomes, newest)
        return self.result

    def _killer(self, kill: Kill) -> int:
        """Fork a process that waits for the victims to be ready, then kills them at the chosen moment."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.environ.clear()
            ready: dict[int, int] = {}
            took, end = 0.0, time.monotonic() + 50
            while not set(range(self.world)) <= ready.keys() and time.monotonic() < end:
                time.sleep(0.001)
                for event in read_events(self.oracle, self.read_to)[0]:
                    if event["event"] == "healthy" and event["rank"] not in ready:
                        ready[event["rank"]] = os.pidfd_open(event["pid"])
                        took = max(took, event["took"])
            time.sleep(kill.moment * took)
            for rank in kill.victims:
                with contextlib.suppress(ProcessLookupError, KeyError):
                    signal.pidfd_send_signal(ready[rank], signal.SIGKILL)
        finally:
            os._exit(0)

    def _judge(self, kill: Kill, outcomes: list[RankOutcome], newest: tuple[int, int] | None) -> None:
        events, self.read_to = read_events(self.oracle, self.read_to)
        wrong: list[str] = []
        dead = {o.rank for o in outcomes if o.signal == signal.SIGKILL}
        self.result.landed += bool(dead)
        if set(kill.victims) != dead:
            self.result.missed.append(
                f"{kill}: died: {sorted(dead)}: {[o.error or o.output[-2000:] for o in outcomes]}"
            )
        for event in events:
            self._learn(event)
        if kill.victims:
            self.result.phases[phase_of(kill, events, dead)] += 1
        wrong += self._resumes(events, newest)
        wrong += self._verdicts(events, outcomes, dead)
        wrong += self._contents()
        wrong += self._litter()
        self.result.violations += [f"job {self.jobs} ({kill}): {text}" for text in wrong]

    def _learn(self, event: dict[str, Any]) -> None:
        key = (event.get("generation"), event.get("step"))
        if event["event"] == "begin":
            self.held.setdefault(key, {})[event["rank"]] = event["digests"]
        elif event["event"] == "acknowledged" and key not in self.acknowledged:
            self.acknowledged.append(key)
            self.result.acknowledged += 1

    def _resumes(self, events: list[dict[str, Any]], newest: tuple[int, int] | None) -> list[str]:
        """I3, I1: all ranks resumed from the newest checkpoint, and hold its bits. I5: they saved again."""
        wrong = []
        resumed = [e for e in events if e["event"] == "resumed"]
        if len(resumed) != self.world:
            return [f"I5: only {len(resumed)} ranks resumed"]
        for event in resumed:
            found = None if event["step"] is None else (event["source"], event["step"])
            if found != newest:
                wrong.append(f"I3: rank {event['rank']} resumed from {found}, the newest on storage is {newest}")
            elif found and event["digests"] != self.held[found][event["rank"]]:
                wrong.append(f"I1: rank {event['rank']} resumed from {found} with other bits than were saved")
            if event.get("fallbacks"):
                wrong.append(f"I2: rank {event['rank']} fell back: {event['fallbacks']}")
        if sum(e["event"] == "healthy" for e in events) != self.world:
            wrong.append(f"I5: the next saves failed: {[e for e in events if e['event'] == 'failed']}")
        return wrong

    def _verdicts(self, events: list[dict[str, Any]], outcomes: list[RankOutcome], dead: set[int]) -> list[str]:
        """I4: every survivor has a verdict in time, no two ranks have different ones, and storage agrees."""
        wrong = []
        ends: dict[int, list[dict[str, Any]]] = {}
        for event in events:
            if event["event"] in ("acknowledged", "failed"):
                ends.setdefault(event["step"], []).append(event)
        generation = next((e["generation"] for e in events if e["event"] == "resumed"), 0)
        committed = committed_on_disk(self.root)
        for step, verdicts in ends.items():
            kinds = {e["event"] for e in verdicts}
            if len(kinds) > 1:
                wrong.append(f"I4: ranks disagree about step {step}: {[(e['rank'], e.get('text')) for e in verdicts]}")
            if "failed" in kinds and (generation, step) in committed:
                wrong.append(f"I4: step {step} is committed, but ranks were told that it failed: {verdicts}")
        for outcome in outcomes:
            if outcome.rank in dead:
                continue
            last = [
                e for e in events if e["rank"] == outcome.rank and e["event"] in ("begin", "acknowledged", "failed")
            ]
            if outcome.timed_out or not last or last[-1]["event"] == "begin":
                wrong.append(f"I4: rank {outcome.rank} got no verdict: {outcome.error} {outcome.output[-3000:]}")
            elif dead:
                self.result.verdict_s.append(last[-1]["took"])
                if last[-1]["took"] > self.timeout_s + GRACE_S:
                    wrong.append(
                        f"I4: rank {outcome.rank} got its verdict only after {last[-1]['took']:.1f} s: {last[-1]}"
                    )
        return wrong

    def _contents(self) -> list[str]:
        """I1, I2: everything on offer is whole and bit-equal to what was held; what must be there is."""
        wrong = []
        on_disk = committed_on_disk(self.root)
        newest = sorted({*self.acknowledged, *on_disk}, key=lambda key: (key[1], key[0]))[-LIMIT:]
        missing = [key for key in newest if key not in on_disk]  # older ones may be retired by one not yet acknowledged
        if missing:
            wrong.append(f"I1: acknowledged (generation, step) {missing} are gone; there are {sorted(on_disk)}")
        offered = {(c.generation, c.step) for c in list_checkpoints(self.root, all=True)}
        if offered != on_disk:
            wrong.append(f"I2: readers are offered {sorted(offered)}, on disk are {sorted(on_disk)}")
        for generation, step in sorted(offered):
            checkpoint = open_checkpoint(self.root / names.step_folder(step), strict=True)
            report = checkpoint.verify(mode="full")
            if not report.ok:
                wrong.append(f"I2: step {step} is offered and damaged: {report.problems}")
                continue
            bits = bits_of(checkpoint.state_dict(""), self.world)
            held = {(rank, n): d for rank, by_name in self.held[generation, step].items() for n, d in by_name.items()}
            if bits != held:
                differing = sorted(k for k in bits.keys() | held.keys() if bits.get(k) != held.get(k))
                wrong.append(f"I2: step {step} of generation {generation} differs from what was saved in {differing}")
            self.result.checked += 1
        return wrong

    def _litter(self) -> list[str]:
        """I6: a kill leaves at most two attempts and one temporary file, gone after the next; a user's file stays."""
        wrong = []
        now = litter_on_disk(self.root)
        stayed = sorted(now & self.litter)
        if stayed:
            wrong.append(f"I6: still there after another job's gc: {stayed}")
        temporaries = [name for name in now if name.rpartition("/")[2].startswith(TEMP_PREFIX)]
        if len(temporaries) > 1 or len(now) - len(temporaries) > 2:
            wrong.append(f"I6: one kill left {sorted(now)}")
        if (self.root / NOTE).read_text() != "mine":
            wrong.append("I6: a file of the user was changed")
        self.litter = now
        self.result.most_litter = max(self.result.most_litter, len(now))
        return wrong


def phase_of(kill: Kill, events: list[dict[str, Any]], dead: set[int]) -> str:
    """Return the last failpoint that the (first) dead rank passed; between two saves that is the last of a save."""
    hits = [e["at"] for e in events if e["event"] == "hit" and e["rank"] in sorted(dead)[:1]]
    if kill.point is not None:
        return kill.point[0]
    return hits[-1].partition("@")[0] if hits else "before the first save"


def bits_of(state: dict[str, torch.Tensor], world: int) -> dict[tuple[int, str], str]:
    """Cut whole tensors the way ``crash_job.Stage`` holds them; (rank, name) to digest."""
    found = {}
    for name, value in state.items():
        if "sharded" in name:
            found |= {(rank, name): digest_of(part) for rank, part in enumerate(value.chunk(world))}
        elif "shared" in name:
            found |= {(rank, name): digest_of(value) for rank in range(world)}
        else:
            found[int(name.partition(".own")[2].partition(".")[0]), name] = digest_of(value)
    return found


def committed_on_disk(root: Path) -> set[tuple[int, int]]:
    """Return (generation, step) of every manifest, found without the library's own listing."""
    found = set()
    for path in root.glob("step-*/manifest-g*.json"):
        found.add((int(path.name[len("manifest-g") : -len(".json")]), int(path.parent.name[len("step-") :])))
    return found


def newest_committed(root: Path) -> tuple[int, int] | None:
    """Every job continues the newest checkpoint, so the highest step is the newest of the lineage."""
    return max(committed_on_disk(root), key=lambda key: (key[1], key[0]), default=None)


def litter_on_disk(root: Path) -> set[str]:
    """Return attempt folders with a file that no manifest needs, or without any, and temporary files."""
    needed = set()
    for path in root.glob("step-*/manifest-g*.json"):
        body = json.loads(path.read_bytes())["body"]
        needed |= {f"{path.parent.name}/{shard['path']}" for shard in body["shards"]}
        for reference in body.get("reused", []):
            ranks = [rank for run in reference["ranks"] for rank in range(*run)]
            needed |= {f"{reference['attempt']}/{names.shard_name(rank, reference['shards'])}" for rank in ranks}
    found = {str(p.relative_to(root)) for p in root.rglob(f"{TEMP_PREFIX}*")}
    for folder in root.glob("step-*/g*"):
        files = {str(p.relative_to(root)) for p in folder.iterdir()}
        if not files or not files <= needed:
            found.add(str(folder.relative_to(root)))
    return found


def referred_to(root: Path) -> int:
    """Return how many bytes checkpoints have in files of earlier steps."""
    bodies = [json.loads(path.read_bytes())["body"] for path in root.glob("step-*/manifest-g*.json")]
    return sum(reference["used"] for body in bodies for reference in body.get("reused", []))


def read_events(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Return the oracle's whole lines from an offset on, and the offset after them; a line that a kill cut off says nothing."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    lines = [line for line in whole.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    return [json.loads(line) for line in lines], start + len(whole)


def run_chain(
    folder: Path,
    kills: Sequence[Kill],
    world: int = 2,
    timeout_s: float = 2.0,
    progress: Callable[[], None] = lambda: None,
    incremental: bool = False,
) -> Result:
    """Run one job for each kill on one root, and a last one in peace."""
    chain = Chain(folder, world, timeout_s, incremental)
    for kill in kills:
        chain.kill(kill)
        progress()
    result = chain.finish()
    if incremental and not referred_to(chain.root):
        result.violations.append("no checkpoint refers to an earlier one: the chain shows nothing")
    return result


def run_chains(
    folder: Path,
    kills: Sequence[Kill],
    workers: int,
    world: int = 2,
    timeout_s: float = 2.0,
    progress: Callable[[], None] = lambda: None,
    incremental: bool = False,
) -> Result:
    """Deal the kills to chains that run side by side (most of a kill is survivors' waiting); one result for all."""
    lots = [kills[number::workers] for number in range(workers)]
    how = world, timeout_s, progress, incremental
    children = [_fork_chain(folder / f"chain{i}", lot, *how) for i, lot in enumerate(lots) if lot]
    total = Result()
    for pid, log in children:
        status = os.waitpid(pid, 0)[1]
        with log:
            log.seek(0)
            data = log.read()
        result = (
            pickle.loads(data) if data else Result(violations=[f"a chain died without a word: wait status {status}"])
        )
        total.add(result)
    return total


def _fork_chain(
    folder: Path, kills: Sequence[Kill], world: int, timeout_s: float, progress: Callable[[], None], incremental: bool
) -> tuple[int, Any]:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by run_chains
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, log
    try:
        try:
            result = run_chain(folder, kills, world, timeout_s, progress, incremental)
        except BaseException:
            result = Result(violations=[traceback.format_exc()])
        log.write(pickle.dumps(result))
        log.flush()
    finally:
        os._exit(0)


def enumerate_points(
    folder: Path, background: bool, world: int = 2, incremental: bool = False
) -> dict[int, list[tuple[str, int]]]:
    """Run a job with the recorder on; return each rank's failpoints in one save: first and last hit of each name."""
    folder.mkdir()
    job = Job(folder / "root", folder / "oracle", 0, background, trace=True, incremental=incremental)
    run_ranks(world, run, job)
    counts: dict[int, Counter[str]] = {rank: Counter() for rank in range(world)}
    for event in read_events(folder / "oracle", 0)[0]:
        if event["event"] == "hit":
            counts[event["rank"]][event["at"].partition("@")[0]] += 1
    return {rank: [(n, nth) for n, c in found.items() for nth in sorted({1, c})] for rank, found in counts.items()}


def random_kills(count: int, seed: int, world: int = 2, background: bool | None = None) -> list[Kill]:
    """Return seeded kills at random moments within three saves: of one rank or of all, in both modes."""
    chance = random.Random(seed)
    groups: list[tuple[int, ...]] = [(rank,) for rank in range(world)] + [tuple(range(world))]
    kills = [
        Kill(
            chance.choice(groups),
            chance.random() < 0.5,
            None,
            chance.uniform(0.0, 3.0),
            chance.choice(("agent", "rank0")),
        )
        for _ in range(count)
    ]
    return kills if background is None else [replace(kill, background=background) for kill in kills]
