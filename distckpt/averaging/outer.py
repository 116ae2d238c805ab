"""An outer optimizer over replicas that train on their own: DiLoCo (Douillard et al. 2023, arXiv 2311.08105, algorithm 1).

Every replica takes H steps of its own. What they moved on average, ``anchor - mean``, is the gradient of one step of SGD
with Nesterov momentum on the weights where all of them began, the anchor; from there all of them go on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch

from distckpt.averaging.across import AcrossReport, Averager, Call, Operation, average_across_ranks
from distckpt.averaging.live import Live
from distckpt.averaging.local_state import local_state, matched
from distckpt.averaging.shadows import Shadows
from distckpt.averaging.updater import Pair
from distckpt.dcp.leaves import State
from distckpt.errors import ConfigError, IncompatibleState

ANCHOR, MOMENTUM = 0, 1
PARTS: Final = ("anchor", "momentum")


class OuterStep:
    """SGD over the pseudo-gradient of replicas. Make it when all replicas have the same weights, after wrapping.

        outer = OuterStep(model, lr=0.7, momentum=0.9)
        with CheckpointManager(config, model=model, optimizer=inner, stateful={"outer": outer}) as manager:
            for step, batch in enumerate(loader, 1):
                train_step(model, batch, inner)   # no gradients cross replicas
                if step % 100 == 0:
                    outer.step()

    ``lr`` 1 and ``momentum`` 0 give the mean; 0.7 and 0.9 with ``nesterov`` are DiLoCo's. Anchor and momentum are fp32 on each
    rank's own shards (``dtype`` torch.float64: wider; ``device="cpu"`` offloads them), the arithmetic is that of
    ``torch.optim.SGD``, and the inner optimizer's state stays each replica's own. In a ``CheckpointManager`` the state is
    saved with the model's layout and fits any other one.

    Raises ``ConfigError`` for settings that make no sense, and as ``average_across_ranks`` for models.
    """

    distckpt_state = "replicated"

    def __init__(
        self,
        model: Any,
        lr: float = 0.7,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0 and 0 <= momentum < 1):
            raise ConfigError(f"lr={lr}, momentum={momentum}: want lr above 0, momentum from 0 to below 1")
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={dtype}: want torch.float32 or torch.float64")
        self.lr, self.momentum, self.nesterov, self.steps = lr, momentum, nesterov, 0
        self._model = model
        self._averager = Averager(model)
        self._shadows = Shadows(len(PARTS), dtype, None if device is None else torch.device(device))
        self.reset()

    def step(
        self, weights: float | Sequence[float] | None = None, *, group: Any = None, **settings: Any
    ) -> AcrossReport:
        """Take one outer step on all replicas together; arguments and errors are ``average_across_ranks``'s."""
        return average_across_ranks(self._model, group, weights, self, **settings)

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again at the live weights, without momentum: after weights were loaded from elsewhere."""
        self._shadows.fit(self._averager.weights.look())
        for name in self._shadows.parts:
            self._shadows.copy(name, ANCHOR)
            self._still(name)
        self.steps = 0

    def run(self, model: Any, call: Call) -> AcrossReport:
        """Do the call of ``average_across_ranks(model, op=self)``."""

        def prepare(live: Live) -> Operation:
            if model is not self._model:  # told here, where it ends the call on all ranks: the others wait for this one
                raise ConfigError("op=OuterStep(...) of another model; make one for this model")
            return self._prepare(live)

        report = self._averager.run(call, prepare)
        self.steps += 1
        return report

    def _prepare(self, live: Live) -> Operation:
        self._shadows.fit(live)
        parts = self._shadows.parts
        same = {name: [view for part in parts[name] for view in part.views] for name in parts}
        settings = f"outer step {self.steps}, lr={self.lr}, momentum={self.momentum}, nesterov={self.nesterov}"
        return Operation(settings, self._write, lambda name, number: parts[name][number].views, same)

    def _write(self, pairs: Sequence[Pair], means: Sequence[torch.Tensor]) -> None:
        """Move anchors by the step, and put them into the model; every operation as ``torch.optim.SGD`` does it."""
        anchors = [pair.shadows[ANCHOR] for pair in pairs]
        momenta = [pair.shadows[MOMENTUM] for pair in pairs]
        means = [mean.to(anchor.device) for mean, anchor in zip(means, anchors, strict=True)]
        gradients = list(torch._foreach_sub(anchors, means))
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, gradients)
        if self.nesterov:
            torch._foreach_add_(gradients, momenta, alpha=self.momentum)
        else:
            gradients = momenta
        torch._foreach_add_(anchors, gradients, alpha=-self.lr)
        torch._foreach_copy_([pair.source for pair in pairs], anchors)

    @torch.no_grad()
    def _still(self, name: str) -> None:
        for part in self._shadows.parts[name]:
            part.views[MOMENTUM].zero_()

    # ------------------------------------------------------------------ as a state dict

    def state_dict(self) -> dict[str, Any]:
        """Return counts and settings, and by FQN this rank's ``anchor`` and ``momentum``, sharing memory."""
        return {**self._local_state(), "progress": self._plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, on the same layout; ``IncompatibleState`` names what does not fit."""
        copies = matched(self._local_state(), {part: state.get(part) for part in PARTS})
        self._load_plain(state.get("progress"))
        with torch.no_grad():
            for target, source in copies:
                target.copy_(source)

    def _local_state(self) -> dict[str, dict[str, Any]]:
        self._shadows.fit(self._averager.weights.look())
        parameters = self._averager.weights.parameters()
        return {part: local_state(self._shadows, number, parameters) for number, part in enumerate(PARTS)}

    def _plain(self) -> dict[str, Any]:
        return {"steps": self.steps, "lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov}

    def _load_plain(self, value: Any) -> None:
        """Take the count; rates stay as they were given now."""
        if not isinstance(value, Mapping) or type(value.get("steps")) is not int or value["steps"] < 0:
            raise IncompatibleState(f"the state of an outer step has progress {value!r}; want a count of steps")
        self.steps = value["steps"]

    # ------------------------------------------------------------------ in checkpoints

    def leaves(self, name: str, *, loading: bool = False) -> State:
        """Return what a checkpoint stores: anchors and momenta as leaves in the weights' layout, counts as an object."""
        live = self._averager.weights.look()
        self._shadows.fit(live)
        state = State()
        for number, part in enumerate(PARTS):
            prefix = f"{name}.{part}."
            for fqn in live.averaged:
                state.add_leaf(self._shadows.leaf(prefix + fqn, fqn, number))
            state.aliases |= {prefix + alias: prefix + fqn for alias, fqn in live.aliases.items()}
        state.add_object(name, self._plain())
        return state

    def take_over(self, name: str, value: Any, loaded: Collection[str], stored: Collection[str]) -> list[str]:
        """Finish a load that has filled ``leaves``; what the checkpoint lacks begins again from the loaded weights."""
        self._load_plain(value)
        self._shadows.fit(self._averager.weights.look())
        lacking = [n for n in self._shadows.parts if any(f"{name}.{part}.{n}" not in loaded for part in PARTS)]
        for fqn in lacking:
            self._shadows.copy(fqn, ANCHOR)
            self._still(fqn)
        return [f"{name}: {lacking[:5]} begin again from the loaded weights; they were not loaded"] if lacking else []

    def begin_again(self, name: str, why: str) -> list[str]:
        """Begin again from the loaded weights, where a checkpoint has no such state; returns a sentence for the report."""
        self.reset()
        return [f"{name}: {why}; begins again from the loaded weights"]
