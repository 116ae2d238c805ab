"""Charts drawn as inline SVG, with nothing but markup: readable in light and dark, titles when the pointer rests on a mark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from distckpt.analysis import page
from distckpt.analysis.charts import MARK_WORDS, MARKS, Axis, Bars, Chart, Mark, MarkKind, Series, axis, fit_ticks
from distckpt.analysis.page import SERIES_COLOURS, Html, element
from distckpt.analysis.texts import number

WIDTH: Final = 400
HEIGHT: Final = 230
_TOP, _BOTTOM, _RIGHT = 10, 40, 14
_LETTER: Final = 6.4
"""Widest an average character of the labels gets, in pixels."""
_DASHES: Final = (None, "6 3", "2 3")
MARK_COLOURS: Final[dict[MarkKind, str]] = {
    "saved": "var(--soft)",
    "averaged": "var(--c4)",
    "best": "var(--c3)",
    "chosen": "var(--c2)",
}
Place = Callable[[float], float]


def line_chart(chart: Chart) -> Html:
    """Return a chart as a figure, with a legend where it has several lines."""
    values = [y for s in chart.series for _, y in s.points] + [y for s in chart.series for _, *b in s.band for y in b]
    if not values:
        return page.figure(page.paragraph("no finite value", kind="note"), _caption(chart))
    steps = [x for s in chart.series for x, _ in s.points]
    across, up = axis(steps, whole=True), axis(values, from_zero=chart.from_zero)
    x, y, frame = _frame(across, up, chart.x_label)
    body: list[object] = [frame]
    for at, title in chart.rules:
        if across.low <= at <= across.high:
            body.append(_rule(x(at), title))
    for series in chart.series:
        body += _line(series, x, y)
    body += _marks(chart, x, y)
    drawing = _svg(body, f"{chart.title} over {chart.x_label}")
    legend = series_legend([(s.label, s.colour) for s in chart.series]) if len(chart.series) > 1 else None
    return page.figure(page.join([legend, drawing]), _caption(chart))


def bar_chart(chart: Bars) -> Html:
    """Return stacked bars as a figure, with a legend where they have several parts."""
    totals = [sum(values) for _, values in chart.bars]
    if not totals:
        return page.figure(page.paragraph("nothing to show", kind="note"), _caption(chart))
    up = axis([0.0, *totals], from_zero=True)
    across = Axis(0.0, float(len(chart.bars)), False, ())
    x, y, frame = _frame(across, up, chart.x_label)
    body: list[object] = [frame]
    wide = max(1.0, min(46.0, (x(1.0) - x(0.0)) * 0.72))
    for index, (name, values) in enumerate(chart.bars):
        below = 0.0
        told = ", ".join(f"{part} {number(value)}" for part, value in zip(chart.parts, values, strict=True) if value)
        for part, value in enumerate(values):
            high = max(0.0, y(below) - y(below + value))
            colour = f"var(--c{part % SERIES_COLOURS + 1})"
            title = element("title", f"{name}: {told}{chart.unit and ' ' + chart.unit}")
            at = {"x": x(index + 0.5) - wide / 2, "y": y(below + value), "width": wide, "height": high}
            body.append(element("rect", title, **at, fill=colour))
            below += value
    body += _bar_names([name for name, _ in chart.bars], x)
    legend = (
        series_legend([(part, index + 1) for index, part in enumerate(chart.parts)]) if len(chart.parts) > 1 else None
    )
    return page.figure(page.join([legend, _svg(body, chart.title)]), _caption(chart))


# ---------------------------------------------------------------- parts


def _svg(body: Iterable[object], label: str) -> Html:
    return element("svg", *body, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _caption(chart: Chart | Bars) -> Html:
    title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
    return page.join([title, element("small", chart.note) if chart.note else None])


def _frame(across: Axis, up: Axis, x_label: str) -> tuple[Place, Place, Html]:
    """Return the two scales, and grid, ticks and labels."""
    left = 12 + _LETTER * max((len(label) for _, label in up.ticks), default=1)
    width, height = WIDTH - left - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x(value: float) -> float:
        return left + across.at(value) * width

    def y(value: float) -> float:
        return _TOP + (1 - up.at(value)) * height

    parts: list[object] = []
    for value, label in up.ticks:
        parts.append(element("line", x1=left, x2=WIDTH - _RIGHT, y1=y(value), y2=y(value), stroke="var(--grid)"))
        parts.append(element("text", label, x=left - 6, y=y(value) + 4, text_anchor="end"))
    floor = _TOP + height
    parts.append(element("line", x1=left, x2=WIDTH - _RIGHT, y1=floor, y2=floor, stroke="var(--line)"))
    for value, label in fit_ticks(across, width).ticks:
        parts.append(element("line", x1=x(value), x2=x(value), y1=floor, y2=floor + 4, stroke="var(--line)"))
        parts.append(element("text", label, x=_inside(x(value), label), y=floor + 19, text_anchor="middle"))
    parts.append(element("text", x_label, x=left + width / 2, y=HEIGHT - 3, text_anchor="middle"))
    return x, y, element("g", *parts)


def _inside(x: float, label: str) -> float:
    return min(x, WIDTH - len(label) * _LETTER / 2)


def _rule(x: float, title: str) -> Html:
    top = {"x1": x, "x2": x, "y1": _TOP, "y2": HEIGHT - _BOTTOM}
    return element("line", element("title", title), **top, stroke="var(--soft)", stroke_dasharray="1 3")


def _line(series: Series, x: Place, y: Place) -> list[Html]:
    colour = f"var(--c{(series.colour - 1) % SERIES_COLOURS + 1})"
    parts = []
    if series.band:
        upper = [(x(at), y(high)) for at, _, high in series.band]
        lower = [(x(at), y(low)) for at, low, _ in reversed(series.band)]
        if len(series.band) > 1:
            parts.append(element("polygon", points=_points([*upper, *lower]), fill=colour, opacity=0.16))
        for at, low, high in series.band:
            title = element("title", f"{series.label}: {number(low)} to {number(high)}")
            ends = {"x1": x(at), "x2": x(at), "y1": y(low), "y2": y(high)}
            parts.append(element("line", title, **ends, stroke=colour, opacity=0.45))
    dash = "5 3" if series.dashed else _DASHES[min(len(_DASHES) - 1, (series.colour - 1) // SERIES_COLOURS)]
    for stretch in series.stretches:
        placed = [(x(a), y(b)) for a, b in stretch]
        if len(placed) == 1 and not series.dots:
            parts.append(element("circle", cx=placed[0][0], cy=placed[0][1], r=2.6, fill=colour))
            continue
        parts.append(
            element(
                "polyline", points=_points(placed), fill="none", stroke=colour, stroke_width=1.7, stroke_dasharray=dash,
                stroke_linejoin="round",
            )
        )  # fmt: skip
    for a, b in series.points if series.dots else ():
        title = element("title", f"{series.label}: {number(b)} at {number(a, 1)}")
        parts.append(element("circle", title, cx=x(a), cy=y(b), r=2.6, fill=colour))
    return parts


def _points(placed: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)


def _marks(chart: Chart, x: Place, y: Place) -> list[Html]:
    """Draw checkpoints on the first line, or at the foot of the chart where it has no value."""
    line = chart.series[0]
    drawn = []
    for mark in sorted(chart.marks, key=lambda mark: MARKS.index(mark.kind)):
        if not line.points or not line.points[0][0] <= mark.x <= line.points[-1][0]:
            continue
        height = line.height_at(mark.x)
        drawn.append(mark_shape(mark.kind, x(mark.x), HEIGHT - _BOTTOM if height is None else y(height), mark.title))
    return drawn


def mark_shape(kind: MarkKind, x: float, y: float, title: str | None = None) -> Html:
    """Return the sign of a kind of checkpoint: told apart by shape as well as by colour."""
    said, colour = None if title is None else element("title", title), MARK_COLOURS[kind]
    if kind == "saved":
        return element("circle", said, cx=x, cy=y, r=2.8, fill="var(--bg)", stroke=colour, stroke_width=1.3)
    if kind == "chosen":
        return element("circle", said, cx=x, cy=y, r=8.0, fill="none", stroke=colour, stroke_width=2.4)
    corners = [(0, -6), (5, 0), (0, 6), (-5, 0)] if kind == "best" else [(0, -5.5), (5, 4), (-5, 4)]
    at = _points([(x + a, y + b) for a, b in corners])
    return element("polygon", said, points=at, fill=colour, stroke="var(--bg)", stroke_width=1)


def _bar_names(names: Sequence[str], x: Place) -> list[Html]:
    """Label as many bars as there is room for."""
    each = x(1.0) - x(0.0)
    every = max(1, -(-int(max(map(len, names)) * _LETTER + 8) // max(1, int(each))))
    return [
        element("text", name, x=_inside(x(index + 0.5), name), y=HEIGHT - _BOTTOM + 19, text_anchor="middle")
        for index, name in enumerate(names)
        if index % every == 0
    ]


# ---------------------------------------------------------------- legends


def series_legend(names: Sequence[tuple[str, int]]) -> Html:
    """Return what (label, colour) stand for."""
    items = []
    for label, colour in names:
        dash = _DASHES[min(len(_DASHES) - 1, (colour - 1) // SERIES_COLOURS)]
        stroke = f"var(--c{(colour - 1) % SERIES_COLOURS + 1})"
        sample = element("line", x1=1, x2=23, y1=9, y2=9, stroke=stroke, stroke_width=3, stroke_dasharray=dash)
        items.append(element("li", element("svg", sample, viewBox="0 0 24 18", aria_hidden="true"), label))
    return element("ul", *items, class_="legend")


def marks_legend(marks: Iterable[Mark]) -> Html | None:
    """Return what the signs on curves stand for, those that occur; None where there are none."""
    there = {mark.kind for mark in marks}
    items = [
        element(
            "li", element("svg", mark_shape(kind, 12, 7), viewBox="0 -2 24 18", aria_hidden="true"), MARK_WORDS[kind]
        )
        for kind in MARKS
        if kind in there
    ]
    return element("ul", *items, class_="legend") if items else None
