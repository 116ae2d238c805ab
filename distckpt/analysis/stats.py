"""How two runs of numbers differ, added up block by block: nothing but sums is kept, whatever the tensor's size.

Sums are fp64, over pieces that stay in the processor's cache, in the order of the elements: the same figures on any
number of threads. NaN equals NaN and -0.0 equals 0.0; what is not finite is counted, and left out of sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch

from distckpt.averaging.arithmetic import AVERAGEABLE, PIECE

_INTEGERS: Final = frozenset({"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})
_EXPONENTS: Final = 2048
_BIAS: Final = 1023


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a tensor's elements from A to B. Of complex numbers, both parts count as numbers of their own.

    ``changed``: elements of another value; ``beyond``: of those, further apart than the tolerance. Over the elements that
    are finite on both sides: ``max_abs`` (at index ``at``) and ``mean_abs`` of |b - a|, ``max_rel`` and ``mean_rel`` of
    |b - a| / max(|a|, |b|), ``cosine`` of both (None where one is zero), ``update_norm`` ‖b - a‖₂, ``norm_a`` ‖a‖₂,
    ``norm_b`` ‖b‖₂. ``histogram``: pairs (e, how many of |b - a| lie in [2^e, 2^(e+1))), of those that changed.
    """

    elements: int
    changed: int
    beyond: int
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    at: tuple[int, ...] | None
    cosine: float | None
    update_norm: float
    norm_a: float
    norm_b: float
    nan: tuple[int, int]
    inf: tuple[int, int]
    histogram: tuple[tuple[int, int], ...]
    rounded: bool | None = None
    """Of two float dtypes: whether the narrower side is exactly the other one rounded to it."""

    @property
    def relative_update(self) -> float:
        """``update_norm`` divided by the norm of A; infinite where A is all zeros and B is not."""
        if not self.update_norm:
            return 0.0
        return self.update_norm / self.norm_a if self.norm_a else math.inf


def has_numbers(dtype: str) -> bool:
    """Whether a dtype's values can be subtracted; others (packed, scales alone) are compared by their bytes."""
    return dtype in AVERAGEABLE or dtype in _INTEGERS


def comparable(one: str, other: str) -> bool:
    """Whether tensors of these dtypes can be compared element by element: equal ones, or two kinds of real numbers."""
    if one == other or (one.startswith("complex") and other.startswith("complex")):
        return True
    return all(has_numbers(name) and not name.startswith("complex") for name in (one, other))


@dataclass(slots=True)
class Totals:
    """Sums over the elements seen so far; ``change`` tells what they say. One thread at a time."""

    dtypes: tuple[str, str]
    atol: float = 0.0
    rtol: float = 0.0
    elements: int = 0
    """Numbers seen so far."""
    changed: int = 0
    beyond: int = 0
    finite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    at: int | None = None
    """Which of the elements seen has ``max_abs``."""
    rounded: bool | None = None
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("abs", "rel", "dd", "aa", "bb", "ab"), 0.0))
    _bad: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    _histogram: torch.Tensor = field(default_factory=lambda: torch.zeros(_EXPONENTS, dtype=torch.int64))

    def __post_init__(self) -> None:
        one, other = self.dtypes
        if one != other and one in AVERAGEABLE and other in AVERAGEABLE:
            self.rounded = True

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add elements (1-D, of ``dtypes``) of both sides."""
        for one, other in zip(_pieces(a), _pieces(b), strict=True):
            if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                self._add_same(one)
            elif has_numbers(self.dtypes[0]):
                self._add_numbers(one, other)
            else:
                self._add_bytes(one, other)

    def add_same(self, a: torch.Tensor) -> None:
        """Add elements of A that B has with the same bytes."""
        for piece in _pieces(a):
            self._add_same(piece)

    def _add_same(self, a: torch.Tensor) -> None:
        if not has_numbers(self.dtypes[0]):
            self.elements += a.numel()
            return
        x = _wide(a)
        self.elements += x.numel()
        square = float(torch.dot(x, x))
        if not math.isfinite(square):
            self._count_bad(x, x)
            x = x[torch.isfinite(x)]
            square = float(torch.dot(x, x))
        self.finite += x.numel()
        for name in ("aa", "bb", "ab"):
            self._sums[name] += square

    def _add_bytes(self, a: torch.Tensor, b: torch.Tensor) -> None:
        differ = int((_octets(a) != _octets(b)).any(1).sum())
        self.elements += a.numel()
        self.changed += differ
        self.beyond += differ

    def _add_numbers(self, a: torch.Tensor, b: torch.Tensor) -> None:
        start, x, y = self.elements, _wide(a), _wide(b)
        self.elements += x.numel()
        self._check_rounding(a, b)
        difference = y - x
        size = difference.abs()
        if math.isfinite(float(size.max())):
            self.finite += x.numel()
            # fp64 cannot tell all 64-bit integers apart.
            exact = self.dtypes[0] == self.dtypes[1] and self.dtypes[0] in _INTEGERS
            changed = int((a != b).sum()) if exact else int(torch.count_nonzero(size))
        else:
            self._count_bad(x, y)
            good = torch.isfinite(size)
            changed = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
            x, y, difference, size = (torch.where(good, v, 0.0) for v in (x, y, difference, size))
            self.finite += int(good.sum())
            self.beyond += changed - int(torch.count_nonzero(size))
        self._sums["aa"] += float(torch.dot(x, x))
        self._sums["bb"] += float(torch.dot(y, y))
        self._sums["ab"] += float(torch.dot(x, y))
        if changed:
            self.changed += changed
            self._add_change(x, y, difference, size, start)

    def _add_change(
        self, x: torch.Tensor, y: torch.Tensor, difference: torch.Tensor, size: torch.Tensor, start: int
    ) -> None:
        largest = float(size.max())
        if largest > self.max_abs or self.at is None:
            self.max_abs, self.at = largest, (start + int(size.argmax())) // self.parts
        relative = size / torch.maximum(x.abs(), y.abs()).clamp_(min=torch.finfo(torch.float64).tiny)
        self.max_rel = max(self.max_rel, float(relative.max()))
        self._sums["abs"] += float(size.sum())
        self._sums["rel"] += float(relative.sum())
        self._sums["dd"] += float(torch.dot(difference, difference))
        if self._tolerant:
            self.beyond += int((size > self.atol + self.rtol * x.abs()).sum())
        # The exponent of a double lies in bits 52 to 62; a size has no sign.
        self._histogram += torch.bincount(size.view(torch.int64) >> 52, minlength=_EXPONENTS)
        self._histogram[0] -= int((size == 0).sum())

    def _count_bad(self, x: torch.Tensor, y: torch.Tensor) -> None:
        found = (x.isnan(), y.isnan(), x.isinf(), y.isinf())
        self._bad = [so_far + int(mask.sum()) for so_far, mask in zip(self._bad, found, strict=True)]

    def _check_rounding(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self.rounded is not True:
            return
        wide, narrow = (a, b) if b.element_size() <= a.element_size() else (b, a)
        same = (_octets(wide.to(narrow.dtype)) == _octets(narrow)).all(1)
        self.rounded = bool((same | (wide.isnan() & narrow.isnan())).all())

    @property
    def parts(self) -> int:
        """How many numbers make one element: 2 for complex ones."""
        return 2 if self.dtypes[0].startswith("complex") else 1

    @property
    def _tolerant(self) -> bool:
        return bool(self.atol or self.rtol)

    def change(self) -> Change:
        """Return what the sums say; ``at`` is left out, as it depends on where the elements lie."""
        sums, count = self._sums, max(self.finite, 1)
        norm_a, norm_b = math.sqrt(sums["aa"]), math.sqrt(sums["bb"])
        cosine = None
        if norm_a and norm_b:
            cosine = 1.0 if not self.changed else max(-1.0, min(1.0, sums["ab"] / (norm_a * norm_b)))
        bins = self._histogram.nonzero().flatten().tolist()
        return Change(
            elements=self.elements,
            changed=self.changed,
            beyond=self.beyond if self._tolerant else self.changed,
            max_abs=self.max_abs,
            mean_abs=sums["abs"] / count,
            max_rel=self.max_rel,
            mean_rel=sums["rel"] / count,
            at=None,
            cosine=cosine,
            update_norm=math.sqrt(sums["dd"]),
            norm_a=norm_a,
            norm_b=norm_b,
            nan=(self._bad[0], self._bad[1]),
            inf=(self._bad[2], self._bad[3]),
            histogram=tuple((index - _BIAS, int(self._histogram[index])) for index in bins),
            rounded=self.rounded,
        )


def _pieces(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(values, PIECE)


def _octets(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8).view(-1, values.element_size())


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return values as fp64; complex ones as real and imaginary parts by turns."""
    if values.is_complex():
        return torch.view_as_real(values.to(torch.complex128)).flatten()
    return values.to(torch.float64)
