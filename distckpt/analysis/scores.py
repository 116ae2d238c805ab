"""Evaluations in a report: candidates side by side, metrics over epochs with intervals, confusion matrices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from distckpt.analysis import page, svg
from distckpt.analysis.candidates import Candidates, key_of
from distckpt.analysis.charts import Chart, Mark, Series, series_of
from distckpt.analysis.page import Head, Html, Section, element
from distckpt.analysis.record import Run, finite_or_not
from distckpt.analysis.texts import number
from distckpt.errors import MissingExtra
from distckpt.selection.evaluation import Evaluation, class_slugs
from distckpt.selection.ledger import candidate_of
from distckpt.selection.rules import exact_value
from distckpt.selection.statistics import Interval, interval_of, is_proportion

log = logging.getLogger("distckpt")
_LOWER: Final = ("loss", "perplexity", "cost")
_HIGHER: Final = ("accuracy", "macro_f1", "weighted_f1", "roc_auc", "pr_auc", "bleu", "precision", "recall", "f1")
_OF_CLASSES: Final = ("recall", "precision", "f1")
_COUNTED: Final = ("accuracy", "precision_", "recall_", "f1_")
"""Ratios of rows; the exact fractions of means tell a reader nothing."""
MOST_CLASSES: Final = 6
"""As many as colours tell apart; of more, the rarest are drawn."""
_MOST_CELLS: Final = 12


def mode_of(metric: str) -> str | None:
    """Return which way a built-in metric is better; None for others."""
    if metric in _LOWER:
        return "min"
    return "max" if metric in _HIGHER or metric.startswith(tuple(f"{name}_" for name in _HIGHER)) else None


def groups(candidates: Candidates) -> list[tuple[str, list[Evaluation]]]:
    """Return the evaluations that may be compared, by data and evaluator; of equal ones the newest."""
    found: dict[tuple[str, str, str], dict[object, Evaluation]] = {}
    for one in sorted(candidates.evaluations, key=lambda one: one.created):
        key = (one.data.name, one.data.digest, one.evaluator.name)
        found.setdefault(key, {})[key_of(one)] = one
    several = {name for name, digest, _ in found if len({d for n, d, _ in found if n == name}) > 1}
    by = {evaluator for *_, evaluator in found}
    out = []
    on = "" if candidates.choice is None else candidates.choice.data
    for (name, _, evaluator), ones in sorted(
        found.items(), key=lambda item: (not on.startswith(f"{item[0][0]}@"), item[0])
    ):
        ordered = sorted(
            ones.values(), key=lambda one: (not candidates.is_own(one), one.step, one.generation, one.name)
        )
        data = ordered[0].data
        title = (
            f"{data if name in several else f'{name} ({data.rows} rows)'}{f', by {evaluator}' if len(by) > 1 else ''}"
        )
        out.append((title, ordered))
    return out


def section(run: Run, candidates: Candidates) -> Section | None:
    """Return everything about evaluations, and the choice; None where there is neither."""
    if not candidates.evaluations and candidates.choice is None:
        return None
    body: list[Html] = []
    if candidates.choice is not None:
        lines = [element("li", line) for line in candidates.choice.lines()]
        winner = candidates.choice.winner
        said = "No candidate meets the rule." if winner is None else f"Chosen: {winner.name}."
        body += [
            element("h3", "The choice"),
            page.paragraph(element("b", said)),
            page.paragraph("Rule: ", candidates.choice.rule),
        ]
        body.append(element("ul", *lines))
    told = False
    for title, ones in groups(candidates):
        body.append(element("h3", f"On {title}"))
        intervals, missing = _intervals(ones)
        if missing and not told:
            body.append(page.paragraph(f"No intervals: {missing}", kind="note"))
            told = True
        body.append(_table(candidates, ones, intervals))
        charts = score_charts(candidates, ones, intervals)
        if charts:
            body += [_chart_note(charts), page.grid(map(svg.line_chart, charts))]
        body += _confusions(run, candidates, ones)
    return Section("candidates", "Candidates", page.join(body))


# ---------------------------------------------------------------- the table

Intervals = dict[tuple[tuple[str, str], str], Interval]


def _intervals(ones: Sequence[Evaluation]) -> tuple[Intervals, str]:
    """Return Wilson's intervals of all proportions, and why there are none if the library for it is absent."""
    found: Intervals = {}
    for one in ones:
        for metric in one.metrics:
            if not is_proportion(one, metric):
                continue
            try:
                interval = interval_of(one, metric)
            except MissingExtra as missing:
                return {}, str(missing)
            if interval is not None:
                found[key_of(one), metric] = interval
    return found, ""


def _table(candidates: Candidates, ones: Sequence[Evaluation], intervals: Intervals) -> Html:
    every = dict.fromkeys(metric for one in ones for metric in one.metrics)
    first = [
        name for name in ("loss", "perplexity", "accuracy", "macro_f1", "weighted_f1", "cost", "bleu") if name in every
    ]
    rest = [name for name in every if name not in first]
    metrics = [*first, *rest]
    best = {metric: _best(ones, metric) for metric in metrics}
    heads = [Head("candidate"), Head("step", number=True), *(Head(metric, number=True) for metric in metrics)]
    rows = []
    for one in ones:
        marks = [page.badge("chosen", "good")] if candidates.is_chosen(one) else []
        cells = [_cell(one, metric, intervals, key_of(one) in best[metric]) for metric in metrics]
        rows.append([page.join([element("span", candidates.label(one), class_="name"), *marks]), one.step, *cells])
    said = "Bold: the best of a column, ties included. Small: counts or n, and Wilson's 95 % interval of a proportion."
    return page.table(heads, rows, caption=said if len(ones) > 1 else said.partition(". ")[2])


def _best(ones: Sequence[Evaluation], metric: str) -> set[tuple[str, str]]:
    mode = mode_of(metric)
    if mode is None or len(ones) < 2:
        return set()
    values = {key_of(one): exact_value(candidate_of(one), metric, mode) for one in ones}
    known = [value for value in values.values() if value is not None]
    if not known:
        return set()
    top = max(known) if mode == "max" else min(known)
    return {key for key, value in values.items() if value == top}


def _cell(one: Evaluation, metric: str, intervals: Intervals, best: bool) -> Html:
    if metric not in one.metrics:
        return page.text("")
    value, counts, n = one.metrics[metric], one.counts.get(metric), one.n.get(metric)
    shown = "undefined" if value is None else f"{value:.4f}"
    counted = counts is not None and metric.startswith(_COUNTED)
    small = f"{counts[0]}/{counts[1]}" if counts is not None and counted else f"n={n}" if n else ""
    interval = intervals.get((key_of(one), metric))
    lines = [small, "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"]
    told = [part for line in lines if line for part in (element("br"), element("small", line))]
    return page.join([element("b", shown) if best else shown, *told])


# ---------------------------------------------------------------- over epochs


def score_charts(candidates: Candidates, ones: Sequence[Evaluation], intervals: Intervals) -> list[Chart]:
    """Return metrics over epochs (steps where those are unknown) of the run's own checkpoints; none for a single one."""
    own = [one for one in ones if candidates.is_own(one)]
    if len(own) < 2:
        return []
    epochs = [one.checkpoint.epoch for one in own]
    known = all(epoch is not None for epoch in epochs) and len(set(epochs)) == len(epochs)
    places = {key_of(one): float(one.checkpoint.epoch or 0) if known else float(one.step) for one in own}
    label = "epoch" if known else "step"
    classes = own[0].classes or ()
    slugs = class_slugs(classes) if classes else ()
    rare = sorted(range(len(classes)), key=lambda i: own[0].support.get(classes[i], 0))[:MOST_CLASSES]
    marks = tuple(
        Mark(places[key_of(one)], "chosen", f"chosen: {one.name}") for one in own if candidates.is_chosen(one)
    )
    charts = []
    of_classes = {f"{kind}_{slug}" for kind in _OF_CLASSES for slug in slugs}
    for metric in dict.fromkeys(metric for one in own for metric in one.metrics if metric not in of_classes):
        line = _line(own, metric, metric, places, intervals, 1)
        charts.append(Chart(metric, label, (line,), marks))
    for kind in _OF_CLASSES:
        lines = [
            _line(own, f"{kind}_{slugs[i]}", classes[i], places, intervals, at + 1) for at, i in enumerate(sorted(rare))
        ]
        lines = [line for line in lines if line.points]
        if lines:
            note = f"the {MOST_CLASSES} rarest of {len(classes)} classes" if len(classes) > MOST_CLASSES else ""
            charts.insert(0, Chart(f"{kind} of each class", label, tuple(lines), marks, note=note))
    return charts


def _line(
    own: Sequence[Evaluation],
    metric: str,
    label: str,
    places: dict[tuple[str, str], float],
    intervals: Intervals,
    colour: int,
) -> Series:
    values = [(places[key_of(one)], finite_or_not(one.metrics.get(metric))) for one in own]
    line = series_of(label, [(x, y) for x, y in values if y is not None], colour=colour, dots=True)
    known = [(places[key_of(one)], intervals.get((key_of(one), metric))) for one in own]
    band = sorted((x, interval.low, interval.high) for x, interval in known if interval is not None)
    return Series(label, line.points, colour, dots=True, band=tuple(band), lost=line.lost)


def _chart_note(charts: Sequence[Chart]) -> Html:
    banded = any(series.band for chart in charts for series in chart.series)
    legend = svg.marks_legend(charts[0].marks)
    said = "Bands: Wilson's 95 % interval, of proportions only (F1 and areas are none)." if banded else ""
    return page.join([legend, page.paragraph(said, kind="note") if said else None])


def all_charts(candidates: Candidates) -> list[Chart]:
    """Return the charts of all data, their names in the titles."""
    return [
        replace(chart, title=f"{title}: {chart.title}")
        for title, ones in groups(candidates)
        for chart in score_charts(candidates, ones, _intervals(ones)[0])
    ]


# ---------------------------------------------------------------- confusion


def _confusions(run: Run, candidates: Candidates, ones: Sequence[Evaluation]) -> list[Html]:
    """Return the matrices: those of the chosen, best and newest checkpoint, the others folded away."""
    having = [one for one in ones if one.confusion is not None and one.classes is not None]
    if not having:
        return []
    marked = [save.digest for save in (run.best, run.newest) if save is not None]
    first = [one for one in having if candidates.is_chosen(one) or one.checkpoint.digest in marked] or having[-1:]
    rest = [one for one in having if one not in first]
    body = [
        element("h3", "Confusion: rows are the true class"),
        page.grid(_confusion(candidates.label(one), one) for one in first),
    ]
    if rest:
        body.append(
            page.details(f"{len(rest)} more", page.grid(_confusion(candidates.label(one), one) for one in rest))
        )
    return body


def _confusion(label: str, one: Evaluation) -> Html:
    assert one.classes is not None
    assert one.confusion is not None
    if len(one.classes) > _MOST_CELLS:
        return page.figure(_worst(one), label)
    rows = []
    for true, counts in zip(one.classes, one.confusion, strict=True):
        total = sum(counts)
        rows.append(element("tr", element("th", true, scope="row"), *(_heat(count, total) for count in counts)))
    heads = element(
        "tr", element("th", "true \\ said"), *(element("th", name, class_="n", scope="col") for name in one.classes)
    )
    whole = element("table", element("thead", heads), element("tbody", *rows), class_="confusion")
    return page.figure(element("div", whole, class_="scroll", tabindex=0), label)


def _heat(count: int, total: int) -> Html:
    share = count / total if total else 0.0
    colour = ";color:var(--on-heat)" if share > 0.55 else ""
    style = f"background:color-mix(in srgb,var(--heat) {share:.0%},transparent){colour}"
    return element("td", count, element("br"), f"{share:.1%}" if total else "–", class_="n", style=style)


def _worst(one: Evaluation) -> Html:
    """Return the ten commonest errors: a matrix of so many classes has no room for its numbers."""
    assert one.classes is not None
    assert one.confusion is not None
    errors = [
        (count, one.classes[i], one.classes[j], sum(row))
        for i, row in enumerate(one.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    heads = [Head("true"), Head("said"), Head("rows", number=True), Head("of the class", number=True)]
    rows = [
        [true, said, number(count, 1), f"{count / total:.1%}"]
        for count, true, said, total in sorted(errors, key=lambda e: -e[0])[:10]
    ]
    return page.table(heads, rows, caption=f"the commonest errors among {len(one.classes)} classes")
