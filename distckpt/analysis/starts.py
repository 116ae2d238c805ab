"""Job starts in a report: the lineage of restarts drawn over steps, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from distckpt.analysis import page
from distckpt.analysis.charts import axis, fit_ticks
from distckpt.analysis.history import Start
from distckpt.analysis.page import Head, Html, Section, element
from distckpt.analysis.record import Run, Save
from distckpt.analysis.texts import duration, moment
from distckpt.analysis.troubles import is_alive

_WIDE: Final = 860
_ROW: Final = 30
_MOST_ROWS: Final = 40


def lineage_section(run: Run, starts: Sequence[Start], now: float) -> Section | None:
    """Return the job starts: drawn over steps, and in a table."""
    if not starts:
        return None
    heads = [
        Head("start", number=True), Head("began (UTC)"), Head("host"), Head("by"), Head("from"), Head("last step", number=True),
        Head("saves", number=True), Head("done again", number=True, hint="steps that the next start did again, at least"),
        Head("idle before", number=True, hint="from the last sign of the start before"), Head("end"),
    ]  # fmt: skip
    rows = []
    for one in starts:
        source = "fresh" if one.resumed_from is None else f"step {one.resumed_from[1]} of start {one.resumed_from[0]}"
        rows.append([
            one.generation, moment(one.time), one.host, one.owner, source if one.recorded else "unknown",
            "" if one.last_step is None else one.last_step, one.saves, one.redone or "", duration(one.idle_s), _end(one, now),
        ])  # fmt: skip
    drawn = [one for one in starts if one.last_step is not None or one.resumed_from is not None][-_MOST_ROWS:]
    body = [_drawing(run, drawn) if drawn else None, page.table(heads, rows)]
    return Section("lineage", "Job starts", page.join(body))


def _end(start: Start, now: float) -> Html:
    if is_alive(start, now):
        return page.badge("running", "good")
    return page.badge("no word", "warning") if start.beat is not None else page.text("ended" if start.recorded else "")


def _drawing(run: Run, starts: Sequence[Start]) -> Html:
    """Return a row for each job start, from the step that it resumed from to its last; saves on it, arrows between rows."""
    origins = [one.resumed_from[1] for one in starts if one.resumed_from is not None]
    ends = [step for one in starts for step in (one.first_step, one.last_step) if step is not None]
    across = axis([float(step) for step in (*origins, *ends)], whole=True)
    left, width, height = 74.0, _WIDE - 74.0 - 20, _ROW * len(starts)

    def x(step: float) -> float:
        return left + across.at(step) * width

    rows = {one.generation: 14 + index * _ROW for index, one in enumerate(starts)}
    body: list[Html] = []
    for one in starts:
        y, origin = rows[one.generation], one.resumed_from
        begin = origin[1] if origin is not None else one.first_step or 0
        body.append(element("text", f"start {one.generation}", x=left - 14, y=y + 4, text_anchor="end"))
        body.append(
            _bar(x(begin), x(max(begin, one.last_step or begin)), y, f"start {one.generation}: from step {begin}")
        )
        if origin is not None and origin[0] in rows:
            link = f"M{x(begin):.1f},{rows[origin[0]]} L{x(begin):.1f},{y}"
            body.append(
                element("path", d=link, fill="none", stroke="var(--soft)", stroke_width=1.2, stroke_dasharray="3 3")
            )
    for save in run.saves:
        if save.generation in rows:
            body.append(_dot(save, x(save.step), rows[save.generation]))
    floor = height + 8
    for value, label in fit_ticks(across, width).ticks:
        body.append(element("line", x1=x(value), x2=x(value), y1=floor, y2=floor + 4, stroke="var(--line)"))
        body.append(
            element("text", label, x=min(x(value), _WIDE - 3.2 * len(label)), y=floor + 17, text_anchor="middle")
        )
    body.append(element("text", "step", x=left - 14, y=floor + 17, text_anchor="end"))
    drawing = element(
        "svg",
        *body,
        viewBox=f"0 0 {_WIDE} {height + 32}",
        role="img",
        aria_label="job starts over steps",
        class_="wide",
    )
    return page.join([_dots_legend(run), element("div", drawing, class_="scroll", tabindex=0)])


def _bar(begin: float, end: float, y: float, title: str) -> Html:
    at = {"x": begin, "y": y - 3, "width": max(2.0, end - begin), "height": 6}
    return element("rect", element("title", title), **at, rx=3, fill="var(--c1)", opacity=0.45)


def _dot(save: Save, x: float, y: float) -> Html:
    word, fill, stroke = _look(save)
    title = element("title", f"{word}: step {save.step} of start {save.generation}")
    if save.problem is not None:
        return element(
            "path", title, d=f"M{x - 5:.1f},{y - 5} l10,10 m0,-10 l-10,10", stroke=stroke, stroke_width=2.4, fill="none"
        )
    return element("circle", title, cx=x, cy=y, r=4, fill=fill, stroke=stroke, stroke_width=1.8)


def _look(save: Save) -> tuple[str, str, str]:
    if save.problem is not None:
        return "damaged", "none", "var(--bad)"
    return ("stray", "var(--bg)", "var(--c2)") if save.stray else ("saved", "var(--c1)", "var(--c1)")


def _dots_legend(run: Run) -> Html:
    kinds = {_look(save)[0]: save for save in run.saves}
    items = [
        element("li", element("svg", _dot(kinds[word], 12, 7), viewBox="0 -2 24 18", aria_hidden="true"), word)
        for word in ("saved", "stray", "damaged")
        if word in kinds
    ]
    return element("ul", *items, class_="legend")
