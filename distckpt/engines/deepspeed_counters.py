"""A DeepSpeed engine's own numbers: its counters and its loss scale, saved as ``engine.deepspeed``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("distckpt")

_ENGINE = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves in DeepSpeed's loss scalers; everything else in them is configuration."""


class Counters:
    """State of a DeepSpeed engine that belongs to no tensor; the same on all ranks.

    Kept: global steps, samples, skipped and micro steps; loss scale with its window and hysteresis; the overflow flag;
    a custom loss scale; torch's gradient scaler where autocast uses one.
    """

    distckpt_state = "replicated"

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        engine, optimizer = self.engine, self.engine.optimizer
        window = int(engine.gradient_accumulation_steps())
        if engine.managed_gradient_accumulation() and engine.micro_steps % window:
            log.warning(
                "saved after micro batch %d of %d: gradients accumulated since the last step are in no checkpoint",
                engine.micro_steps % window,
                window,
            )
        state: dict[str, Any] = {name: int(getattr(engine, name)) for name in _ENGINE}
        state["gradient_accumulation_steps"] = window
        state["overflow"] = bool(getattr(optimizer, "overflow", False))
        if getattr(optimizer, "custom_loss_scaler", False):
            state["external_loss_scale"] = float(optimizer.external_loss_scale)
        scaler = self._scaler()
        if scaler is not None:
            state["loss_scale"] = {n: getattr(scaler, n) for n in _SCALER if hasattr(scaler, n)}
            state["loss_scale"]["dynamic"] = _is_dynamic(scaler)
        amp = self._amp_scaler()
        if amp is not None:
            state["gradient_scaler"] = amp.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the numbers back. Micro steps continue at an accumulation boundary of the window that is set here."""
        engine, optimizer = self.engine, self.engine.optimizer
        for name in _ENGINE:
            setattr(engine, name, int(state[name]))
        window = int(engine.gradient_accumulation_steps())
        same = window == state["gradient_accumulation_steps"]
        engine.micro_steps = engine.micro_steps // window * window if same else engine.global_steps * window
        if hasattr(optimizer, "overflow"):
            optimizer.overflow = bool(state["overflow"])
        if "external_loss_scale" in state and hasattr(optimizer, "custom_loss_scaler"):
            optimizer.custom_loss_scaler = True
            optimizer.external_loss_scale = state["external_loss_scale"]
        self._load_scaler(state.get("loss_scale"))
        amp = self._amp_scaler()
        if amp is not None and "gradient_scaler" in state:
            amp.load_state_dict(state["gradient_scaler"])

    def derive(self, step: int) -> list[str]:
        """Set the counters from the step of a checkpoint that another engine saved; returns what was done."""
        engine = self.engine
        engine.global_steps, engine.skipped_steps = step, 0
        engine.global_samples = step * int(engine.train_batch_size())
        engine.micro_steps = step * int(engine.gradient_accumulation_steps())
        derived = ", ".join(f"{name} {getattr(engine, name)}" for name in _ENGINE)
        return [f"engine.deepspeed: saved by another engine; from step {step}: {derived}; the loss scale is as it was"]

    def _scaler(self) -> Any:
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)

    def _amp_scaler(self) -> Any:
        inside = getattr(self.engine.optimizer, "torch_autocast_gradscaler", None)
        return inside if inside is not None else getattr(self.engine, "torch_autocast_z0_gradscaler", None)

    def _load_scaler(self, saved: Mapping[str, Any] | None) -> None:
        scaler = self._scaler()
        if scaler is None or saved is None:
            return
        if _is_dynamic(scaler) != saved["dynamic"]:
            log.warning("the saved loss scale (%s) is not used: dynamic and static scaling differ", saved["cur_scale"])
            return
        if saved["dynamic"]:
            for name in _SCALER:
                if name in saved and hasattr(scaler, name):
                    setattr(scaler, name, saved[name])


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)))
