"""Do the members have the same tensors, and what becomes of each: averaged, copied, refused. Nothing is averaged here.

The one comparison of names, shapes, dtypes and ties, made before a byte is read: no zip of two lists ever decides which
tensor meets which.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from distckpt.averaging.arithmetic import AVERAGEABLE, common_dtype
from distckpt.averaging.sources import Member
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError, IncompatibleState, first_names
from distckpt.export.stream import CHUNK, Stream
from distckpt.format.dtypes import itemsize

log = logging.getLogger("distckpt")

How = Literal["average", "newest", "equal"]
INTEGERS: Final = ("newest", "equal")
_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
_SCALES: Final = re.compile(r"(_scale|_scale_inv|_scales|\.scales?|_zero_points?|_amax|_absmax)\b")
_QUANTISED: Final = re.compile(r"(^|\.)(qweight|qzeros|weight_packed)$")


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """One tensor of the result: how it comes about, and its stream in each member, newest last.

    ``equal``: the newest's bytes, which all members must have.
    """

    dtype: str
    shape: tuple[int, ...]
    how: How
    streams: tuple[Stream, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a person decides about tensors. ``integers``: take the newest's, or demand equality. ``copy``: patterns of

    names (``*.mask``) that are taken from the newest whatever they are. ``dtype``: of averaged model tensors, None for
    the common one of the members. ``followed``: names (``model.x``) that are the newest's; no patterns, and any number.
    """

    integers: str = "newest"
    copy: Sequence[str] = ()
    dtype: str | None = None
    batchnorm: str = "refuse"
    followed: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """All of them as text, the same in every process."""
        return repr((self.integers, tuple(self.copy), self.dtype, self.batchnorm, sorted(self.followed)))

    def __post_init__(self) -> None:
        if self.integers not in INTEGERS:
            raise ConfigError(f"integers={self.integers!r}: choose one of {', '.join(INTEGERS)}")
        if self.batchnorm not in ("refuse", "copy_newest"):
            raise ConfigError(f"batchnorm={self.batchnorm!r}: want 'refuse', 'copy_newest', or data to recompute it on")
        if self.dtype is not None and self.dtype not in AVERAGEABLE:
            raise ConfigError(f"dtype={self.dtype!r}: choose one of {', '.join(sorted(AVERAGEABLE))}")
        if isinstance(self.copy, str):
            raise ConfigError(f"copy={self.copy!r}: want a sequence of patterns, not one string")


@dataclass(frozen=True, slots=True)
class Structure:
    """The result's tensors in the newest's order, further names of tied ones, and what was assumed."""

    tensors: dict[str, Mixed]
    aliases: dict[str, str]
    notes: list[str]


def compare(members: Sequence[Member], rules: Rules) -> Structure:
    """Compare all members with the newest and decide about each tensor.

    Raises ``IncompatibleState`` naming tensors and checkpoints: names that only some have, shapes, kinds of dtype,
    quantised tensors, BatchNorm statistics that differ.
    """
    newest = members[-1]
    _check_names(members)
    notes: list[str] = []
    aliases: dict[str, str] = {}
    stored = {own: name for name, own in newest.names.items() if own not in newest.source.aliases}
    tensors: dict[str, Mixed] = {}
    order = {own: i for i, own in enumerate(newest.source.tensors)}
    for name, own in sorted(newest.names.items(), key=lambda item: order.get(item[1], len(order))):
        target = stored.get(newest.source.aliases.get(own, ""))
        if target is not None and _tied_everywhere(members, name, target, notes):
            aliases[name] = target
        else:
            tensors[name] = _mixed(members, name, rules)
    _check_shapes(members, tensors)
    _check_quantised(tensors)
    tensors, said = _with_statistics(members, tensors, rules)
    return Structure(tensors, aliases, notes + said)


def statistics(names: Sequence[str]) -> list[str]:
    """Return the names that are BatchNorm's running statistics: mean, variance, and the counter beside them."""
    known = set(names)
    stems = [n.removesuffix("running_mean") for n in names if n.endswith("running_mean")]
    return [s + part for s in stems if s + "running_var" in known for part in _STATISTICS if s + part in known]


def _check_names(members: Sequence[Member]) -> None:
    newest = members[-1]
    problems = []
    for member in members[:-1]:
        missing, extra = newest.names.keys() - member.names.keys(), member.names.keys() - newest.names.keys()
        if missing:
            problems.append(f"{member.label} lacks {first_names(sorted(missing), 8)}")
        if extra:
            problems.append(f"{newest.label} lacks {first_names(sorted(extra), 8)}, which {member.label} has")
    if problems:
        raise IncompatibleState(
            f"the checkpoints hold different tensors: {'; '.join(problems[:5])}; nothing was averaged"
        )


def _stream(member: Member, name: str) -> Stream:
    return member.source.tensors[member.stored(name)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name.removeprefix(MODEL), p) for p in patterns)


def _mixed(members: Sequence[Member], name: str, rules: Rules) -> Mixed:
    streams = tuple(_stream(member, name) for member in members)
    newest = streams[-1]
    if name in rules.followed or _matches(name, rules.copy):
        return Mixed(newest.dtype, newest.shape, "newest", streams)
    if newest.dtype.startswith(("float8_e8", "float4", "bits")):
        raise IncompatibleState(f"{name} is {newest.dtype}, which is no number of its own; dequantise it first")
    numbers = [stream.dtype in AVERAGEABLE for stream in streams]
    if len(set(numbers)) > 1:
        other = numbers.index(not numbers[-1])
        raise IncompatibleState(
            f"{name} is {streams[other].dtype} in {members[other].label}, {newest.dtype} in {members[-1].label}: numbers "
            "of different kinds cannot be averaged"
        )
    if not numbers[-1]:
        return Mixed(newest.dtype, newest.shape, "equal" if rules.integers == "equal" else "newest", streams)
    if not name.startswith(MODEL):
        # Optimizers count their steps in tensors without dimensions; a mean of counts belongs to no state at all.
        how: How = "average" if newest.shape else "newest"
        return Mixed(
            common_dtype([s.dtype for s in streams]) if newest.shape else newest.dtype, newest.shape, how, streams
        )
    return Mixed(rules.dtype or common_dtype([s.dtype for s in streams]), newest.shape, "average", streams)


def _check_shapes(members: Sequence[Member], tensors: Mapping[str, Mixed]) -> None:
    problems = [
        f"{name} is {list(stream.shape)} in {member.label}, {list(mixed.shape)} in {members[-1].label}"
        for name, mixed in tensors.items()
        for member, stream in zip(members, mixed.streams, strict=True)
        if stream.shape != mixed.shape
    ]
    if problems:
        raise IncompatibleState(
            f"{len(problems)} tensors differ in shape: {'; '.join(problems[:5])}. These are different models, or different "
            "heads or vocabularies; nothing was averaged"
        )


def _check_quantised(tensors: Mapping[str, Mixed]) -> None:
    """Refuse codes that mean nothing without scales: a mean of scales with one member's codes is no mean of weights."""
    names = set(tensors)
    scaled = {_SCALES.sub("", name, count=1) for name in names if _SCALES.search(name)}
    for name, mixed in tensors.items():
        if itemsize(mixed.streams[-1].dtype) == 1 and mixed.shape and mixed.streams[-1].dtype != "bool":
            stem = name.removesuffix(".weight")
            if name in scaled or stem in scaled:
                raise IncompatibleState(f"{name} is quantised (it has scales beside it); dequantise before averaging")
        if _QUANTISED.search(name):
            raise IncompatibleState(f"{name} is quantised; dequantise before averaging")


def _tied_everywhere(members: Sequence[Member], name: str, target: str, notes: list[str]) -> bool:
    """Whether two names of the newest are one tensor in all members: by their aliases, or by every byte."""
    for member in members[:-1]:
        if member.stored(name) == member.stored(target):
            continue
        if not equal_streams(_stream(member, name), _stream(member, target)):
            notes.append(f"{name} is tied to {target}, but {member.label} has two different tensors: averaged apart")
            log.warning("%s", notes[-1])
            return False
    return True


def equal_streams(one: Stream, other: Stream) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; stops at the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, one.nbytes, CHUNK)
    return all(
        memoryview(one.read(at, min(at + CHUNK, one.nbytes))) == memoryview(other.read(at, min(at + CHUNK, one.nbytes)))
        for at in starts
    )


def _with_statistics(
    members: Sequence[Member], tensors: dict[str, Mixed], rules: Rules
) -> tuple[dict[str, Mixed], list[str]]:
    """Never average BatchNorm's statistics: a mean of variances lacks the spread between the means."""
    found = [name for name in statistics(list(tensors)) if tensors[name].how != "newest"] if len(members) > 1 else []
    differing = [
        name
        for name in found
        if not name.endswith("num_batches_tracked")
        and not all(equal_streams(stream, tensors[name].streams[-1]) for stream in tensors[name].streams[:-1])
    ]
    if differing and rules.batchnorm == "refuse":
        raise IncompatibleState(
            f"BatchNorm statistics cannot be averaged (a mean of variances lacks the spread between the means): "
            f"{first_names(sorted(differing), 8)}. Recompute them over training data "
            "(batchnorm=RecomputeBatchNorm(model, batches)), or take the newest checkpoint's on purpose "
            "(batchnorm='copy_newest')"
        )
    newest = {n: replace(tensors[n], how="newest", dtype=tensors[n].streams[-1].dtype) for n in found}
    notes = [f"BatchNorm statistics of the newest checkpoint: {first_names(sorted(differing), 8)}"] if differing else []
    return tensors | newest, notes
