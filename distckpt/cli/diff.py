"""``distckpt diff``: what two checkpoints differ in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, byte_progress, clean, one_line, print_json, print_table, size_text
from distckpt.errors import ConfigError, first_names

if TYPE_CHECKING:
    from distckpt.analysis.diff import Diff, TensorDiff
    from distckpt.analysis.sides import Facts

_Patterns = list[str] | None


def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", show_default=False, help="Root, step, Hugging Face or DCP folder, file.")
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", show_default=False, help="The same; of any other kind, if you like.")
    ],
    step_a: Annotated[int | None, typer.Option("--step-a", min=0, show_default=False, help="This step of A.")] = None,
    step_b: Annotated[int | None, typer.Option("--step-b", min=0, show_default=False, help="This step of B.")] = None,
    weights: bool = typer.Option(False, "--weights", "-w", help="The model's tensors alone."),
    prefix_a: str = typer.Option("model.", "--prefix-a", help="A's weights: ema. for an EMA's. Implies --weights."),
    prefix_b: str = typer.Option("model.", "--prefix-b", help="B's weights, likewise."),
    only: Annotated[
        _Patterns,
        typer.Option("--only", metavar="PATTERN", show_default=False, help="Such tensors alone; again for more."),
    ] = None,
    frozen: Annotated[
        _Patterns, typer.Option("--frozen", metavar="PATTERN", show_default=False, help="Tensors that must not change.")
    ] = None,
    atol: float = typer.Option(0.0, "--atol", help="Elements differ if |B - A| > atol + rtol |A|."),
    rtol: float = typer.Option(0.0, "--rtol", help="See --atol."),
    top: int = typer.Option(20, "--top", min=0, help="Rows of each table, the largest changes first; 0 for all."),
    html: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="FILE", show_default=False, help="Also as a page, with a heat map of the layers."
        ),
    ] = None,
    allow: Annotated[
        _Patterns,
        typer.Option(
            "--allow", metavar="CLASS", show_default=False, help="Read such pickled objects as plain attributes."
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two checkpoints of any kind, layout and dtype: tensors, optimizer, config, metrics, RNG; streamed.

    Exit status 0 if they hold the same state (in whatever layout), 1 if anything differs, 2 for wrong use.
    """
    from distckpt.analysis.diff import diff_checkpoints
    from distckpt.analysis.diff_html import diff_page

    if html is not None and not (html.endswith((".html", ".htm")) and Path(html).absolute().parent.is_dir()):
        raise ConfigError(f"--html {html}: name a file that ends in .html, in a folder that is there")
    with byte_progress("comparing", enabled=not json) as progress:
        found = diff_checkpoints(
            a,
            b,
            step_a=step_a,
            step_b=step_b,
            weights=weights,
            prefix_a=prefix_a,
            prefix_b=prefix_b,
            only=only or (),
            frozen=frozen or (),
            atol=atol,
            rtol=rtol,
            allow=allow or (),
            progress=progress,
        )
    if html is not None:
        Path(html).write_bytes(diff_page(found))
    if json:
        print_json(found.plain())
    else:
        _print(found, top or None)
        if html is not None:
            print(f"page: {clean(html)}")
    if not found.equal:
        raise typer.Exit(1)


# ---------------------------------------------------------------- text

_NAME = [Column("", fold=True)]


def _print(found: Diff, top: int | None) -> None:
    print_table([Column(""), Column("", fold=True)], [["A", _side(found.a)], ["B", _side(found.b)]])
    print(f"\n{found.summary}")
    _section(
        "suspicious",
        [Column("", marks=True), Column("", fold=True), Column("", fold=True)],
        [[f.severity, one_line(f.text), _few(f.names, 3)] for f in found.flags],
        None,
    )
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        _section(f"only in {side} ({len(names)})", _NAME, [[clean(n)] for n in names], top)
    _section("tied on one side only (no difference of content)", _NAME, [[clean(n)] for n in found.ties], top)
    kinds = [t for t in found.differing if t.how in ("shape", "dtype") or t.dtypes[0] != t.dtypes[1]]
    columns = [Column("tensor", fold=True), Column("A"), Column("B"), Column("", fold=True)]
    _section("dtypes and shapes", columns, [_kind_row(t) for t in kinds], top)
    pairs = [[clean(a), clean(b), str(count)] for (a, b), count in found.relaid.items()]
    columns = [Column("layout in A", fold=True), Column("layout in B", fold=True), Column("tensors", right=True)]
    _section("layouts (no difference of content)", columns, pairs, top)
    changed = [t for t in found.differing if t.change is not None and t.differs]
    titles = ("changed", "max |d|", "mean |d|", "max rel", "mean rel", "|d|/|A|", "cosine", "NaN", "Inf")
    columns = [Column("tensor", fold=True), *(Column(title, right=True) for title in titles)]
    _section(f"changed values ({len(changed)})", columns, map(_change_row, changed), top)
    columns = [Column(title, fold=True) for title in ("", "value", "A", "B")]
    _section("other values", columns, [_value_row(v) for v in found.values], top)
    if found.notes:
        print()
    for note in found.notes:
        print(f"note: {one_line(note)}")
    print(f"\nread {size_text(found.read_bytes)}, {size_text(found.skipped_bytes)} not read: equal digests")


def _section(title: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], top: int | None) -> None:
    every = list(rows)
    if not every:
        return
    print(f"\n{title}:")
    print_table(columns, every[:top], indent=2)
    if top is not None and len(every) > top:
        print(f"  ... and {len(every) - top} more (--top 0)")


def _side(facts: Facts) -> str:
    step = "" if facts.step is None else f", step {facts.step}"
    ranks = f"{facts.world_size} rank{'s' * (facts.world_size != 1)}"
    saved = "" if facts.world_size is None else f", {ranks}, {facts.engine}"
    size = f"{facts.tensors} tensors, {size_text(facts.nbytes)}"
    return f"{clean(facts.path)} ({facts.kind}{step}, {size}{saved})"


def _few(names: Sequence[str], most: int) -> str:
    return clean(first_names(names, most))


def _kind_row(tensor: TensorDiff) -> list[str]:
    sides = [f"{d} {list(s)}" for d, s in zip(tensor.dtypes, tensor.shapes, strict=True)]
    said = "" if tensor.change is None or tensor.change.rounded is None else _ROUNDED[tensor.change.rounded]
    return [clean(tensor.name), *sides, said]


_ROUNDED = {True: "the narrower one is the other, rounded", False: "not by rounding alone"}


def _change_row(tensor: TensorDiff) -> list[str]:
    change = tensor.change
    assert change is not None
    share = f"{change.changed / change.elements:.1%}"
    figures = (change.max_abs, change.mean_abs, change.max_rel, change.mean_rel, change.relative_update)
    cosine = "" if change.cosine is None else f"{change.cosine:.6f}"
    bad = [f"{x} > {y}" if x or y else "" for x, y in (change.nan, change.inf)]
    return [clean(tensor.name), share, *(f"{n:.3g}" for n in figures), cosine, *bad]


def _value_row(value: object) -> list[str]:
    from distckpt.analysis.values import ValueDiff

    assert isinstance(value, ValueDiff)
    ranks = f" (rank {_few([str(r) for r in value.ranks], 4)})" if value.ranks else ""
    sides = ["absent" if text is None else one_line(text) for text in (value.a, value.b)]
    return [value.section, clean(value.path) + ranks, *sides]
