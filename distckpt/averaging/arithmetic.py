"""The sum itself: weighted, wide, in a fixed order, rounded once. The only place where weights meet numbers.

Every product and every sum is an IEEE operation of its own, so the result of an element does not depend on where it
stands in a block, nor on how many threads, blocks or ranks there are. (A fused multiply-add, which vector loops use and
their scalar tails may not, would make it so.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Final

import torch

PIECE: Final = 512 << 10
"""Elements of one operation: few enough to stay in the processor's cache, and enough that threads seldom meet at the
interpreter's lock. Let torch use one thread for each then (``one_thread``)."""

_NARROW: Final = frozenset(
    {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
)
_WIDE: Final = frozenset({"float32", "float64"})
_COMPLEX: Final = frozenset({"complex32", "complex64", "complex128"})
AVERAGEABLE: Final = _NARROW | _WIDE | _COMPLEX
"""Dtypes whose values are numbers that can be added."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's operations run on the thread that calls them, inside ``with``: the caller has threads of its own.

    Threads that begin inside are meant, and the calling one; others keep what they have.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accumulator(out: str) -> str:
    """Return the dtype in which a result of dtype ``out`` is summed.

    fp64 for fp32 and fp64; fp32 for what is narrower, which fp32 rounds to once (from fp64, torch would round twice).
    """
    if out in _COMPLEX:
        return "complex64" if out == "complex32" else "complex128"
    return "float32" if out in _NARROW else "float64"


def common_dtype(dtypes: Sequence[str]) -> str:
    """Return the narrowest dtype that holds every value of several: float32 for float16 with bfloat16."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    # torch promotes no float8; each of them fits into both half formats.
    half = torch.bfloat16 if "bfloat16" in dtypes else torch.float16
    kinds = [half if name.startswith("float8") else getattr(torch, name) for name in dtypes]
    return str(functools.reduce(torch.promote_types, kinds)).removeprefix("torch.")


def add(total: torch.Tensor, values: torch.Tensor, weight: float, scratch: torch.Tensor, *, first: bool) -> None:
    """Add ``weight`` times ``values`` (1-D, any averageable dtype) to ``total`` (as long), or begin with it.

    ``scratch``: at least ``PIECE`` elements of ``total``'s dtype.
    """
    for target, part in zip(_pieces(total), _pieces(values), strict=True):
        if weight == 1.0 and not first and part.dtype == target.dtype:
            target.add_(part)
            continue
        term = target if first else scratch[: part.numel()]
        term.copy_(part)
        if weight != 1.0:
            term.mul_(weight)
        if not first:
            target.add_(term)


def rounded(total: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> bool:
    """Round ``scale`` times a total (which is overwritten) into ``out``, once; returns whether all of that is finite."""
    finite = True
    for source, target in zip(_pieces(total), _pieces(out), strict=True):
        if scale != 1.0:
            source.mul_(scale)
        target.copy_(source)
        finite = finite and (_surely_finite(source, target.dtype) or all_finite(target))
    return finite


def _surely_finite(values: torch.Tensor, out: torch.dtype) -> bool:
    """Whether all values lie within ``out``'s range, by one pass; False also where that is not known (complex)."""
    if values.is_complex():
        return False
    low, high = torch.aminmax(values)  # NaN, if there is one
    limit = torch.finfo(out).max
    return bool(-limit <= low) and bool(high <= limit)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    plain = values.float() if values.element_size() == 1 else values
    return bool(torch.isfinite(plain).all())


def _pieces(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(values, PIECE) if values.numel() > PIECE else (values,)
