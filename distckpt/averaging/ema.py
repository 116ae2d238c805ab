"""Exponential moving averages of weights, on each rank's own shards: no communication, and saved like the weights.

``EMAModel`` is the public class. ``live.py`` says which memory is averaged, ``shadows.py`` holds the averages,
``updater.py`` moves them, ``progress.py`` counts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import nn

from distckpt.averaging.live import LiveWeights
from distckpt.averaging.local_state import local_state, matched
from distckpt.averaging.progress import Progress, StepWatch
from distckpt.averaging.schedules import Decay, Schedule, Warmup
from distckpt.averaging.shadows import Shadows
from distckpt.averaging.swap import Swap
from distckpt.dcp.leaves import State
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError, IncompatibleState

log = logging.getLogger("distckpt")

BUFFERS = ("copy", "average", "refuse")


class EMAModel:
    """One or several exponential moving averages of a model's weights: ``shadow += (1 - decay) * (weight - shadow)``.

    ``model`` is a module under any layout (one process, DDP, FSDP2, HSDP, tensor parallel, compiled, or a list of pipeline
    stages), made after wrapping, or a DeepSpeed engine, whose fp32 masters are averaged. Each rank averages what it holds.

        ema = EMAModel(model, decay=0.9999)
        with CheckpointManager(config, model=model, optimizer=optimizer, stateful={"ema": ema}) as manager:
            manager.resume()
            for batch in loader:
                train_step(model, batch)
                ema.update()
            with ema.averaged():
                evaluate(model)

    ``decay``: a number, or several, which then share one pass over the weights and are called by their text
    (``"0.999"``) in ``apply``, ``averaged`` and checkpoints. ``warmup``: one of ``InverseGamma``, ``CountRatio``,
    ``HalfLife`` of ``distckpt.averaging.schedules``. ``start``: steps before averaging begins; until then the
    average is the weights. ``every=k``: move the shadows at each k-th step, by decay**k. ``dtype``: torch.float32 or
    torch.float64. ``device``: where shadows lie (``"cpu"`` offloads them; default: beside their weights).
    ``optimizer``: watched, so that ``update`` leaves out micro-batches and steps that a ``GradScaler`` skipped;
    a DeepSpeed engine needs none.

    Tied weights are averaged once. Parameters that do not require gradients and integer buffers are the model's own. One
    that is unfrozen later joins at the next ``update`` that moves the shadows, or earlier look, as a copy of what it is then.
    ``buffers`` says what the others are (BatchNorm statistics above all): ``"copy"`` the model's own too, ``"average"``,
    or ``"refuse"`` a model with BatchNorm, whose averaged weights want statistics of their own.

    Raises ``ConfigError`` for settings that make no sense and where there is nothing to average.
    """

    distckpt_state = "replicated"

    def __init__(
        self,
        model: Any,
        decay: float | Sequence[float] = 0.9999,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        warmup: Warmup | None = None,
        start: int = 0,
        every: int = 1,
        buffers: str = "copy",
        optimizer: Any = None,
    ) -> None:
        several = isinstance(decay, Sequence)
        schedules = {repr(d) if several else "": Decay(d, warmup) for d in (decay if several else (decay,))}  # type: ignore
        if several and len(schedules) != len(decay):  # type: ignore[arg-type]
            raise ConfigError(f"decay={decay!r}: want several different numbers")
        self._set_up(model, schedules, device, dtype, start, every, buffers, optimizer)

    def _set_up(
        self,
        model: Any,
        schedules: Mapping[str, Schedule],
        device: torch.device | str | None,
        dtype: torch.dtype,
        start: int,
        every: int,
        buffers: str,
        optimizer: Any,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={dtype}: averages stand still in fewer bits; want torch.float32 or torch.float64")
        if buffers not in BUFFERS:
            raise ConfigError(f"buffers={buffers!r}: want one of {', '.join(map(repr, BUFFERS))}")
        self._progress = Progress(dict(schedules), start, every)
        if not schedules:
            raise ConfigError("decay=(): want at least one number")
        self._weights = LiveWeights(model, average_buffers=buffers == "average", joining=True)
        if buffers == "refuse":
            _refuse_batch_norm(self._weights.module)
        self._watch = StepWatch(model, optimizer)
        self._shadows = Shadows(len(schedules), dtype, None if device is None else torch.device(device))
        self._swap: Swap | None = None
        self._shadows.fit(self._weights.look())

    # ------------------------------------------------------------------ while training

    @property
    def decay(self) -> Any:
        """The decay, or a tuple of them (of a power-function profile: its relative width)."""
        values = tuple(schedule.value for schedule in self._progress.schedules.values())
        return values if "" not in self.names else values[0]

    @property
    def names(self) -> tuple[str, ...]:
        """What the averages are called: ``("",)`` where there is one."""
        return tuple(self._progress.schedules)

    @property
    def updates(self) -> int:
        """Optimizer steps that are in the averages."""
        return self._progress.updates

    def update(self, *, skipped: bool = False) -> bool:
        """Take one optimizer step in; call it after each ``optimizer.step()``, on every rank. Returns whether it counted.

        Not counted: ``skipped=True``, and where the optimizer is known not to have stepped. Raises ``IncompatibleState``
        while averaged weights are swapped in, and where the model's parameters are others than they were.
        """
        if self.applied:
            raise IncompatibleState(
                "update() while averaged weights are in the model would average the average; restore() first"
            )
        if not self._watch.stepped():
            return False
        if not skipped:
            after, weights = self._progress.advanced()
            if weights is not None:
                if self._weights.moved():
                    self._shadows.fit(self._weights.look())
                self._shadows.move(weights)
            self._progress = after  # only now: a step that was refused does not count, and can be taken in again
        self._watch.sync()
        return not skipped

    def reset(self) -> None:
        """Begin again from the live weights, with counts at zero: after weights were loaded from elsewhere."""
        self._not_applied("reset")
        self._shadows.fit(self._weights.look())
        self._shadows.move([1.0] * len(self.names))
        self._progress.reset()
        self._watch.sync()

    # ------------------------------------------------------------------ averaged weights in the model

    @property
    def applied(self) -> bool:
        """Whether averaged weights are in the model now."""
        return self._swap is not None

    def apply(self, name: str | float | None = None) -> None:
        """Put averaged weights into the model, and keep its own for ``restore``; on every rank (collective under ZeRO).

        ``name``: which average, its decay or its text, where there are several. The weights kept lie where the shadows
        do. Where this fails, the model has its own weights. Raises ``IncompatibleState`` for a second call.
        """
        self._not_applied("apply")
        number = self._number(name)
        live = self._weights.look()
        self._shadows.fit(live)
        swap = Swap(self._shadows, live)
        try:
            swap.put(None if not self._progress.started else number)
            self._weights.written()
        except BaseException:
            swap.undo(live)
            with contextlib.suppress(Exception):  # the first error is the one to show
                self._weights.written()
            raise
        self._swap = swap

    apply_shadow = apply

    def restore(self) -> None:
        """Put the model's own weights and buffers back, bit for bit; on every rank. Raises without an ``apply`` before."""
        if self._swap is None:
            raise IncompatibleState("restore() without apply(): the model has its own weights")
        live = self._weights.look()
        self._shadows.fit(live)
        self._swap.undo(live)
        self._swap = None
        self._weights.written()

    @contextlib.contextmanager
    def averaged(self, name: str | float | None = None) -> Iterator[Any]:
        """Have averaged weights in the model inside ``with``; its own come back however that ends. Yields the module.

        Under ZeRO they come back on all ranks together, so an error of one rank is logged before it waits for the others.
        """
        self.apply(name)
        try:
            yield self._weights.module
        except BaseException:
            if self._weights.collective:
                log.exception("inside averaged(): to put the model's own weights back, this rank waits for the others")
            raise
        finally:
            if self.applied:
                self.restore()

    # ------------------------------------------------------------------ as a state dict

    def state_dict(self) -> dict[str, Any]:
        """Return decay, counts and ``shadow``: this rank's averages by FQN, sharing memory (DTensors where weights are).

        Of several averages ``shadow`` has one such dict by name. A weight held in several pieces (ZeRO partitions) is a
        list of them. It fits the same layout; through a ``CheckpointManager`` averages move between layouts.
        """
        by_name = self._local_state()
        if not self._progress.started:
            self._shadows.move([1.0] * len(self.names))  # until then the average is the weights
        return {"shadow": by_name.get("", by_name), "decay": self.decay, "progress": self._progress.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; names may have the prefixes of wrappers.

        Raises ``IncompatibleState`` naming what is missing, unexpected, or of another shape; nothing is changed then.
        """
        self._not_applied("load_state_dict")
        own = self._local_state()
        shadow = state.get("shadow")
        found = {"": shadow} if "" in own else shadow
        copies = matched(own, found)
        self._progress.load(state.get("progress"))
        with torch.no_grad():
            for target, source in copies:
                target.copy_(source)
        self._watch.sync()

    # ------------------------------------------------------------------ in checkpoints

    def leaves(self, name: str, *, loading: bool = False) -> State:
        """Return what a checkpoint stores as the stateful ``name``: the averaged model under ``<name>.``, counts as an object.

        Of several averages each lies under ``<name>.<average>.``. What an average only follows is the model's own tensor:
        its leaf keeps the model's name, so that a checkpoint with the model in it stores it once.
        """
        self._not_applied("saving or loading")
        live = self._weights.look()
        self._shadows.fit(live)
        state = State()
        for number, average in enumerate(self.names):
            prefix = f"{name}.{average}." if average else f"{name}."
            own = live.averaged if loading or self._progress.started else {}
            for fqn in own:
                state.add_leaf(self._shadows.leaf(prefix + fqn, fqn, number))
            for fqn, leaf in {**live.averaged, **live.followed}.items():
                if fqn not in own:
                    state.tensors[prefix + fqn] = msgspec.structs.replace(leaf, fqn=MODEL + fqn)
            state.aliases |= {prefix + alias: prefix + fqn for alias, fqn in live.aliases.items()}
        state.add_object(name, self._progress.plain())
        return state

    def settled(self, name: str) -> list[str]:
        """Return the names of the shadows: only ``update``, which follows a step, moves them."""
        prefixes = [f"{name}.{average}." if average else f"{name}." for average in self.names]
        return [prefix + fqn for prefix in prefixes for fqn in self._shadows.parts]

    def take_over(self, name: str, value: Any, loaded: Collection[str], stored: Collection[str]) -> list[str]:
        """Finish a load that has filled ``leaves``: take the counts, begin again what the checkpoint lacks.

        ``loaded``: names found; ``stored``: names of its tensors. Returns sentences for the report.
        """
        notes = [f"{name}: {note}" for note in self._progress.load(value)]
        live = self._weights.look()
        self._shadows.fit(live)
        for number, average in enumerate(self.names):
            prefix = f"{name}.{average}." if average else f"{name}."
            lacking = [fqn for fqn in live.averaged if prefix + fqn not in loaded]
            for fqn in lacking:
                self._shadows.copy(fqn, number)
            ignored = [fqn for fqn in live.followed if prefix + fqn in stored]
            if lacking:
                notes.append(f"{name}: {lacking[:5]} begin again from the loaded weights; they were not loaded")
            if ignored:
                notes.append(
                    f"{name}: averages of {ignored[:5]} are left out; here they are frozen and follow the model"
                )
        self._watch.sync()
        return notes

    def begin_again(self, name: str, why: str) -> list[str]:
        """Begin again from the loaded weights, where a checkpoint has no such state; returns a sentence for the report."""
        self.reset()
        return [f"{name}: {why}; begins again from the loaded weights"]

    # ------------------------------------------------------------------ inside

    def _number(self, name: str | float | None) -> int:
        names = self.names
        if name is None and len(names) == 1:
            return 0
        text = name if isinstance(name, str) else repr(name)
        called = names if "" not in names else (repr(self.decay),)  # the only one has a decay, though no name
        if name is None or text not in (*called, *names):
            raise ConfigError(f"which average? {name!r} is none of {list(called)}")
        return names.index(text) if text in names else 0

    def _local_state(self) -> dict[str, dict[str, Any]]:
        live = self._weights.look()
        self._shadows.fit(live)
        parameters = self._weights.parameters()
        return {name: local_state(self._shadows, number, parameters) for number, name in enumerate(self.names)}

    def _not_applied(self, what: str) -> None:
        if self.applied:
            raise IncompatibleState(f"{what}: averaged weights are in the model; restore() its own first")


def _refuse_batch_norm(module: nn.Module) -> None:
    tracked = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
    ]
    if tracked:
        raise ConfigError(
            f"buffers='refuse', and {tracked[:5]} keep BatchNorm statistics: averaged weights want statistics of their own. "
            "Choose 'copy' or 'average', and recompute them inside averaged() (torch.optim.swa_utils.update_bn) before use"
        )
