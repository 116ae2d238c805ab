"""What goes into an average: checkpoints of any kind, opened, in an order that does not depend on how they were named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum, isfinite
from typing import Any, Final

from distckpt.dcp.parallel import run_all
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.format.digest import digest
from distckpt.importers.convert import open_source
from distckpt.importers.source import Options, Source

FAR_THREADS: Final = 8
"""Members that are opened at a time where each request to an object store waits for it.

Elsewhere it is mostly Python, one after another: of 32 on a local disk, two threads took half as long again, eight four
times as long."""
READ_FILES: Final = (
    *(".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata"),
    *(".index.json", "config.json", "latest", "latest_universal"),
)
"""Ends of the names of files that importers read in a folder; a log or a file of scores beside them is none of it."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a linear combination.

    ``path`` is what ``distckpt convert`` reads: a step of a root, a Hugging Face or DCP folder, a file. Its tensors
    whose names start with ``prefix`` go in as ``model.…``: ``ema.0.`` takes an EMA's weights. ``weight`` may be negative.
    """

    path: str
    weight: float = 1.0
    prefix: str = MODEL


@dataclass(frozen=True, eq=False)
class Member:
    """An opened term. ``weight`` is normalised; ``names`` maps a name of the result to the source's own.

    ``files``: of other kinds than distckpt's, a digest of the names, sizes and times of the files as they were opened, which
    tells a folder that was written anew. No digest of content, and not part of ``identity``: copies on other nodes may
    have other times.
    """

    source: Source
    prefix: str
    weight: float
    names: Mapping[str, str]
    files: str | None = None

    @property
    def label(self) -> str:
        """What messages call it: its path, and its prefix where that is not the model's."""
        return self.source.path if self.prefix == MODEL else f"{self.source.path} ({self.prefix})"

    def stored(self, name: str) -> str:
        """Return the source's name of the stored tensor behind a name of the result (follows an alias)."""
        own = self.names[name]
        return self.source.aliases.get(own, own)

    @cached_property
    def identity(self) -> str:
        """What makes two members the same: the manifest's digest, else the path; and the prefix."""
        return f"{self.manifest_digest or os.path.realpath(self.source.path)} {self.prefix}"

    @cached_property
    def manifest_digest(self) -> str | None:
        """xxh3-128 of the manifest's file, which stands for every byte of the checkpoint; None for other kinds."""
        found = self.source.checkpoint
        return None if found is None else digest(found.store.read(found.committed.manifest_path))

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """The place in the sum: by step, then generation, then the name in natural order."""
        source = self.source
        step = step_in_name(source.path) if source.step is None else source.step
        generation = 0 if source.checkpoint is None else source.checkpoint.generation
        where = source.path if source.checkpoint is None else source.checkpoint.path
        return (-1 if step is None else step, generation, _natural(where), self.prefix)

    def row(self) -> dict[str, Any]:
        """Return what the result's provenance says about it; never more of a path than its last component."""
        return {
            "kind": self.source.kind,
            "name": self.source.name,
            "step": self.source.step,
            "prefix": self.prefix,
            "weight": self.weight,
            "manifest": self.manifest_digest,
            **({} if self.files is None else {"files": self.files}),
        }


def open_members(terms: Sequence[Term], *, whole_state: bool = False, normalise: bool = True) -> list[Member]:
    """Open every term and return the members in the order in which they are summed, newest last.

    Terms of weight 0 are left out. ``normalise`` divides the weights by their sum, in fp64; else they must sum to 1
    within 1e-6. ``whole_state`` keeps what is not the model. Raises ``ConfigError`` (weights, the same checkpoint twice)
    and what opening a source raises.
    """
    weights = normalised([term.weight for term in terms], scale=normalise)
    wanted = [(term, weight) for term, weight in zip(terms, weights, strict=True) if weight]
    far = any("://" in term.path and not term.path.startswith("file:") for term, _ in wanted)
    members: list[Member] = []
    run_all(lambda item: members.append(_open(*item, whole_state)), wanted, FAR_THREADS if far else 1, "open")
    members.sort(key=lambda member: member.key)
    seen: dict[str, Member] = {}
    for member in members:
        twin = seen.setdefault(member.identity, member)
        if twin is not member:
            raise ConfigError(f"{member.label} is the same checkpoint as {twin.label}: name it once, with its weight")
    return members


def normalised(weights: Sequence[float], *, scale: bool = True) -> list[float]:
    """Return weights that sum to 1, computed in fp64; ``ConfigError`` if they cannot."""
    if not weights:
        raise ConfigError("nothing to average: no checkpoint was named, or none was chosen")
    if not all(isinstance(w, (int, float)) and isfinite(w) for w in weights):
        raise ConfigError(f"weights {list(weights)}: want finite numbers")
    total = fsum(weights)
    if scale and not total > 0:
        raise ConfigError(f"weights {list(weights)} sum to {total}: their sum must be above 0")
    if not scale and abs(total - 1) > 1e-6:
        raise ConfigError(f"weights sum to {total}, not to 1: the result would be scaled")
    return [w / total for w in weights] if scale else [float(w) for w in weights]


def reweighted(members: Iterable[Member], weights: Sequence[float]) -> list[Member]:
    """Return members with other weights, which are normalised."""
    chosen = list(members)
    return [replace(m, weight=w) for m, w in zip(chosen, normalised(weights), strict=True)]


def _open(term: Term, weight: float, whole_state: bool) -> Member:
    source = open_source(term.path, options=Options(optimizer=whole_state))
    every = (*source.tensors, *source.aliases)
    names = {MODEL + n.removeprefix(term.prefix): n for n in every if n.startswith(term.prefix)}
    if not names:
        known = sorted({f"{name.split('.', 1)[0]}." for name in every})[:10]
        raise IncompatibleState(
            f"{source.path}: no tensor's name starts with {term.prefix!r}; names start with {known}"
        )
    if whole_state:
        names |= {name: name for name in every if name.startswith("optim.")}
    return Member(source, term.prefix, weight, names, None if source.checkpoint is not None else _files(source.path))


def _files(path: str) -> str:
    """Return a digest of names, sizes and times (ns) of the files that a path has to read; never of their content."""
    found = [path] if os.path.isfile(path) else [
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names if name.endswith(READ_FILES)
    ]  # fmt: skip
    return digest(repr(sorted((os.path.relpath(file, path), *_state(file)) for file in found)).encode())


def _state(file: str) -> tuple[int, int]:
    try:
        state = os.stat(file)
    except OSError:  # gone meanwhile: who reads it will say so
        return -1, -1
    return state.st_size, state.st_mtime_ns


def step_in_name(path: str) -> int | None:
    """Return the number at the end of a folder's or file's name (``checkpoint-1200``), None where there is none."""
    match = re.search(r"(\d{1,18})(?:\.\w+)?$", path.rstrip("/"))
    return None if match is None else int(match[1])


def _natural(text: str) -> tuple[Any, ...]:
    """Order ``b-10`` after ``b-9``: digits as numbers, at odd places always."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text)))
