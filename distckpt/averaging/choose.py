"""Which checkpoints go into an average: the last, the best, every n-th, those of a window. Pure, but for ``candidates``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from distckpt.averaging.sources import step_in_name
from distckpt.errors import ConfigError
from distckpt.format.catalog import list_checkpoints, parse_location
from distckpt.format.checkpoint import open_checkpoint
from distckpt.importers.convert import kind_of
from distckpt.manager.ranking import check_mode, rank_candidates

METHODS: Final = ("uniform", "weighted", "last", "best", "every", "window", "greedy")
LAST: Final = 5
"""How many ``last`` takes unless it is told."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint that could go in. ``step`` is -1 where it has none."""

    path: str
    step: int
    generation: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A rule. ``steps``, ``window`` (first and last step, both inclusive) and ``every`` narrow the choice in this order.

    ``every`` counts back from the newest that is left, which is always in. Then ``last`` takes the ``k`` newest (as LAWA
    does), ``best`` the ``k`` best by ``metric``; ties go to the earlier.
    """

    method: str = "uniform"
    k: int | None = None
    metric: str | None = None
    mode: str | None = None
    every: int | None = None
    window: tuple[int | None, int | None] | None = None
    steps: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.mode is not None:
            check_mode(self.mode, "mode")
        elif self.metric is not None:
            raise ConfigError(f"metric {self.metric!r} needs mode: 'min' where lower is better, else 'max'")
        for name in ("k", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: want at least 1")
        needs = {"best": "metric", "every": "every", "window": "window"}.get(self.method)
        if needs is not None and getattr(self, needs) is None:
            raise ConfigError(f"method {self.method!r} needs {needs}")
        if self.k is not None and self.method not in ("last", "best"):
            raise ConfigError(f"k={self.k} means something to methods 'last' and 'best' only, not {self.method!r}")

    @property
    def by_step(self) -> bool:
        """Whether steps decide, so that every candidate must have one."""
        return bool(self.steps) or self.window is not None or self.every is not None or self.method == "last"


def candidates(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Candidate]:
    """Return the checkpoints that paths mean: of a root, every one of its lineage; of anything else, itself.

    Raises ``ConfigError`` if the same one is named twice or a root has none, and what opening a step raises.
    """
    several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Candidate] = []
    for path in several:
        text = os.fspath(path)
        if kind_of(text) != "distckpt":
            step = step_in_name(text)
            found.append(Candidate(text, -1 if step is None else step))
            continue
        if parse_location(text).step is None:
            infos = list_checkpoints(text)
            if not infos:
                raise ConfigError(f"{text}: no checkpoint is there")
            found += [Candidate(i.path, i.step, i.generation, i.metrics) for i in infos]
        else:
            one = open_checkpoint(text)
            found.append(Candidate(text, one.step, one.generation, one.metrics))
    by_path: dict[str, Candidate] = {}
    for candidate in found:
        real = candidate.path if "://" in candidate.path else os.path.realpath(candidate.path)
        if by_path.setdefault(real, candidate) is not candidate:
            raise ConfigError(f"{candidate.path} was named twice; name it once, with its weight")
    return found


def choose(found: Sequence[Candidate], choice: Choice) -> list[Candidate]:
    """Return what a rule takes, oldest first. Raises ``ConfigError`` where nothing is left, or less than ``k``."""
    nameless = [candidate.path for candidate in found if candidate.step < 0]
    if choice.by_step and nameless:
        raise ConfigError(f"{nameless[0]} has no step to choose by; list the checkpoints to average instead")
    left = sorted(found, key=lambda candidate: (candidate.step, candidate.generation))
    if choice.steps:
        absent = sorted(set(choice.steps) - {candidate.step for candidate in left})
        if absent:
            raise ConfigError(f"steps {absent} are not there; there are {[c.step for c in left][:20]}")
        left = [candidate for candidate in left if candidate.step in choice.steps]
    if choice.window is not None:
        first, last = choice.window
        left = [c for c in left if (first is None or c.step >= first) and (last is None or c.step <= last)]
    if choice.every is not None:
        left = left[::-1][:: choice.every][::-1]
    k = choice.k or LAST
    if choice.method == "last":
        left = _enough(left[-k:], choice.k, "are left")
    elif choice.method == "best":
        assert choice.metric is not None
        assert choice.mode is not None
        ranked = rank_candidates(left, choice.metric, choice.mode)
        best = _enough(ranked[:k], choice.k, f"have metric {choice.metric!r}")
        left = [candidate for candidate in left if any(candidate is other for other in best)]
    if not left:
        raise ConfigError(f"the rule leaves none of {len(found)} checkpoints to average")
    return left


def _enough(chosen: list[Candidate], wanted: int | None, what: str) -> list[Candidate]:
    if wanted is not None and len(chosen) < wanted:
        raise ConfigError(f"k={wanted}, but only {len(chosen)} checkpoints {what}")
    return chosen
