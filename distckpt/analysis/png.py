"""The charts of a report as one picture, by matplotlib; the page itself needs none."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Final

from distckpt.analysis.charts import MARK_WORDS, MARKS, Bars, Chart, MarkKind, axis
from distckpt.errors import ConfigError, optional

COLOURS: Final = ("#0067a5", "#c65102", "#00795a", "#a33b8c", "#7a6a00", "#4d5b6b")
"""Those of the page's light scheme."""
MOST: Final = 60
_COLUMNS: Final = 3
_SIGNS: Final[dict[MarkKind, dict[str, Any]]] = {
    "saved": {"marker": "o", "s": 14, "facecolor": "white", "edgecolor": "#57606a"},
    "averaged": {"marker": "^", "s": 34, "color": COLOURS[3]},
    "best": {"marker": "D", "s": 34, "color": COLOURS[2]},
    "chosen": {"marker": "o", "s": 130, "facecolor": "none", "edgecolor": COLOURS[1], "linewidth": 2},
}


def write_png(path: str | os.PathLike[str], title: str, charts: Sequence[Chart | Bars], *, dpi: int = 120) -> None:
    """Draw charts, three in a row, into a PNG file. Raises ``MissingExtra`` without matplotlib.

    The first 60 are drawn. Raises ``ConfigError`` where there are none.
    """
    if not charts:
        raise ConfigError("no metric, no save: there is nothing to draw")
    figures = optional("matplotlib.figure", "plots")
    optional("matplotlib.backends.backend_agg", "plots")
    shown = [chart for chart in charts if isinstance(chart, Bars) or any(s.points for s in chart.series)][:MOST]
    rows = -(-len(shown) // _COLUMNS) or 1
    columns = max(1, min(_COLUMNS, len(shown)))
    figure = figures.Figure(figsize=(4.4 * columns, 0.5 + 2.9 * rows), dpi=dpi, layout="constrained")
    figure.suptitle(_plain(title), fontsize=12, parse_math=False)
    for index, chart in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        if isinstance(chart, Chart):
            _lines(axes, chart)
        else:
            _bars(axes, chart)
        axes.set_title(_short(chart.title), fontsize=10, parse_math=False, loc="left")
        axes.set_xlabel(_plain(chart.x_label), fontsize=8, parse_math=False)
        axes.set_ylabel(_plain(chart.unit), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#e7eaee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, shown)
    figure.savefig(os.fspath(path), format="png")


def _legend(figure: Any, charts: Sequence[Chart | Bars]) -> None:
    """Say below all what the marks are."""
    there = {mark.kind for chart in charts if isinstance(chart, Chart) for mark in chart.marks}
    axes = figure.axes[0]
    handles = [axes.scatter([], [], label=MARK_WORDS[kind], **_SIGNS[kind]) for kind in MARKS if kind in there]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() and ord(c) < 0x10000 else "?" for c in text)


def _short(text: str) -> str:
    plain = _plain(text)
    return plain if len(plain) <= 46 else f"{plain[:45]}…"


def _lines(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        if not series.points:
            continue
        colour = COLOURS[(series.colour - 1) % len(COLOURS)]
        dots = "o" if series.dots or len(series.points) == 1 else None
        gap = [(math.nan, math.nan)]
        across, up = zip(*(point for part in series.stretches for point in (*part, *gap)), strict=True)
        # matplotlib leaves a label that starts with "_" out of the legend
        axes.plot(across, up, color=colour, linewidth=1.4, marker=dots, markersize=3, label=f" {_short(series.label)}")
        if series.band:
            places, low, high = zip(*series.band, strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
    for kind in MARKS:
        heights = [(mark.x, chart.series[0].height_at(mark.x)) for mark in chart.marks if mark.kind == kind]
        known = [(x, y) for x, y in heights if y is not None]
        if known:
            axes.scatter([x for x, _ in known], [y for _, y in known], zorder=3, **_SIGNS[kind])
    for at, _ in chart.rules:
        axes.axvline(at, color="#57606a", linewidth=0.8, linestyle=":")
    if axis([y for s in chart.series for _, y in s.points], from_zero=chart.from_zero).log:
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(bottom=0)
    if len(chart.series) > 1:
        for text in axes.legend(fontsize=7, frameon=False).get_texts():
            text.set_parse_math(False)


def _bars(axes: Any, chart: Bars) -> None:
    below = [0.0] * len(chart.bars)
    for part, name in enumerate(chart.parts):
        values = [values[part] for _, values in chart.bars]
        axes.bar(range(len(values)), values, bottom=below, color=COLOURS[part % len(COLOURS)], label=name)
        below = [a + b for a, b in zip(below, values, strict=True)]
    every = max(1, -(-len(chart.bars) // 6))
    places = range(0, len(chart.bars), every)
    axes.set_xticks(list(places), [chart.bars[index][0] for index in places])
    if len(chart.parts) > 1:
        axes.set_ylim(top=max(below) * 1.2)
        axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=len(chart.parts))
