"""From measured curves to settings: pure functions, and only settings that exist.

The least depth that gives nearly all of the speed is recommended, not the fastest point: more requests in flight cost
memory and CPU time, and take more than their share of a file system that others use too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from distckpt.analysis.store_report import READ, WRITE, Advice, CurvePoint, Figure, Latency
from distckpt.config import CheckpointConfig, ObjectStoreConfig
from distckpt.dcp.read_plan import SPAN
from distckpt.dcp.reader import READ_THREADS
from distckpt.dcp.share import Rates, sharing_pays
from distckpt.storage.direct import REQUEST

NEARLY: Final = 0.95
"""What counts as all of the speed: the machine moves by as much from one minute to the next."""
ENOUGH: Final = 0.80
"""What a save in the background has to reach: it shares the CPUs with training."""
CLEARLY: Final = 0.90
"""A way is better than another if it takes less than this share of its time."""
SLACK: Final = 10.0
"""A deadline is this many times what was measured: other jobs, a slow day, a server that fails over."""
MIB: Final = 1 << 20
PART, IN_FLIGHT, DEADLINE = "DISTCKPT_STORE_PART_MIB", "DISTCKPT_STORE_IN_FLIGHT", "DISTCKPT_STORE_DEADLINE_S"


@dataclass(frozen=True, slots=True)
class Measured:
    """What advice is made from. ``state_nbytes``: how large the job's whole state is, if that was said."""

    far: bool
    object_store: bool
    world_size: int
    curve: Sequence[CurvePoint]
    figures: Sequence[Figure] = ()
    latencies: Sequence[Latency] = ()
    sharing: Sequence[tuple[float, float]] = ()
    state_nbytes: int | None = None


def knee(rates: Mapping[int, float], within: float = NEARLY) -> int:
    """Return the least depth (or size) whose rate is ``within`` of the best; ``rates`` must not be empty."""
    best = max(rates.values())
    return min(x for x, rate in rates.items() if rate >= within * best)


def settled(rates: Mapping[int, float], now: int, within: float = NEARLY, most: float = 3.0) -> int:
    """Return the depth to set: ``now`` if that is nearly as fast and not over ``most`` times the knee, else the knee."""
    found = knee(rates, within)
    stays = now in rates and rates[now] >= within * max(rates.values()) and now <= most * found
    return now if stays else found


def by_threads(curve: Iterable[CurvePoint], kind: str, request: int) -> dict[int, float]:
    """Return the rates at the measured request size nearest to ``request``, by depth."""
    points = [p for p in curve if p.kind == kind]
    nearest = _nearest(points, request)
    return {p.threads: p.rate for p in points if p.request == nearest}


def usual_request(curve: Iterable[CurvePoint], kind: str) -> int:
    """Return the measured request size nearest to the one that distckpt makes."""
    usual = REQUEST if kind == WRITE else SPAN
    return _nearest([p for p in curve if p.kind == kind], usual)


def _nearest(points: Sequence[CurvePoint], request: int) -> int:
    return min({p.request for p in points}, key=lambda size: (abs(math.log(size / request)), size), default=request)


def by_request(curve: Iterable[CurvePoint], kind: str, threads: int) -> dict[int, float]:
    """Return the rates at a measured depth, by request size."""
    return {p.request: p.rate for p in curve if p.kind == kind and p.threads == threads}


def recommend(found: Measured, config: CheckpointConfig, objects: ObjectStoreConfig | None = None) -> list[Advice]:
    """Return a line of advice for each setting that the measurements say something about, also where it may stay.

    ``config`` and ``objects`` are what is set now; ``objects`` matters for object stores only.
    """
    advice: list[Advice] = []
    if found.curve:
        advice += _far(found, config, objects or ObjectStoreConfig()) if found.far else _near(found, config)
    tried = [_tried(found, one) for one in advice]
    return [*tried, *_sharing(found, config), *_times(found, config)]


def _tried(found: Measured, advice: Advice) -> Advice:
    """Take back what made saves or loads slower when it was tried; a curve is not the whole of a save."""
    if not advice.changes or advice.setting in ("background_threads", DEADLINE):
        return advice
    rates = {(f.part, f.setting): f.rate for f in found.figures if not f.only_void}
    for part in ("save", "load"):
        before, after = rates.get((part, "default")), rates.get((part, "recommended"))
        if before is not None and after is not None and after < CLEARLY * before:
            why = f"{advice.value} was tried, and the {part} was slower: {_rate(after)}, {_rate(before)} as it is"
            return Advice(advice.setting, advice.default, advice.default, why, advice.uncertain)
    return advice


def _near(found: Measured, config: CheckpointConfig) -> list[Advice]:
    """Depth of a file system: saves write requests of 8 MiB, loads read 2 MiB with at most six threads."""
    write = by_threads(found.curve, WRITE, REQUEST)
    read = {n: rate for n, rate in by_threads(found.curve, READ, SPAN).items() if n <= max(READ_THREADS, 8)}
    threads, reading = settled(write, config.threads), min(READ_THREADS, knee(read)) if read else 1
    both = max(threads, reading)
    why = f"writes {_rate(write[threads])} with {threads}, {_rate(max(write.values()))} at most"
    if reading > threads:
        why += f"; loads read with {reading}"
    few = min(both, settled(write, config.background_threads, ENOUGH, math.inf))
    quiet = f"writes {_rate(write[few])}" if few in write else "as many as threads"
    uncertain = _moved(found, WRITE) or _shallow(write, config)
    return [
        Advice("threads", both, config.threads, why, uncertain),
        Advice("background_threads", few, config.background_threads, f"{quiet}; training needs the CPUs", uncertain),
    ]


def _far(found: Measured, config: CheckpointConfig, objects: ObjectStoreConfig) -> list[Advice]:
    """Depth of what is far: ranged reads in flight, and the parts of uploads, their sizes and their deadline."""
    read = by_threads(found.curve, READ, SPAN)
    threads = settled(read, config.threads)
    why = f"reads {_rate(read[threads])} with so many ranges in flight, {_rate(max(read.values()))} at most"
    uncertain = _moved(found, READ) or _shallow(read, config)
    advice = [Advice("threads", threads, config.threads, why, uncertain)]
    if not found.object_store:
        return advice
    write = [p for p in found.curve if p.kind == WRITE]
    best = max(p.rate for p in write)
    # Of all that is nearly as fast, what holds the least memory: parts in flight times their size.
    chosen = min((p for p in write if p.rate >= NEARLY * best), key=lambda p: (p.threads * p.request, p.request))
    held = chosen.threads * chosen.request
    part, moved = max(5, chosen.request // MIB), _moved(found, WRITE)
    moved = moved or max(p.threads for p in write) < objects.in_flight  # for lack of bytes
    a_rank = chosen.rate / found.world_size
    deadline = max(objects.deadline_s, _round_up(4 * 3 * held / a_rank, 10))
    return [
        *advice,
        Advice(PART, part, objects.part_bytes // MIB, f"{_rate(chosen.rate)} of {_rate(best)} when written", moved),
        Advice(IN_FLIGHT, chosen.threads, objects.in_flight, f"{held // MIB} MiB of each rank's memory in a save", moved),
        Advice(DEADLINE, deadline, objects.deadline_s,
               f"what is in flight takes {held / a_rank:.1f} s, one try has a quarter of the deadline", moved),
    ]  # fmt: skip


def _sharing(found: Measured, config: CheckpointConfig) -> list[Advice]:
    """Whether ranks that want the same bytes should read them once; ``auto`` unless two measurements agree.

    These are the time of small loads both ways, in which beginning weighs, and the speeds of storage and link that
    ``auto`` itself goes by.
    """
    times = {f.part: f for f in found.figures if f.part.startswith("replicated") and f.setting == "default"}
    if len(times) < 2:
        return []
    alone, shared = times["replicated, each rank"], times["replicated, shared"]
    said = f"{_rate(shared.rate)} shared, {_rate(alone.rate)} where each of {found.world_size} ranks reads"
    value, uncertain = "auto", alone.only_void or shared.only_void
    if found.sharing:
        rates = Rates(*(statistics.median(values) for values in zip(*found.sharing, strict=True)))
        pays = sharing_pays(found.world_size, rates)
        if pays and alone.rate < CLEARLY * shared.rate:
            value = "always"
        elif not pays and shared.rate < CLEARLY * alone.rate:
            value = "never"
        said += f"; storage gives {_rate(rates.store)}, the link {_rate(rates.link)}"
    return [Advice("share_loads", value, config.share_loads, said, uncertain)]


def _times(found: Measured, config: CheckpointConfig) -> list[Advice]:
    """Deadlines: ten times what the job's state would take here."""
    rates = {f.part: f for f in found.figures if f.part in ("save", "load") and f.setting == "default"}
    if not rates:
        return []
    slowest = min(f.rate for f in rates.values())
    moved = any(f.only_void for f in rates.values())
    if found.state_nbytes is None:
        room = slowest * config.timeout_s / SLACK
        why = f"enough, ten times over, for states up to {size(room)}; say --state-gb to have it worked out"
        return [Advice("timeout_s", config.timeout_s, config.timeout_s, why, moved)]
    seconds = found.state_nbytes / slowest
    commits = max((f.p99 for f in found.latencies if f.operation == "commit"), default=0.0)
    why = f"{seconds:.0f} s for {size(found.state_nbytes)} at {_rate(slowest)}, ten times over"
    advice = [Advice("timeout_s", max(config.timeout_s, _round_up(SLACK * seconds, 60)), config.timeout_s, why, moved)]
    if "save" in rates:
        saving = found.state_nbytes / rates["save"].rate + 10 * commits
        budget = max(config.preemption_budget_s, _round_up(3 * saving, 10))
        why = f"a save takes {saving:.0f} s, three times over; the scheduler's grace must be longer"
        advice.append(Advice("preemption_budget_s", budget, config.preemption_budget_s, why, moved))
    return advice


def notes(found: Measured) -> list[str]:
    """Return what is worth knowing besides settings."""
    said = []
    if found.world_size == 1:
        said.append("one process: under torchrun, with as many ranks as the job, shares and sharing are measured too")
    warm = [f.part for f in found.figures if f.cold is False]
    if warm:
        said.append(f"not cold ({', '.join(dict.fromkeys(warm))}): this file system keeps its pages in memory")
    if not found.far:
        for kind, request in ((WRITE, REQUEST), (READ, SPAN)):
            here, best = by_threads(found.curve, kind, request), [p for p in found.curve if p.kind == kind]
            top = max(best, key=lambda p: p.rate, default=None)
            if here and top is not None and max(here.values()) < CLEARLY * top.rate:
                said.append(
                    f"{kind}: {_rate(top.rate)} in requests of {top.request // MIB} MiB, {_rate(max(here.values()))} in "
                    f"those of {request // MIB} MiB, which distckpt makes"
                )
    deepest = max((p.threads for p in found.curve if p.request >= REQUEST), default=0)
    if found.curve and deepest < CheckpointConfig(".").threads:
        said.append(f"no more than {deepest} in flight were measured, for lack of bytes: choose a larger --mbytes")
    void = [f"{f.part} ({f.setting})" for f in found.figures if f.only_void]
    if void:
        said.append(f"void, the storage's own speed moved by more than a fifth meanwhile: {', '.join(void)}")
    return said


def size(nbytes: float) -> str:
    """Return a number of bytes in decimal units, as disks and networks count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def _rate(rate: float) -> str:
    return f"{size(rate)}/s"


def _round_up(value: float, step: int) -> float:
    return float(math.ceil(value / step) * step)


def _shallow(rates: Mapping[int, float], config: CheckpointConfig) -> bool:
    """Whether too few bytes were moved to measure the depth that is set."""
    return max(rates, default=0) < config.threads


def _moved(found: Measured, kind: str) -> bool:
    points = [p for p in found.curve if p.kind == kind]
    return bool(points) and all(p.void == len(p.rates) for p in points)
