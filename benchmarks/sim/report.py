"""Tables and the plot of a simulation's results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MB = 1e6


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print all tables."""
    console.print(_thousand(found))
    console.print(_layouts(found))
    console.print(_proofs(found))
    console.print(_dcp(found))
    far, ours = found["dcp"]["extrapolated"], found["thousand"][-1]
    again = found["reshard"]
    console.print(
        f"one rank, 405B FSDP, {again['from']} -> {again['to']} ranks: {1e3 * again['writers_cpu_s']:.0f} ms CPU to find its "
        f"{again['headers']} shards, {1e3 * again['cpu_s']:.0f} ms with their headers read and parsed"
    )
    console.print(f"storage operations by ranks: {found['storage']}")
    console.print(
        f"{ours['ranks']} ranks x 1,000 tensors: coordinator {ours['coordinator_s']:.2f} s CPU (DCP, extrapolated: "
        f"{far['coordinator_s']:.0f} s, {far['coordinator_without_gc_s']:.0f} s with gc off), metadata "
        f"{ours['manifest']['bytes'] / MB:.1f} MB (DCP, extrapolated: {far['metadata_bytes'] / MB:.0f} MB)"
    )


def _thousand(found: Mapping[str, Any]) -> Table:
    table = Table(title="1,000 sharded tensors on every rank (CPU milliseconds)", title_justify="left")
    for name in (
        "ranks",
        "first plan",
        "leader's",
        "steady",
        "resumed",
        "receipts",
        "manifest MB",
        "write it",
        "read it",
    ):
        table.add_column(name, justify="right")
    for row in found["thousand"]:
        sizes = row["manifest"]
        cells = (
            row["first_plan"]["other_cpu_s"],
            row["first_plan"]["leader_cpu_s"],
            row["steady_plan"]["other_cpu_s"],
            row["resumed_plan"]["other_cpu_s"],
            row["receipts"]["cpu_s"],
        )
        table.add_row(
            f"{row['ranks']:,}",
            *(f"{1e3 * cell:.1f}" for cell in cells),
            f"{sizes['bytes'] / MB:.2f}",
            f"{1e3 * sizes['encode_cpu_s']:.0f}",
            f"{1e3 * sizes['decode_cpu_s']:.0f}",
        )
    return table


def _layouts(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"Layouts at {found['layouts'][0]['ranks']:,} ranks", title_justify="left")
    for name in (
        "model, layout",
        "tensors",
        "of a rank",
        "tables",
        "first plan: leader s",
        "rank ms",
        "rank B up / down",
    ):
        table.add_column(name, justify="left" if name.startswith("model") else "right")
    for name in ("steady, resumed B", "manifest MB", "headers: rank", "leader"):
        table.add_column(name, justify="right")
    for row in found["layouts"]:
        first, steady = row["first_plan"], row["steady_plan"]["other"]
        same = steady == row["resumed_plan"]["other"]
        up = first["other"]["sent"] + first["other"]["offered"]
        down = first["other"]["received"] + first["other"]["fetched"]
        table.add_row(
            f"{row['model']} {row['layout']}",
            f"{row['tensors']:,}",
            f"{row['tensors_of_a_rank']:,}",
            str(row["tables"]),
            f"{first['leader_cpu_s']:.2f}",
            f"{1e3 * first['other_cpu_s']:.0f}",
            f"{up:,} / {down:,}",
            f"{steady['sent']}" + ("" if same else " (resumed: more)"),
            f"{row['manifest']['bytes'] / MB:.2f}",
            str(row["same_layout"]["headers"]),
            str(row["same_layout_leader"]["headers"]),
        )
    return table


def _proofs(found: Mapping[str, Any]) -> Table:
    table = Table(title="All boxes of all ranks", title_justify="left")
    for name in ("layout", "ranks", "boxes", "every element once", "most bytes / fair share", "µs a box"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in found["proofs"]:
        table.add_row(
            row["layout"],
            f"{row['ranks']:,}",
            f"{row['boxes']:,}",
            "yes" if row["covered_exactly_once"] else "NO",
            f"{row['imbalance']:.4f}",
            f"{1e6 * row['cpu_s'] / row['boxes']:.1f}",
        )
    return table


def _dcp(found: Mapping[str, Any]) -> Table:
    table = Table(title="DCP's coordinator, the same shapes, 100 tensors a rank (CPU seconds)", title_justify="left")
    for name in ("ranks", "boxes", "gc", "unpickle plans", "global plan", "pickle metadata", "together", "metadata MB"):
        table.add_column(name, justify="right")
    peer = found["dcp"]
    for row in [*peer["rows"], peer["check"]]:
        table.add_row(
            f"{row['ranks']:,}",
            f"{row['boxes']:,}",
            "on" if row["gc"] else "off",
            *(
                f"{row[name]:.2f}"
                for name in ("unpickle_plans_s", "global_plan_s", "pickle_metadata_s", "coordinator_s")
            ),
            f"{row['metadata_bytes'] / MB:.1f}",
        )
    fit, check = peer["fit"], peer["check"]
    table.caption = (
        f"fit {1e6 * fit['a']:.1f} µs x boxes^{fit['b']:.3f}; predicts {check['predicted_s']:.2f} s for {check['ranks']:,} "
        f"ranks x 25 tensors, measured {check['coordinator_s']:.2f} s"
    )
    return table


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw coordinator time and metadata size against ranks times tensors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    ours = found["thousand"]
    theirs, far = [row for row in found["dcp"]["rows"] if row["gc"]], found["dcp"]["extrapolated"]
    figures = (
        ("coordinator's CPU time, first save", "seconds", "coordinator_s", [row["coordinator_s"] for row in ours]),
        ("metadata that every rank reads", "MB", "metadata_bytes", [row["manifest"]["bytes"] / MB for row in ours]),
    )
    for axis, (title, unit, name, values) in zip(axes, figures, strict=True):
        scale = MB if unit == "MB" else 1.0
        axis.plot([row["boxes"] for row in ours], values, "o-", label="distckpt, 1,000 tensors a rank")
        axis.plot([r["boxes"] for r in theirs], [r[name] / scale for r in theirs], "s-", label="DCP, measured")
        axis.plot(
            [theirs[-1]["boxes"], far["boxes"]],
            [theirs[-1][name] / scale, far[name] / scale],
            "s--",
            color=axis.lines[1].get_color(),
            fillstyle="none",
            label="DCP, extrapolated",
        )
        axis.set(xscale="log", yscale="log", xlabel="boxes in the job (ranks x tensors)", ylabel=unit, title=title)
        axis.axvline(far["boxes"], color="0.8", zorder=0)
        axis.text(far["boxes"], axis.get_ylim()[0] * 1.2, "16,384 x 1,000 ", ha="right", color="0.5", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
