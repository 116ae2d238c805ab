"""How far averages have come: what counts as a step, which decay it gets, and that record in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt.averaging import schedules
from distckpt.averaging.schedules import Schedule
from distckpt.engines.deepspeed_guard import is_deepspeed
from distckpt.errors import ConfigError, IncompatibleState

VERSION = 1


@dataclass(slots=True)
class Progress:
    """Counts of one set of averages, the same on every rank. ``schedules`` maps each average's label to its schedule.

    ``seen``: optimizer steps counted. The first ``start`` of them only wait; then every one has its decay, and each
    ``every``-th moves the shadows by the product of the decays since (``pending``): decay**k for a constant one.
    """

    schedules: dict[str, Schedule]
    start: int = 0
    every: int = 1
    seen: int = 0
    pending: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: want a whole number of at least {least}")
        self.pending = dict.fromkeys(self.schedules, 1.0)

    @property
    def started(self) -> bool:
        """Whether the averages have begun; until then they are the weights."""
        return self.seen >= self.start

    @property
    def updates(self) -> int:
        """Steps that are in the averages."""
        return max(0, self.seen - self.start)

    def advanced(self) -> tuple[Progress, list[float] | None]:
        """Return the record as it is after one more step, and what ``advance`` returns; this one stays as it is."""
        after = copy.copy(self)
        return after, after.advance()

    def advance(self) -> list[float] | None:
        """Count one step; return how far each shadow has to move towards the weights now, or None where it stays."""
        self.seen += 1
        if self.seen <= self.start:
            return [1.0] * len(self.schedules) if self.seen == self.start else None
        self.pending = {
            label: self.pending[label] * schedule.at(self.updates - 1) for label, schedule in self.schedules.items()
        }
        if self.updates % self.every:
            return None
        weights = [1.0 - self.pending[label] for label in self.schedules]
        self.pending = dict.fromkeys(self.schedules, 1.0)
        return weights

    def plain(self) -> dict[str, Any]:
        """Return the record as plain values."""
        averages = {
            label: {"schedule": schedules.describe(schedule), "pending": self.pending[label]}
            for label, schedule in self.schedules.items()
        }
        return {
            "version": VERSION,
            "seen": self.seen,
            "start": self.start,
            "every": self.every,
            "updates": self.updates,
            "averages": averages,
        }

    def load(self, plain: Any) -> list[str]:
        """Take a record over; return sentences on what it changed. ``IncompatibleState`` for a record of other averages.

        ``every`` stays as it is set here: it is a price, and does not change where an average is going.
        """
        if not isinstance(plain, Mapping) or plain.get("version") != VERSION:
            raise IncompatibleState(
                f"the saved state is not the record of an average that this distckpt knows (version {VERSION}): {plain!r:.200}"
            )
        averages = _averages(plain)
        if list(averages) != list(self.schedules):
            raise IncompatibleState(
                f"averages {list(averages)} were saved, {list(self.schedules)} are here; make them with the same decays"
            )
        found = {label: schedules.parse(saved["schedule"]) for label, saved in averages.items()}
        notes = [
            f"{label or 'average'}: {schedules.text(self.schedules[label])} was set, goes on with the saved "
            f"{schedules.text(schedule)}"
            for label, schedule in found.items()
            if schedule != self.schedules[label]
        ]
        if plain["start"] != self.start:
            notes.append(f"start={self.start} was set, goes on with the saved {plain['start']}")
        self.schedules, self.start, self.seen = found, plain["start"], plain["seen"]
        self.pending = {label: float(saved["pending"]) for label, saved in averages.items()}
        return notes

    def reset(self) -> None:
        """Begin again at zero."""
        self.seen = 0
        self.pending = dict.fromkeys(self.schedules, 1.0)


def _averages(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a record holds for each average; ``IncompatibleState`` names the keys that are missing or wrong."""
    wrong = [key for key in ("seen", "start") if type(plain.get(key)) is not int or plain[key] < 0]
    averages = plain.get("averages")
    if not isinstance(averages, Mapping):
        wrong.append("averages")
    for label, saved in averages.items() if isinstance(averages, Mapping) else ():
        saved = saved if isinstance(saved, Mapping) else {}
        if not isinstance(saved.get("schedule"), Mapping):
            wrong.append(f"averages[{label!r}]['schedule']")
        if type(saved.get("pending")) not in (int, float):
            wrong.append(f"averages[{label!r}]['pending']")
    if wrong:
        raise IncompatibleState(f"the record of an average lacks {wrong}, or has no valid value there: {plain!r:.200}")
    return plain["averages"]  # type: ignore[no-any-return]


class StepWatch:
    """Whether the optimizer has stepped since the last ``sync``: micro-batches and skipped (overflow) steps do not count.

    A DeepSpeed engine counts both itself. ``torch.optim`` optimizers are watched by a hook, which a ``GradScaler`` that
    finds an overflow does not reach (a fused optimizer is reached, and its ``found_inf`` read: one device synchronisation).
    Without either every question is answered yes.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._engine = model if is_deepspeed(model) else None
        if self._engine is not None and optimizer is not None:
            raise ConfigError("optimizer= is not for a DeepSpeed engine, which counts its own steps")
        self._watching = optimizer is not None
        self._stepped = [False]
        for single in _each(optimizer):
            single.register_step_post_hook(_hook(self._stepped))
        self._last = self._count()

    def stepped(self) -> bool:
        """Return whether there was a step since the last ``sync``."""
        if self._engine is not None:
            return self._last != self._count()
        return self._stepped[0] or not self._watching

    def sync(self) -> None:
        """Forget steps until now: they are taken in, or a load has set counters anew."""
        self._last = self._count()
        self._stepped[0] = False

    def _count(self) -> int:
        return 0 if self._engine is None else int(self._engine.global_steps) - int(self._engine.skipped_steps)


def _each(optimizer: Any) -> Iterable[torch.optim.Optimizer]:
    singles = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    singles = [] if singles is None else singles if isinstance(singles, (list, tuple)) else [singles]
    for single in singles:
        if not isinstance(single, torch.optim.Optimizer):
            raise ConfigError(f"optimizer={type(single).__name__}: want a torch.optim.Optimizer, or a list of them")
    return list(singles)


def _hook(stepped: list[bool]) -> Any:
    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler sets it while a fused optimizer steps
        if found_inf is None or not bool(found_inf):
            stepped[0] = True

    return after_step
