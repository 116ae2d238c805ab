"""Norms of weights and updates in a report, and what the folder takes."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.analysis import page, svg
from distckpt.analysis.charts import Chart, series_of
from distckpt.analysis.norms import Norms
from distckpt.analysis.page import Head, Section, element
from distckpt.analysis.record import Run
from distckpt.analysis.texts import number
from distckpt.format.doctor import size_text


def norm_charts(norms: Sequence[Norms]) -> list[Chart]:
    """Return weight norm, update norm and their ratio over steps."""
    charts = []
    for title, note, values in (
        ("Weight norm", "L2 norm of all weights", [(n.step, n.weight) for n in norms]),
        (
            "Update norm",
            "L2 norm of the change since the checkpoint before",
            [(n.step, n.update) for n in norms if n.since is not None],
        ),
        (
            "Update ÷ weight",
            "their ratio",
            [(n.step, _ratio(n.update, n.weight)) for n in norms if n.since is not None],
        ),
    ):
        if values:
            line = series_of(title, [(float(step), value) for step, value in values], dots=True)
            charts.append(Chart(title, "step", (line,), note=note))
    return charts


def _ratio(update: float, weight: float) -> float:
    return update / weight if weight else float("nan")


def norms_section(
    run: Run, norms: Sequence[Norms], problems: Sequence[str], charts: Sequence[Chart], nbytes: int
) -> Section | None:
    """Return the norms; where none were computed, what that would cost."""
    if not norms:
        if not run.kept or not nbytes:
            return None
        asked = f"Not computed: that reads {size_text(nbytes)} of weights once. Ask for it with --norms; the result is kept."
        said = [page.paragraph(problem, kind="bad") for problem in problems]
        return Section(
            "norms", "Weights and updates", page.join([*said, None if said else page.paragraph(asked, kind="note")])
        )
    body = [page.paragraph(problem, kind="bad") for problem in problems]
    body.append(page.grid(map(svg.line_chart, charts)))
    if len(norms) < len(run.kept):
        body.append(
            page.paragraph(f"Of {len(norms)} of {len(run.kept)} checkpoints; --norms computes the others.", kind="note")
        )
    last = norms[-1]
    heads = [
        Head("layer"),
        Head("weight norm", number=True),
        Head("update norm", number=True),
        Head("ratio", number=True),
    ]
    rows = [[layer, number(w), _maybe(u), _maybe(_ratio(u, w))] for layer, (w, u) in last.layers.items()]
    since = "" if last.since is None else f", updates since step {last.since}"
    body.append(page.details(f"Layers at step {last.step}{since}", page.table(heads, rows)))
    return Section("norms", "Weights and updates", page.join(body))


def _maybe(value: float) -> str:
    return "" if value != value else number(value)  # NaN: there is no checkpoint to compare with


# ---------------------------------------------------------------- storage


def storage_section(run: Run) -> Section:
    """Return what the folder takes, by what it is for."""
    total = sum(nbytes for _, nbytes, _ in run.storage)
    rows = []
    for what, nbytes, files in run.storage:
        share = nbytes / total if total else 0.0
        bar = element(
            "div", style=f"background:var(--c1);height:10px;width:{max(1, round(share * 160))}px;margin-top:6px"
        )
        rows.append([what, size_text(nbytes), files, f"{share:.1%}", bar])
    rows.append([element("b", "all"), element("b", size_text(total)), sum(files for *_, files in run.storage), "", ""])
    heads = [Head("what"), Head("size", number=True), Head("files", number=True), Head("share", number=True), Head("")]
    return Section("storage", "Storage", page.table(heads, rows))
