"""A difference as one self-contained HTML page, with a heat map: a row a layer, a column a kind of parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Final

from distckpt.analysis.diff import Diff, TensorDiff
from distckpt.analysis.flags import Flag
from distckpt.analysis.page import (
    Head,
    Html,
    Section,
    badge,
    details,
    element,
    encoded,
    join,
    page,
    paragraph,
    table,
    tiles,
)
from distckpt.analysis.sides import Facts
from distckpt.engines.base import MODEL, OPTIM_STATE
from distckpt.format.doctor import size_text

ROWS: Final = 300
"""Most rows of a table of tensors or values."""
WEIGHTS: Final = "weights"


def diff_page(diff: Diff) -> bytes:
    """Return the page; nothing in it is fetched or run."""
    sections = [
        Section("suspicious", "Suspicious", join(map(_flag, diff.flags))) if diff.flags else None,
        Section("layers", "Layers", _layers(diff)),
        Section("changes", "Changed tensors", _changes(diff)),
        Section("structure", "Names, shapes, dtypes, layouts", _structure(diff)),
        Section("values", "Other values", _values(diff)),
        Section("notes", "Notes", join(paragraph(note, kind="note") for note in diff.notes)) if diff.notes else None,
    ]
    name = f"{_short(diff.a)} and {_short(diff.b)}"
    return encoded(page(f"Difference of {name}", [s for s in sections if s is not None], lead=_lead(diff)))


def _short(facts: Facts) -> str:
    name = "/".join(facts.path.rstrip("/").split("/")[-2:])
    return name if facts.step is None or "step-" in name else f"{name} (step {facts.step})"


def _lead(diff: Diff) -> Html:
    titles = ("", "path", "kind", "step", "epoch", "tensors", "bytes", "ranks")
    heads = [Head(title, number) for title, number in zip(titles, (False,) * 5 + (True,) * 3, strict=True)]
    rows = [
        (letter, f.path, f.kind, *map(_or_dash, (f.step, f.epoch, f.tensors, size_text(f.nbytes), f.world_size)))
        for letter, f in (("A", diff.a), ("B", diff.b))
    ]
    facts = [
        ("outcome", badge("equal", "good") if diff.equal else badge("different", "warning")),
        ("tensors compared", len(diff.tensors)),
        ("differ", sum(t.differs for t in diff.tensors)),
        ("equal by digests alone", diff.skipped),
        ("only in A, only in B", f"{len(diff.only_a)}, {len(diff.only_b)}"),
        ("other values differ", len(diff.values)),
        ("read, not read", f"{size_text(diff.read_bytes)}, {size_text(diff.skipped_bytes)}"),
    ]
    return join([paragraph(diff.summary), table(heads, rows), tiles(facts)])


def _flag(flag: Flag) -> Html:
    line = paragraph(flag.text, kind="bad" if flag.severity == "problem" else "warning")
    if not flag.names:
        return line
    names = element("p", join(_commas(element("code", name) for name in flag.names[:ROWS])))
    return join([line, details(_count(flag.names), names, open_=len(flag.names) <= 6)])


# ---------------------------------------------------------------- heat map


@dataclass(frozen=True, slots=True)
class Scale:
    """Shades for relative updates, by their logarithm."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Return the scale from the smallest to the largest value that is positive and finite, a decade at least."""
        found = [value for value in values if 0 < value < math.inf]
        low, high = (min(found), max(found)) if found else (1e-3, 1e-2)
        return cls(min(low, high / 10), high)

    def share(self, value: float) -> int:
        """Return how strong the colour is, in percent: 0 for nothing, else from 12 to 100."""
        if not value > 0:
            return 0
        if value >= self.high:
            return 100
        at = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(12 + 88 * at)


@dataclass(slots=True)
class HeatMap:
    """Tensors of one part of the state by layer and kind; a name on one side only has that side's letter."""

    part: str
    cells: dict[tuple[str, str], TensorDiff | str] = field(default_factory=dict)

    @property
    def scale(self) -> Scale:
        """The shades of this part alone: averages move less than weights, moments more."""
        found = (cell.relative_update for cell in self.cells.values() if isinstance(cell, TensorDiff))
        return Scale.of(value for value in found if value is not None)

    @property
    def layers(self) -> list[str]:
        """The rows, numbers in names in their order."""
        return sorted({layer for layer, _ in self.cells}, key=_natural)

    @property
    def kinds(self) -> list[str]:
        """The columns: what the most layers have first, so that those of one block stand together."""
        counts: dict[str, int] = {}
        for _, kind in self.cells:
            counts[kind] = counts.get(kind, 0) + 1
        return sorted(counts, key=lambda kind: (-counts[kind], _natural(kind)))


def place_of(name: str) -> tuple[str, str, str]:
    """Return (part, layer, kind) of a tensor: ``model.layers.3.mlp.up.weight`` is weights, layers.3, mlp.up.weight.

    A layer's name ends with the first number in it; without one it is all but the last component. Optimizer state has
    one part for each kind of state (``exp_avg``), other tensors one for their first component (``ema``).
    """
    part, rest = name.partition(".")[::2]
    if name.startswith(OPTIM_STATE):
        rest, _, part = name[len(OPTIM_STATE) :].rpartition(".")
    elif name.startswith(MODEL):
        part = WEIGHTS
    components = rest.split(".")
    number = next((i for i, c in enumerate(components[:-1]) if c.isdigit()), len(components) - 2)
    return part, ".".join(components[: number + 1]), ".".join(components[number + 1 :])


def heat_maps(diff: Diff) -> list[HeatMap]:
    """Return a heat map for each part of the state, the weights' first; scalars such as step counts are left out."""
    maps: dict[str, HeatMap] = {WEIGHTS: HeatMap(WEIGHTS)}
    for tensor in diff.tensors:
        if any(tensor.shapes):
            part, layer, kind = place_of(tensor.name)
            maps.setdefault(part, HeatMap(part)).cells[layer, kind] = tensor
    for letter, names in (("A", diff.only_a), ("B", diff.only_b)):
        for name in names:
            part, layer, kind = place_of(name)
            if part in maps:
                maps[part].cells[layer, kind] = letter
    return [found for found in maps.values() if found.cells]


def _layers(diff: Diff) -> Html:
    maps = heat_maps(diff)
    if not maps:
        return paragraph("No tensor was compared.")
    first, *others = [join([_legend(found.scale), _heat_table(found)]) for found in maps]
    rest = [details(f"{m.part}: {_count(m.cells)}", drawn) for m, drawn in zip(maps[1:], others, strict=True)]
    about = "Relative update of each tensor, ‖B − A‖ / ‖A‖: a row for each layer, a column for each kind of parameter."
    return join([paragraph(about), element("h3", maps[0].part), first, *rest, _histogram(diff)])


def _shade(share: int) -> str:
    colour = "var(--on-heat)" if share > 68 else "var(--text)"
    return f"background:color-mix(in srgb,var(--heat) {share}%,var(--bg));color:{colour}"


_CELL: Final = "padding:3px 7px;text-align:center;white-space:nowrap;font-variant-numeric:tabular-nums;"
_UPRIGHT: Final = "writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap;padding:4px 2px;font-weight:400"
_STICKY: Final = "position:sticky;left:0;background:var(--bg);white-space:nowrap;font-weight:400"


def _heat_table(found: HeatMap) -> Html:
    kinds, scale = found.kinds, found.scale
    head = [element("td"), *(element("th", element("span", kind, style=_UPRIGHT), scope="col") for kind in kinds)]
    rows = []
    for layer in found.layers:
        cells = [_heat_cell(found.cells.get((layer, kind)), scale) for kind in kinds]
        rows.append(element("tr", element("th", layer or "(top)", scope="row", style=_STICKY), *cells))
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *rows), class_="heat")
    return element("div", whole, class_="scroll", tabindex=0)


def _heat_cell(tensor: TensorDiff | str | None, scale: Scale) -> Html:
    if tensor is None:
        return element("td")
    if isinstance(tensor, str):
        return element("td", f"only {tensor}", style=_CELL + "color:var(--warn);border:1px dashed var(--warn)")
    value, title = tensor.relative_update, _title(tensor)
    if value is None:
        return element("td", tensor.how, title=title, style=_CELL + "color:var(--bad);border:1px dashed var(--bad)")
    if math.isnan(value):
        return element("td", "NaN/Inf", title=title, style=_CELL + "background:var(--bad);color:var(--bg)")
    share = scale.share(value)
    return element("td", _compact(value), title=title, data_share=share, style=_CELL + _shade(share))


def _title(tensor: TensorDiff) -> str:
    lines = [tensor.name, f"{tensor.dtypes[1]} {list(tensor.shapes[1])}"]
    if tensor.how == "digests":
        lines.append("equal digests, not read")
    if tensor.change is not None:
        c = tensor.change
        lines.append(f"{c.changed} of {c.elements} elements changed, by {c.max_abs:.3g} at most")
        lines.append(f"update norm {c.update_norm:.4g}, weight norm {c.norm_a:.4g}")
        lines.append("" if c.cosine is None else f"cosine {c.cosine:.6f}")
    return "\n".join(line for line in lines if line)


def _legend(scale: Scale) -> Html:
    steps = [scale.low * (scale.high / scale.low) ** (i / 4) for i in range(5)]
    swatches = [("unchanged", 0), *((_compact(value), scale.share(value)) for value in steps)]
    items = [element("span", text, style=f"{_CELL}display:inline-block;{_shade(share)}") for text, share in swatches]
    return element("p", *items, class_="legend")


# ---------------------------------------------------------------- histograms


def merged_histogram(tensors: Iterable[TensorDiff]) -> dict[int, int]:
    """Return how many elements of several tensors changed by [2^e, 2^(e+1)), by e."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for exponent, count in () if tensor.change is None else tensor.change.histogram:
            found[exponent] = found.get(exponent, 0) + count
    return dict(sorted(found.items()))


def _bars(histogram: Mapping[int, int], height: int, *, axis: bool) -> Html | None:
    """Draw a histogram over the logarithm of the change, linear upwards; with ticks at powers of ten."""
    if not histogram:
        return None
    low, high = min(histogram), max(histogram) + 1
    step = 12 if axis else 4
    width, most = max((high - low) * step, step), max(histogram.values())
    drawn = []
    for exponent, count in histogram.items():
        tall = max(1.0, height * count / most)
        tip = element("title", f"{count} elements by {2.0**exponent:.2g} to {2.0 ** (exponent + 1):.2g}")
        x = (exponent - low) * step
        drawn.append(element("rect", tip, x=x, y=height - tall, width=step - 1, height=tall, fill="var(--c1)"))
    for decade in _decades(low, high) if axis else ():
        tick = (decade / math.log10(2) - low) * step
        drawn.append(element("line", x1=tick, x2=tick, y1=height, y2=height + 4, stroke="var(--soft)"))
        drawn.append(element("text", f"1e{decade}", x=tick, y=height + 16, text_anchor="middle"))
    total = height + (20 if axis else 0)
    return element(
        "svg", *drawn, viewBox=f"0 0 {width} {total}", role="img", aria_label="histogram of change",
        style=f"width:{width}px;max-width:100%;height:auto",
    )  # fmt: skip


def _decades(low: int, high: int) -> Iterator[int]:
    first, last = math.ceil(low * math.log10(2)), math.floor(high * math.log10(2))
    every = max(1, (last - first) // 8)
    yield from range(first, last + 1, every)


def _histogram(diff: Diff) -> Html | None:
    drawn = _bars(merged_histogram(t for t in diff.tensors if t.name.startswith(MODEL)), 90, axis=True)
    if drawn is None:
        return None
    caption = element("figcaption", "Elements of weights by how much they changed, |b − a|")
    return element("figure", caption, drawn, style="margin-top:18px")


# ---------------------------------------------------------------- tables


def _changes(diff: Diff) -> Html:
    changed = [t for t in diff.differing if t.change is not None and t.differs]
    if not changed:
        return paragraph("No values differ.")
    titles = ("changed", "max |d|", "mean |d|", "max rel.", "mean rel.", "‖d‖ / ‖A‖", "cosine", "NaN", "Inf")
    hints = {"max rel.": "|b − a| / max(|a|, |b|)", "‖d‖ / ‖A‖": "update norm over weight norm"}
    heads = [Head("tensor"), *(Head(title, True, hints.get(title)) for title in titles), Head("|d| by size")]
    return join([table(heads, [_change_row(t) for t in changed[:ROWS]]), _more(changed)])


def _change_row(tensor: TensorDiff) -> list[object]:
    c = tensor.change
    assert c is not None
    figures = [f"{n:.3g}" for n in (c.max_abs, c.mean_abs, c.max_rel, c.mean_rel, c.relative_update)]
    bad = [f"{x} → {y}" if x or y else "" for x, y in (c.nan, c.inf)]
    cosine = "" if c.cosine is None else f"{c.cosine:.6f}"
    drawn = _bars(dict(c.histogram), 18, axis=False)
    return [element("code", tensor.name), f"{c.changed / c.elements:.1%}", *figures, cosine, *bad, drawn or ""]


def _structure(diff: Diff) -> Html:
    parts: list[Html | None] = []
    for letter, names in (("A", diff.only_a), ("B", diff.only_b)):
        if names:
            listed = element("p", join(_commas(element("code", name) for name in names[:ROWS])))
            parts.append(details(f"{_count(names)} only in {letter}", listed, open_=len(names) <= 20))
    if diff.ties:
        parts.append(paragraph("Tied with another on one side only: ", ", ".join(diff.ties[:ROWS])))
    kinds = [t for t in diff.differing if t.how in ("shape", "dtype") or t.dtypes[0] != t.dtypes[1]]
    if kinds:
        said = {None: "", True: "the narrower one is the other, rounded", False: "not by rounding alone"}
        rows = [
            [element("code", t.name), *(f"{d} {list(s)}" for d, s in zip(t.dtypes, t.shapes, strict=True)),
             said[None if t.change is None else t.change.rounded]]
            for t in kinds[:ROWS]
        ]  # fmt: skip
        parts += [table([Head("tensor"), Head("A"), Head("B"), Head("")], rows), _more(kinds)]
    if diff.relaid:
        pairs = [[a, b, count] for (a, b), count in diff.relaid.items()]
        heads = [Head("layout in A"), Head("layout in B"), Head("tensors", True)]
        parts.append(table(heads, pairs, caption="Other layouts; the same state loads from both"))
    return join(parts) if parts else paragraph("The same on both sides.")


def _values(diff: Diff) -> Html:
    if not diff.values:
        return paragraph("No differences.")
    rows = []
    for value in diff.values[:ROWS]:
        ranks = f" (ranks {', '.join(map(str, value.ranks[:8]))}{'…' * (len(value.ranks) > 8)})" if value.ranks else ""
        sides = [element("small", "absent") if t is None else element("code", t) for t in (value.a, value.b)]
        rows.append([value.section, value.path + ranks, *sides])
    return join([table([Head(title) for title in ("", "value", "A", "B")], rows), _more(diff.values)])


def _more(rows: Sequence[object]) -> Html | None:
    return paragraph(f"… and {len(rows) - ROWS} more", kind="note") if len(rows) > ROWS else None


def _commas(parts: Iterable[Html]) -> Iterator[object]:
    for index, part in enumerate(parts):
        yield from ((", ", part) if index else (part,))


def _count(tensors: Sized) -> str:
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"


def _or_dash(value: object) -> object:
    return "–" if value is None else value


def _compact(value: float) -> str:
    if not value:
        return "0"
    if math.isinf(value):
        return "∞"
    if 0.01 <= value < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text))
