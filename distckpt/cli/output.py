"""Text and JSON for people and scripts: tables that keep names whole, and control characters of stored names out."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distckpt.format.doctor import size_text as size_text

_PIPE_WIDTH = 1_000_000
_STYLES = {
    "problem": "bold red",
    "damaged": "bold red",
    "warning": "yellow",
    "stray": "yellow",
    "best": "green",
    "newest": "bold",
    "ok": "green",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column. ``fold``: may be broken over lines to fit a terminal; others keep their width.

    ``marks``: words such as ``damaged`` and ``warning`` in it are coloured on a terminal.
    """

    title: str
    right: bool = False
    fold: bool = False
    marks: bool = False


# ---------------------------------------------------------------- values as text


def clean(value: object) -> str:
    """Return text with every character that is not printable escaped: names on storage may be hostile."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """Return a message as one clean line."""
    return clean(re.sub(r"\s*[\r\n]+\s*", " ", text))


def time_text(utc: str) -> str:
    """Return a manifest's time without the letters that only machines need."""
    return utc.replace("T", " ").removesuffix("Z")


def value_text(value: object) -> str:
    """Return a metric's value: floats with six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else clean(value)


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it: NaN and infinities become their names, unknown things their repr."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return repr(value)


def readable(value: Any) -> Any:
    """Return typed JSON (``format/typed_json.py``) as plain JSON for the eye: tags go, nothing is imported or checked."""
    if isinstance(value, list):
        return [readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: readable(item) for key, item in value.items()}
    (tag, payload), *_ = value.items()
    if tag in ("$dict", "$ordered") and isinstance(payload, list):
        pairs = [pair for pair in payload if isinstance(pair, list) and len(pair) == 2]
        return {str(readable(key)): readable(item) for key, item in pairs}
    if tag == "$int" and isinstance(payload, str):
        return int(payload, 16)
    if isinstance(payload, dict) and "dtype" in payload:
        return f"{tag[1:]} {payload['dtype']} {payload.get('shape', '')}".rstrip()
    return readable(payload)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


# ---------------------------------------------------------------- tables


def width() -> int:
    """Return how many columns there are: the terminal's, or as many as it takes where output is piped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE_WIDTH


def table_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Return the columns that a table takes when nothing is broken over lines."""
    total = 0
    for index, column in enumerate(columns):
        cells = (*column.title.split("\n"), *(line for row in rows for line in row[index].split("\n")))
        total += max(map(len, cells)) + 2
    return total - 2


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Print a table; cells must be clean text (see ``clean``), and may have several lines."""
    import io

    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold" if terminal else "")
    table.show_header = any(column.title for column in columns)
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.fold,
            vertical="bottom" if "\n" in column.title else "top",
        )
    for row in rows:
        table.add_row(*(_cell(text, column.marks) for text, column in zip(row, columns, strict=True)))
    buffer = io.StringIO()
    target = sys.stdout if terminal else buffer
    Console(file=target, width=width(), highlight=False, emoji=False, color_system="auto" if terminal else None).print(
        Padding(table, (0, 0, 0, indent), expand=False), crop=False
    )
    if not terminal:
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines()))


def _cell(text: str, marks: bool) -> Any:
    from rich.text import Text

    if not marks:
        return Text(text)
    return Text(", ").join(Text(part, style=_STYLES.get(part.split(" ", 1)[0], "")) for part in text.split(", "))


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def byte_progress(title: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback (bytes done, in all) that draws a bar on standard error; None where there is none."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    shown = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
