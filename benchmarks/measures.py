"""The promises on speed: what is required, what is aimed at, what this run has measured, met or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from benchmarks.peers import NO_CHECKSUMS, OURS
from benchmarks.report import Results, Summary
from benchmarks.run import COPIED, STAGING, VERIFIED

MIB = 1 << 20


@dataclass(frozen=True)
class Test:
    """One figure against its two bounds, None where it has no such bound. ``value`` None: not measured, ``why`` says why.

    ``void``: the figure is of void turns alone, in which the machine did not hold still. It is shown, and proves nothing.
    """

    what: str
    value: float | None
    required: float | None
    aim: float | None
    at_least: bool = True
    unit: str = ""
    digits: int = 2
    why: str = "not measured in this run"
    void: bool = False

    def met(self, bound: float) -> str:
        """Return ``met``, ``not met``, ``void`` or ``not measured``."""
        if self.value is None:
            return "not measured"
        if self.void:
            return "void"
        return "met" if (self.value >= bound if self.at_least else self.value <= bound) else "not met"

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.what}: {self.why}"
        return f"{self.what}: {self.value:.{self.digits}f}{self.unit}{' (void)' if self.void else ''}"


@dataclass(frozen=True)
class Measure:
    """One promise: its two bounds in words, and how a run is judged by it."""

    title: str
    required: str
    aim: str
    judge: Callable[[Results], Sequence[Test]] = field(repr=False)


def verdict(tests: Sequence[Test], bound: str) -> str:
    """Return the worst answer of the tests that have this bound (``required`` or ``aim``)."""
    limits = [(test, getattr(test, bound)) for test in tests]
    answers = {test.met(limit) for test, limit in limits if limit is not None}
    return next((answer for answer in ("not met", "not measured", "void", "met") if answer in answers), "not measured")


def _why(s: Summary) -> str:
    if s.error:
        return f"failed: {s.error}" if not s.error.startswith("absent") else s.error
    if s.wrong:
        return f"wrong bytes: {s.wrong}"
    return "not measured in this run" if not s.rows else "no probe"


def share(
    results: Results, workload: str, part: str, required: float | None, aim: float | None, world: int = 1, kind: str = ""
) -> Test:
    """Return the test of our share of the raw limit, or of another probe's speed, ``kind``."""
    s = results.one(workload, part, OURS, world)
    value = None if s.wrong else s.fraction(kind)
    return Test(f"{workload} x{world} of limit", value, required, aim, why=_why(s), void=s.only_void)


def times_dcp(results: Results, workload: str, part: str, required: float, aim: float | None, world: int = 1) -> Test:
    """Return the test of how many times faster than the best DCP setting it is."""
    ours = results.one(workload, part, OURS, world)
    best = results.best(workload, part, results.dcp(), world)
    value, why = None, _why(ours) if not ours.rows or ours.wrong else "no DCP setting has a figure"
    if best is not None and best.seconds and ours.seconds and not ours.wrong:
        value = best.seconds / ours.seconds
    against = best.peer if best is not None else "best DCP"
    void = ours.only_void or (best is not None and best.only_void)
    return Test(f"x{world} {against} ÷ ours", value, required, aim, unit="×", why=why, void=void)


# ---------------------------------------------------------------------- the promises


def of_verified(results: Results, workload: str, part: str, world: int, what: str) -> Test:
    """Return the share of the raw limit with every byte hashed and copied: what the rest of our own work costs."""
    return replace(share(results, workload, part, None, None, world, kind=VERIFIED), what=what)


def durable_save(results: Results) -> list[Test]:
    out = []
    for workload, world in (("llama8b", 1), ("llama8b", 2)):
        out.append(share(results, workload, "save", 0.85, 0.95, world))
        out.append(of_verified(results, workload, "save", world, f"x{world} of a write of hashed copies"))
        out.append(times_dcp(results, workload, "save", 2.0, 3.0, world))
    return out


def cpu(results: Results) -> list[Test]:
    found = [(world, results.one("llama8b", "save", OURS, world)) for world in (1, 2)]
    return [
        Test(f"llama8b x{world}", s.cpu_per_gb(), 0.35, 0.22, at_least=False, unit=" s/GB", why=_why(s))
        for world, s in found
    ]


def cold_load(results: Results) -> list[Test]:
    return [
        share(results, "llama8b", "cold load", 0.85, 0.95),
        of_verified(results, "llama8b", "cold load", 1, "of a read that is hashed and copied"),
        times_dcp(results, "llama8b", "cold load", 1.5, 3.0),
    ]


def warm_load(results: Results) -> list[Test]:
    out = [share(results, "llama8b", "warm load", 0.6, 0.85), times_dcp(results, "llama8b", "warm load", 2.0, None)]
    cached = share(results, "llama8b", "warm load", None, None, kind="cached")
    return [*out, replace(cached, what="of a verified read of the page cache")]


def small_tensors(results: Results) -> list[Test]:
    out = []
    for part in ("save", "cold load"):
        ratio = times_dcp(results, "small", part, 8.0, 12.0)
        raw = share(results, "small", part, None, 0.85)
        out += [replace(ratio, what=f"{part}, {ratio.what}"), replace(raw, what=f"{part}, of limit")]
    return out


def reshard(results: Results) -> list[Test]:
    out: list[Test] = []
    pairs = dict.fromkeys(
        (s.workload, s.world) for s in results.summaries() if s.part == "reshard" and ":" in s.workload
    )
    for workload, world in pairs:
        same, cross = (results.one(workload, part, OURS, world) for part in ("same layout", "reshard"))
        value = cross.seconds / same.seconds if same.seconds and cross.seconds and not cross.wrong else None
        void = same.only_void or cross.only_void
        what = workload.partition(": ")[2]
        out.append(Test(what, value, 1.3, 1.1, at_least=False, unit="×", why=_why(cross), void=void))
        out.append(Test("read ÷ wanted", _amplification(cross), None, 1.05, at_least=False, unit="×", why=_why(cross)))
    return out or [Test("reshard", None, 1.3, 1.1, at_least=False)]


def _amplification(s: Summary) -> float | None:
    found = [row["counters"] for row in s.rows if row.get("counters", {}).get("wanted_bytes")]
    return max((c["payload_bytes"] / c["wanted_bytes"] for c in found), default=None)


def stall(results: Results) -> list[Test]:
    out = []
    for world in (1, 2):
        ours = results.one("llama8b", "background", OURS, world)
        raw = ours.fraction()
        out.append(Test(f"x{world} ÷ memcpy", 1 / raw if raw else None, 1.2, 1.05, at_least=False, unit="×",
                        why=_why(ours), void=ours.only_void))  # fmt: skip
        pieces = ours.fraction(STAGING)
        out.append(Test(f"x{world} ÷ copy by tensors to idle memory", 1 / pieces if pieces else None, None, None, unit="×",
                        why=_why(ours), void=ours.only_void))  # fmt: skip
        best = results.best("llama8b", "background", results.dcp(), world, key="free_seconds")
        free, theirs = ours.median("free_seconds"), best.median("free_seconds") if best else None
        ratio = free / theirs if free and theirs else None
        why = _why(ours) if not ours.rows else "no DCP setting has a figure"
        void = ours.only_void or (best is not None and best.only_void)
        out.append(Test(f"x{world} ÷ DCP async", ratio, 0.5, None, at_least=False, unit="×", why=why, void=void))
    return out


def lazy_stall(results: Results) -> list[Test]:
    s = results.one("train", "train", "distckpt-lazy")
    raw = s.fraction()
    return [Test("÷ memcpy", 1 / raw if raw else None, 0.15, 0.02, at_least=False, unit="×", digits=3, why=_why(s),
                 void=s.only_void)]  # fmt: skip


def lost_time(results: Results) -> list[Test]:
    """Judge the better of the two ways to stage, and say which it is."""
    found = [results.one("train", "train", peer) for peer in (OURS, "distckpt-lazy")]
    timed = [(lost, s) for s in found if (lost := s.lost()) is not None]
    if not timed:
        return [Test("lost", None, 0.0, 0.01, at_least=False, why=_why(found[0]))]
    lost, ours = min(timed, key=lambda pair: pair[0])
    out = []
    for peer in ("dcp-async-thread", "dcp-async-process", "torch_checkpointing"):
        theirs = results.one("train", "train", peer)
        value = theirs.lost()
        less = value - lost if value is not None else None
        out.append(Test(f"{ours.peer}'s {lost:.3f} s a save, less than {peer}'s by", less, 0.0, None, digits=3, unit=" s",
                        why=_why(theirs), void=ours.only_void or theirs.only_void))  # fmt: skip
    window = ours.median("seconds")
    whole = lost * (ours.median("saves") or 1) / window if window else None
    return [*out, Test("of the window", whole, None, 0.01, at_least=False, digits=3, void=ours.only_void)]


def checksums(results: Results) -> list[Test]:
    out = []
    for part in ("save", "cold load"):
        on, off = (results.one("checksums", part, peer) for peer in (OURS, NO_CHECKSUMS))
        value = on.seconds / off.seconds if on.seconds and off.seconds else None
        why = _why(on) if not on.rows else _why(off)
        void = on.only_void or off.only_void
        out.append(Test(part, value, 1.05, 1.01, at_least=False, unit="×", digits=3, why=why, void=void))
    on, off = (results.one("checksums", "cold load", peer) for peer in (OURS, NO_CHECKSUMS))
    hashed, copied = on.limit(VERIFIED), off.limit(COPIED)
    least = copied / hashed if hashed and copied else None
    what = "cold read that is hashed and copied ÷ only copied"
    return [*out, Test(what, least, None, None, unit="×", digits=3, void=on.only_void or off.only_void)]


def memory(results: Results) -> list[Test]:
    out = []
    for part in ("save", "cold load"):
        s = results.one("llama8b", part)
        peak = max((row["peak_extra_bytes"] for row in s.rows), default=None)
        value = peak / MIB if peak is not None else None
        out.append(Test(part, value, 256, 96, at_least=False, unit=" MiB", digits=0, why=_why(s)))
    return out


def increments(results: Results) -> list[Test]:
    s = results.one("lora", "increment", "distckpt-incremental")
    rows = [row for row in s.rows if row.get("counters")]
    value = max((row["counters"]["bytes_written"] / row["nbytes"] for row in rows), default=None)
    checked = results.one("lora", "increment load", "distckpt-incremental")
    if checked.wrong:
        value = None
    why = _why(checked) if checked.wrong else _why(s)
    return [Test("bytes written ÷ state", value and value * 100, 3, 1, at_least=False, unit=" %", why=why)]


MEASURES = (
    Measure("durable save, one rank and two", "≥ 0.85 of raw write, ≥ 2× the best DCP", "≥ 0.95, ≥ 3×", durable_save),
    Measure("CPU seconds per GB saved", "≤ 0.35", "≤ 0.22", cpu),
    Measure("cold load, same layout", "≥ 0.85 of raw read, ≥ 1.5× DCP", "≥ 0.95, ≥ 3×", cold_load),
    Measure("warm load", "≥ 0.6 of memcpy, ≥ 2× DCP", "≥ 0.85", warm_load),
    Measure("18,867 small tensors, save and cold load", "≥ 8× DCP", "≥ 0.85 of raw, ≥ 12× DCP", small_tensors),
    Measure("reshard load ÷ same-layout load", "≤ 1.3", "≤ 1.1, read amplification ≤ 1.05", reshard),
    Measure("stall of a background save, second on", "≤ 1.2 × memcpy, ≤ 0.5 × DCP async", "≤ 1.05 ×", stall),
    Measure("lazy stall", "≤ 0.15 × memcpy", "≤ 0.02 ×", lazy_stall),
    Measure("lost training time a save", "below DCP async and torch_checkpointing", "≤ 1 % of the window", lost_time),
    Measure("checksums on ÷ off", "≤ 1.05", "≤ 1.01", checksums),
    Measure("peak extra memory, save and load", "≤ 256 MiB", "≤ 96 MiB", memory),
    Measure("LoRA increment, bytes written", "≤ 3 %", "≤ 1 %", increments),
)


def all_measures() -> list[Measure]:
    """Return every promise; those of slots come from the module that fills the slot."""
    from benchmarks.jobs import SLOTS, slot_module

    out = list(MEASURES)
    for slot in SLOTS:
        out += slot_module(slot).measures()
    return out


def scorecard(results: Results, measures: Sequence[Measure] | None = None) -> list[list[str]]:
    """Return one line a promise: title, required, aim, measured, required met, aim met."""
    out = []
    for measure in measures if measures is not None else all_measures():
        tests = measure.judge(results)
        measured = "; ".join(dict.fromkeys(str(test).removeprefix(": ") for test in tests))
        cells = [
            measure.title,
            measure.required,
            measure.aim,
            measured,
            verdict(tests, "required"),
            verdict(tests, "aim"),
        ]
        out.append(cells)
    return out


def print_scorecard(results: Results, console: Console | None = None) -> None:
    """Print the promises."""
    console = console or Console(width=230)
    shown = Table(title="what was promised", show_lines=True)
    for name in ("measure", "required", "aim", "measured", "required", "aim"):
        shown.add_column(name, overflow="fold")
    for *cells, required, aim in scorecard(results):
        shown.add_row(*cells, _coloured(required), _coloured(aim))
    console.print(shown)


def _coloured(text: str) -> str:
    colour = {"met": "green", "not met": "red"}.get(text, "yellow")
    return f"[{colour}]{text}[/]"
