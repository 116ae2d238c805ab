"""The rows that models are evaluated on: named, hashed, and dealt out to ranks in whole batches."""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from distckpt.errors import ConfigError
from distckpt.format.digest import digest
from distckpt.selection.evaluation import DataId, slug
from distckpt.selection.predictions import Array

_SCHEME: Final = b"distckpt rows 1"


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationData:
    """Rows in a fixed order; a row's position is its id. ``content``: a digest of each row, uint64."""

    id: DataId
    rows: Sequence[Any]
    content: Array

    def __len__(self) -> int:
        return self.id.rows


def evaluation_data(source: Any, name: str | None = None) -> EvaluationData:
    """Return rows as data with a name and a digest; every row is read once to hash it.

    ``source``: a ``.jsonl``, ``.csv`` or ``.tsv`` file (rows become dicts), an import path ``pkg.mod:fn`` of a function
    that returns rows, or any sequence (lists, map-style datasets). Rows are made of str, bytes, numbers, None, arrays,
    tensors, lists, tuples and dicts. ``name``: by default the file's, or ``data``.

    Raises ``ConfigError`` for anything else.
    """
    if isinstance(source, EvaluationData):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_file():
            source, name = _read_file(path), name or path.stem
        else:
            source = import_object(os.fspath(source), "data: no such file, so an import path is expected")
    if callable(source):
        name = name or getattr(source, "__name__", None)
        source = source()
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, (str, bytes)):
        raise ConfigError(
            f"data of type {type(source).__name__}: want a sequence of rows (with a length and positions)"
        )
    size = len(source)
    if not size:
        raise ConfigError("data: there are no rows")
    name = name or "data"
    slug(name)
    digests = [_row_digest(source[index], index) for index in range(size)]
    content = np.array([int.from_bytes(one[:8], "little") for one in digests], np.uint64)
    return EvaluationData(DataId(name, digest(_SCHEME + b"".join(digests)), size), source, content)


def _read_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise ConfigError(
            f"{path}: want a .jsonl, .csv or .tsv file, or an import path of a function that returns rows"
        )
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix != ".jsonl":
            return [dict(row) for row in csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")]
        rows = []
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as cause:
                raise ConfigError(f"{path}:{number}: not JSON: {cause}") from cause
            if row is not None:
                rows.append(row)
        return rows


def import_object(path: str, what: str = "") -> Any:
    """Return what ``pkg.mod:name`` means (the present folder counts as installed); ``ConfigError`` if nothing."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{path!r}: {what or 'want an import path'} such as package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except (ImportError, AttributeError) as cause:
        raise ConfigError(
            f"{path}: cannot be imported: {cause}; name a module of this folder or an installed one"
        ) from cause
    finally:
        sys.path.remove(os.getcwd())


# ---------------------------------------------------------------- digests


def _row_digest(row: Any, index: int) -> bytes:
    state = xxhash.xxh3_128()
    try:
        _feed(state, row)
    except TypeError as cause:
        raise ConfigError(f"data: row {index}: {cause}; use plain values, arrays or tensors") from cause
    return state.digest()


def _feed(state: Any, value: Any) -> None:
    """Hash a value so that no two different values give the same bytes."""
    if value is None or isinstance(value, (bool, int, float, complex)):
        _part(state, type(value).__name__, repr(value).encode())
    elif isinstance(value, str):
        _part(state, "str", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray)):
        _part(state, "bytes", bytes(value))
    elif isinstance(value, (list, tuple)):
        _part(state, "list", str(len(value)).encode())
        for item in value:
            _feed(state, item)
    elif isinstance(value, dict):
        _part(state, "dict", str(len(value)).encode())
        for key in sorted(value, key=repr):
            _feed(state, key)
            _feed(state, value[key])
    elif hasattr(value, "detach"):
        import torch

        tensor = value.detach().cpu().contiguous()
        _part(state, f"{tensor.dtype} {tuple(tensor.shape)}", tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcSU":
        _part(state, f"{value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes())
    else:
        raise TypeError(f"a value of type {type(value).__name__} cannot be hashed")


def _part(state: Any, kind: str, octets: bytes) -> None:
    state.update(f"{kind} {len(octets)}\0".encode())
    state.update(octets)


# ---------------------------------------------------------------- a rank's share


@dataclass(slots=True, eq=False)
class Rows(Sequence[Any]):
    """Some rows of the data, by their ids: what an evaluator is given. ``batches()`` gives them batch by batch.

    Batches are cut from the whole data before they are dealt out, so that a row is always computed beside the same
    rows (padding changes the last bits of a result), whatever the number of ranks.
    """

    data: EvaluationData
    ids: Array
    batch_size: int
    tick: Callable[[int], None] = field(default=lambda rows: None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.data.rows[int(one)] for one in self.ids[index]]
        return self.data.rows[int(self.ids[index])]

    def batches(self) -> Iterator[Rows]:
        """Yield the rows, in their order, in batches of at most ``batch_size``; moves the progress bar."""
        cuts = np.flatnonzero(np.diff(self.ids // self.batch_size)) + 1
        for ids in np.split(self.ids, cuts) if len(self.ids) else ():
            batch = Rows(self.data, ids, self.batch_size)
            yield batch
            self.tick(len(batch))


def share_of(data: EvaluationData, batch_size: int, rank: int, world_size: int) -> Rows:
    """Return a rank's rows: every ``world_size``-th batch; together the ranks have each row exactly once."""
    ids = np.arange(len(data))
    return Rows(data, ids[ids // batch_size % world_size == rank], batch_size)
