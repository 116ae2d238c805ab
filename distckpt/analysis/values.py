"""How two checkpoints' values that are no tensors differ: step, metrics, config, optimizer settings, RNG, other state."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from distckpt.importers.source import Source

SECTIONS: Final = ("checkpoint", "metrics", "config", "optimizer", "rng", "state")
_RNG: Final = "rng"
_LONG: Final = 16
"""Sequences of numbers longer than this are told in one line."""
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 8


@dataclass(frozen=True, slots=True)
class ValueDiff:
    """One value that differs. ``path`` is where in its section it is; ``a`` and ``b`` are shortened texts, None: absent.

    ``ranks``: of a value that each rank has for itself, those where it differs (``a`` and ``b`` are the first one's).
    """

    section: str
    path: str
    a: str | None
    b: str | None
    ranks: tuple[int, ...] = ()


def compare_values(a: Source, b: Source) -> tuple[list[ValueDiff], list[str]]:
    """Return what differs, and notes on what could not be compared.

    A section that only one side has is left out, and said, where the other is of another format, which may have no place
    for it. Lists equal tuples and 1 equals 1.0, as formats keep them differently; NaN equals NaN.
    """
    found: list[ValueDiff] = []
    missing: dict[str, list[str]] = {}
    ours, theirs = sections(a), sections(b)
    for section in SECTIONS:
        one, other = ours.get(section), theirs.get(section)
        if a.kind != b.kind and bool(one) != bool(other):
            without = b if one else a
            missing.setdefault(f"{without.name} ({without.kind})", []).append(section)
            continue
        found += [ValueDiff(section, path, x, y) for path, x, y in differences(one or {}, other or {})]
    ranked, notes = _per_rank(a, b)
    left_out = [f"{', '.join(names)}: not compared, {side} has none" for side, names in missing.items()]
    return found + ranked, left_out + notes


def sections(source: Source) -> dict[str, Any]:
    """Return a source's plain values by section; those of single ranks are left out."""
    known = {"step": source.step, "epoch": source.epoch}
    out: dict[str, Any] = {"checkpoint": {k: v for k, v in known.items() if v is not None}}
    out["metrics"], out["config"] = source.metrics, source.config
    for name, value in source.objects.items():
        section = "optimizer" if name.startswith("optim.") else _RNG if name == _RNG else "state"
        out.setdefault(section, {})[name.removeprefix("optim.")] = value
    return out


def _per_rank(a: Source, b: Source) -> tuple[list[ValueDiff], list[str]]:
    """Compare rank by rank what each stored for itself; the same difference on several ranks is one."""
    if not a.per_rank or not b.per_rank:
        having = a if a.per_rank else b
        names = sorted({name for own in having.per_rank for name in own})
        if not names:
            return [], []
        if a.kind == b.kind:
            section = _RNG if names == [_RNG] else "state"
            text = f"of {len(having.per_rank)} ranks"
            return [ValueDiff(section, ", ".join(names), *((text, None) if a.per_rank else (None, text)))], []
        return [], [f"{', '.join(names)} of each rank: not compared, only {having.name} has that"]
    notes = []
    if len(a.per_rank) != len(b.per_rank):
        notes.append(
            f"values of each rank: {len(a.per_rank)} ranks against {len(b.per_rank)}; those that both have were compared"
        )
    seen: dict[tuple[str, str], tuple[list[int], str | None, str | None]] = {}
    for rank, (one, other) in enumerate(zip(a.per_rank, b.per_rank, strict=False)):
        for path, x, y in differences(one, other):
            section = _RNG if path.split(".", 1)[0] == _RNG else "state"
            seen.setdefault((section, path), ([], x, y))[0].append(rank)
    return [ValueDiff(s, path, x, y, tuple(ranks)) for (s, path), (ranks, x, y) in seen.items()], notes


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (path, text of A's, text of B's) of every value that differs; None for a side that has none there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            at = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                yield (at, shown(a[key]) if key in a else None, shown(b[key]) if key in b else None)
            else:
                yield from differences(a[key], b[key], at)
    elif _is_sequence(a) and _is_sequence(b) and len(a) == len(b) and not _numbers(a, b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif not same(a, b):
        texts = _array_texts(a, b)
        yield (path, *(texts or (shown(a), shown(b))))


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal: arrays by dtype and elements, numbers by value, NaN with NaN."""
    if isinstance(a, (np.ndarray, torch.Tensor)) or isinstance(b, (np.ndarray, torch.Tensor)):
        one, other = _array(a), _array(b)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.tobytes() == other.tobytes()
    if _is_sequence(a) and _is_sequence(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) is not isinstance(b, bool):
        return False
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)


def shown(value: Any) -> str:
    """Return a value as a short text; only the type and size of what is long."""
    array = _array(value) if isinstance(value, (np.ndarray, torch.Tensor)) else None
    if array is not None:
        return f"{array.dtype} {list(array.shape)}"
    if isinstance(value, (bytes, bytearray)) and len(value) > _LONG:
        return f"{len(value)} bytes"
    if _is_sequence(value) and len(value) > _LONG:
        return f"{len(value)} items"
    return _repr.repr(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _numbers(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether both are long and hold numbers alone, which nobody wants to see one by one."""
    return len(a) > _LONG and all(isinstance(x, (int, float)) for part in (a, b) for x in part)


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(value, torch.Tensor):
        octets = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return octets.reshape(*value.shape, value.element_size()) if value.numel() else octets
    return value if isinstance(value, np.ndarray) else None


def _array_texts(a: Any, b: Any) -> tuple[str, str] | None:
    """Return texts that say how many elements of two long values differ; None where they are no such values."""
    one, other = _elements(a), _elements(b)
    if one is None or other is None or len(one) != len(other) or len(one) <= _LONG:
        return None
    count = sum(x != y for x, y in zip(one, other, strict=True))
    return shown(a), f"{shown(b)}, {count} of them differ"


def _elements(value: Any) -> Sequence[Any] | None:
    if isinstance(value, np.ndarray):
        return list(value.ravel())
    return value if isinstance(value, (bytes, bytearray, list, tuple)) else None


# ---------------------------------------------------------------- RNG of ranks


def moved_streams(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return (rank of B, rank of A) where a rank of B has what another rank of A had, and A's own differs."""

    def states(per_rank: Sequence[Mapping[str, Any]]) -> list[str | None]:
        return [None if _RNG not in own else repr(own[_RNG]) for own in per_rank]

    before, after = states(a), states(b)
    first = {state: rank for rank, state in reversed(list(enumerate(before))) if state is not None}
    return [
        (rank, first[state])
        for rank, state in enumerate(after)
        if state in first and (rank >= len(before) or before[rank] != state)
    ]
