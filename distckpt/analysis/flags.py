"""Tensors that should have changed and did not, or changed and should not have: the errors that stay silent for weeks.

A run that goes on from wrong weights, a frozen part that trains, an average that does not follow, a rank with another
rank's random numbers: nothing fails, and only the comparison of two checkpoints shows it (for instance NeMo-RL#3312,
Megatron-LM#6858). What is expected is taken from the checkpoints themselves: whom the optimizer holds state for is trained.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from distckpt.analysis.stats import Change
from distckpt.engines.base import MODEL, OPTIM_STATE
from distckpt.engines.param_state import split_state_names
from distckpt.errors import ConfigError

Severity = Literal["problem", "warning"]
_STATISTICS: Final = ("running_mean", "running_var")
_COUNTER: Final = "num_batches_tracked"


class Compared(Protocol):
    """What is known of one tensor that both sides have (``diff.TensorDiff``)."""

    @property
    def name(self) -> str: ...
    @property
    def dtypes(self) -> tuple[str, str]: ...
    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]: ...
    @property
    def differs(self) -> bool: ...
    @property
    def change(self) -> Change | None: ...


@dataclass(frozen=True, slots=True)
class Flag:
    """Something that is probably wrong: ``kind`` for programs, ``text`` for people, the tensors it is about."""

    kind: str
    severity: Severity
    text: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """What expectations rest on. ``steps``: of A and B; ``state``: names of optimizer state that a side has.

    ``aliases``: further names of tied tensors. ``frozen``: patterns of names that must not change.
    """

    steps: tuple[int | None, int | None]
    state: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether training lies between the two."""
        return None not in self.steps and self.steps[0] != self.steps[1]

    @property
    def same_step(self) -> bool:
        """Whether both are of one step."""
        return self.steps[0] is not None and self.steps[0] == self.steps[1]

    @property
    def between(self) -> str:
        """Where training lies, for messages."""
        return f"between step {self.steps[0]} and {self.steps[1]}" if self.moved else "while others did"


def find_flags(tensors: Sequence[Compared], context: Context) -> list[Flag]:
    """Return what is suspicious about tensors that both sides have. Raises ``ConfigError`` for a pattern without a match."""
    weights = [t for t in tensors if t.name.startswith(MODEL)]
    trained = _trained(weights, context)
    flags = [
        *_not_finite(tensors),
        *_frozen(tensors, weights, trained, context),
        *_unchanged(weights, trained, context),
        *_buffers(weights, context),
        *_optimizer(tensors, weights, context),
        *_shadows(tensors, weights),
    ]
    if context.same_step and (names := _named(weights, lambda t: t.differs)):
        text = f"both are step {context.steps[0]}, yet weights differ: another run, an average, or not deterministic"
        flags.append(Flag("same-step", "warning", text, names))
    return flags


def is_statistic(name: str) -> bool:
    """Whether a tensor is one of BatchNorm's running statistics."""
    return name.endswith(_STATISTICS)


def _named(tensors: Iterable[Compared], test: Callable[[Compared], bool]) -> tuple[str, ...]:
    return tuple(t.name for t in tensors if test(t))


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.removeprefix(MODEL)))


def _is_float(tensor: Compared) -> bool:
    return all("float" in dtype or "complex" in dtype for dtype in tensor.dtypes)


def _numel(tensor: Compared) -> int:
    return math.prod(tensor.shapes[0])


def _trained(weights: Sequence[Compared], context: Context) -> set[str] | None:
    """Return the weights that the optimizer holds state for; None where neither side has such state."""
    names = {t.name for t in weights} | {n for n in context.aliases if n.startswith(MODEL)}
    held = split_state_names(context.state, [name.removeprefix(MODEL) for name in names])
    if not held:
        return None
    return {context.aliases.get(MODEL + fqn, MODEL + fqn) for fqn in held}


def _not_finite(tensors: Sequence[Compared]) -> list[Flag]:
    def worse(t: Compared) -> bool:
        return t.change is not None and t.change.nan[1] + t.change.inf[1] > t.change.nan[0] + t.change.inf[0]

    names = _named(tensors, worse)
    return [Flag("not-finite", "problem", "NaN or infinite where it was not before", names)] if names else []


def _frozen(
    tensors: Sequence[Compared], weights: Sequence[Compared], trained: set[str] | None, context: Context
) -> list[Flag]:
    flags = []
    chosen: set[str] = set()
    for pattern in context.frozen:
        hit = {t.name for t in tensors if _matches(t.name, pattern)}
        if not hit:
            raise ConfigError(f"frozen pattern {pattern!r} is the name of no tensor that both have")
        chosen |= hit
    if names := _named(tensors, lambda t: t.name in chosen and t.differs):
        flags.append(Flag("frozen-changed", "problem", "said to be frozen, and changed", names))
    if trained is None:
        return flags

    def untrained(t: Compared) -> bool:
        return t.differs and _is_float(t) and t.name not in trained | chosen and not is_statistic(t.name)

    if names := _named(weights, untrained):
        text = "changed, though the optimizer holds no state for it: a frozen weight that moved, or a buffer"
        flags.append(Flag("untrained-changed", "warning", text, names))
    return flags


def _unchanged(weights: Sequence[Compared], trained: set[str] | None, context: Context) -> list[Flag]:
    def expected(t: Compared) -> bool:
        if not _is_float(t) or not _numel(t) or is_statistic(t.name):
            return False
        if any(_matches(t.name, pattern) for pattern in context.frozen):
            return False
        return trained is None or t.name in trained

    wanted = [t for t in weights if expected(t)]
    still = _named(wanted, lambda t: not t.differs)
    if not still or context.same_step:
        return []
    if len(still) == len(wanted):
        if not context.moved:
            return []
        text = f"no weight changed {context.between}: were these weights trained, saved and loaded at all?"
        return [Flag("no-weight-changed", "problem", text, still)]
    text = f"{len(still)} of {len(wanted)} trained weights did not change {context.between}: no gradient, or frozen"
    return [Flag("unchanged", "warning", text, still)]


def _buffers(weights: Sequence[Compared], context: Context) -> list[Flag]:
    flags = []
    trains = any(t.differs and _is_float(t) and not is_statistic(t.name) for t in weights)
    if names := _named(weights, lambda t: t.differs and not _is_float(t) and not t.name.endswith(_COUNTER)):
        text = "integers or masks that changed, which training leaves alone"
        flags.append(Flag("integers-changed", "warning", text, names))
    if not trains or context.same_step:
        return flags

    def still(t: Compared) -> bool:
        return not t.differs and bool(_numel(t)) and (is_statistic(t.name) or t.name.endswith(_COUNTER))

    if names := _named(weights, still):
        text = "running statistics that did not move while weights did: in eval mode, or not saved"
        flags.append(Flag("statistics-unchanged", "warning", text, names))
    return flags


def _optimizer(tensors: Sequence[Compared], weights: Sequence[Compared], context: Context) -> list[Flag]:
    """State of a weight that changed must have changed; counters must not go back."""
    known = {t.name: t for t in tensors}
    changed = {t.name.removeprefix(MODEL) for t in weights if t.differs}
    state = split_state_names((n for n in known if n.startswith(OPTIM_STATE)), changed)
    held = [known[name] for keys in state.values() for name in keys.values()]
    still = _named(held, lambda t: not t.differs and bool(_numel(t)))
    flags = []
    if still and context.moved:
        text = f"optimizer state that did not change {context.between}, though its weight did"
        flags.append(Flag("optimizer-unchanged", "warning", text, still))

    def back(t: Compared) -> bool:
        counts = t.name.startswith(OPTIM_STATE) and t.name.endswith(".step") and _numel(t) == 1
        return counts and t.change is not None and t.change.norm_b < t.change.norm_a

    later = None not in context.steps and (context.steps[1] or 0) > (context.steps[0] or 0)
    if later and (names := _named(tensors, back)):
        text = "optimizer step counts that went back while the job went on"
        flags.append(Flag("counter-back", "problem", text, names))
    return flags


def _shadows(tensors: Sequence[Compared], weights: Sequence[Compared]) -> list[Flag]:
    """An average (EMA) of a weight, by its name's ending, must follow that weight."""
    moved = {t.name.removeprefix(MODEL): t.shapes[0] for t in weights if t.differs and _is_float(t)}

    def lags(t: Compared) -> bool:
        if t.differs or t.name.startswith((MODEL, "optim.")) or not _numel(t):
            return False
        parts = t.name.split(".")
        endings = (".".join(parts[i:]) for i in range(1, len(parts)))
        return any(moved.get(ending) == t.shapes[0] for ending in endings)

    if names := _named(tensors, lags):
        return [Flag("average-unchanged", "warning", "averages (EMA) that did not follow their weights", names)]
    return []
