"""The weights of one model, out of a checkpoint that holds more: names chosen and cleaned, ties kept, dtypes cast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from distckpt.dcp.leaves import torch_dtype
from distckpt.engines.base import MODEL, clean_fqn
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.export.stream import Buffer, Stream
from distckpt.format.dtypes import itemsize

DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
"""What weights can be cast to."""
_FLOATS: Final = (*DTYPES, "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by the model's own names. ``aliases``: further names of tied ones. ``prefix``: what the names had before."""

    tensors: Mapping[str, Stream]
    aliases: Mapping[str, str]
    prefix: str

    @property
    def names(self) -> list[str]:
        """Every name, those of tied tensors too."""
        return [*self.tensors, *self.aliases]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(stream.nbytes for stream in self.tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape behind every name."""
        every = {name: stream.shape for name, stream in self.tensors.items()}
        return every | {alias: every[name] for alias, name in self.aliases.items()}

    def written_under(self, first: Iterable[str]) -> Weights:
        """Return the same with tied tensors stored under these names where they are among their names."""
        tensors, aliases = dict(self.tensors), dict(self.aliases)
        for name in first:
            if name in aliases:
                old = aliases.pop(name)
                tensors[name] = tensors.pop(old)
                aliases = {alias: name if target == old else target for alias, target in aliases.items()} | {old: name}
        return replace(self, tensors=tensors, aliases=aliases)

    def untied(self) -> Weights:
        """Return the same with every name a tensor of its own."""
        return replace(
            self, tensors={**self.tensors, **{a: self.tensors[n] for a, n in self.aliases.items()}}, aliases={}
        )


def choose_weights(
    tensors: Mapping[str, Stream], aliases: Mapping[str, str], prefix: str = MODEL, *, where: str = "checkpoint"
) -> Weights:
    """Return the tensors whose names start with ``prefix``, without it and without what wrappers put into names.

    A tensor that an average only follows (``ema.…`` stored as ``model.…``) counts as one of the prefix.
    Raises ``IncompatibleState`` where no name starts so, or two names become the same.
    """
    names = {name: aliases.get(name, name) for name in (*tensors, *aliases) if name.startswith(prefix)}
    if not names:
        known = sorted({f"{name.split('.', 1)[0]}." for name in tensors})[:10]
        raise IncompatibleState(f"{where}: no tensor's name starts with {prefix!r}; names start with {known}")
    found: dict[str, Stream] = {}
    tied: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, stored in names.items():
        clean = clean_fqn(name.removeprefix(prefix))
        if clean in found or clean in tied:
            raise IncompatibleState(f"{where}: two tensors are called {clean!r} without their wrappers' names")
        if stored in first:
            tied[clean] = first[stored]
        else:
            first[stored] = clean
            found[clean] = tensors[stored]
    return Weights(found, tied, prefix)


def ema_prefix(objects: Mapping[str, Any], name: str, *, where: str = "checkpoint") -> str:
    """Return the prefix of an average that ``EMAModel`` saved: ``ema.``, or ``ema.0.999.`` where it holds several.

    ``name``: the stateful's name, the average's, or both with a dot; empty for the only one there is. Raises
    ``ConfigError`` listing what there is.
    """
    known = {
        stateful: list(value["averages"])
        for stateful, value in objects.items()
        if isinstance(value, Mapping) and isinstance(value.get("averages"), Mapping) and "updates" in value
    }
    every = {
        f"{stateful}.{average}" if average else stateful: average for stateful, a in known.items() for average in a
    }
    fits = [full for full, average in every.items() if name in ("", full, average)]
    fits = fits or [full for full in every if full.startswith(f"{name}.")]
    if len(fits) != 1:
        there = ", ".join(every) or "none"
        what = f"--ema {name}" if name else "--ema"
        raise ConfigError(f"{where}: {what} fits {len(fits)} averages; there are {there}: name one of them")
    return f"{fits[0]}."


# ---------------------------------------------------------------- dtypes


@dataclass(slots=True)
class CastNotes:
    """What a cast did to values: names of tensors with values that overflowed, and the largest relative change."""

    overflowed: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    nan: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)


def is_float(dtype: str) -> bool:
    """Whether a dtype's name is that of floating numbers."""
    return dtype in _FLOATS


def cast_weights(weights: Weights, dtype: str | None) -> tuple[Weights, CastNotes]:
    """Return the weights with floating tensors in ``dtype`` (None: as they are); others are never touched.

    Values are looked at as they are read: see the notes once all was. Raises ``ConfigError`` for an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    notes = CastNotes()
    tensors = {
        name: _cast(name, stream, dtype or stream.dtype, notes) if is_float(stream.dtype) else stream
        for name, stream in weights.tensors.items()
    }
    return replace(weights, tensors=tensors), notes


def _cast(name: str, stream: Stream, dtype: str, notes: CastNotes) -> Stream:
    source, target = torch_dtype(stream.dtype), torch_dtype(dtype)
    size, wide = itemsize(stream.dtype), itemsize(dtype)

    def read(start: int, stop: int) -> Buffer:
        first, last = start // wide, -(-stop // wide)
        octets = torch.frombuffer(bytearray(stream.read(first * size, last * size)), dtype=torch.uint8)
        before = octets.view(source)
        after = before.to(target)
        _note(name, before.float() if size < 4 else before, after, notes, same=dtype == stream.dtype)
        found = after.contiguous().view(torch.uint8).numpy().data
        return found[start - first * wide : stop - first * wide]

    return Stream(dtype, stream.shape, read)


def _note(name: str, before: torch.Tensor, after: torch.Tensor, notes: CastNotes, *, same: bool) -> None:
    finite = torch.isfinite(before)
    if not bool(finite.all()):
        missing, inf = int(torch.isnan(before).sum()), int(torch.isinf(before).sum())
        for table, count in ((notes.nan, missing), (notes.infinite, inf)):
            if count:
                table[name] = table.get(name, 0) + count
    if same:
        return
    lost = int((finite & ~torch.isfinite(after)).sum())
    if lost:
        notes.overflowed[name] = notes.overflowed.get(name, 0) + lost
    elif before.numel():
        change = (after.to(before.dtype) - before).abs().nan_to_num(0).max() / before.abs().nan_to_num(0).max().clamp(
            min=1e-30
        )
        notes.largest[name] = max(notes.largest.get(name, 0.0), float(change))
