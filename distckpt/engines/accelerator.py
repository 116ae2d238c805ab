"""Default generators of the devices that this process sees, alike for CUDA, ROCm, XPU, MPS and others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distckpt.errors import IncompatibleState


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One type of device (``cuda``, ``xpu``, ``mps``, ...) and torch's module for it."""

    kind: str
    module: Any

    @property
    def initialised(self) -> bool:
        """Whether this process has used the accelerator; where torch cannot tell, it counts as used."""
        asked = getattr(self.module, "is_initialized", None)
        return True if asked is None else bool(asked())

    @property
    def count(self) -> int:
        """How many devices this process sees."""
        return int(self.module.device_count())

    @property
    def current(self) -> int:
        """Index of the current device; starts the accelerator if need be."""
        return int(torch.accelerator.current_device_index())

    def name(self, index: int) -> str:
        """Return for instance ``cuda:0``."""
        return f"{self.kind}:{index}"

    def get_state(self, index: int) -> bytes:
        """Return the state of that device's default generator without advancing it."""
        state: torch.Tensor = self.module.get_rng_state(index)
        return state.cpu().numpy().tobytes()

    def set_state(self, index: int, state: bytes) -> None:
        """Set that device's default generator; RuntimeError if the bytes are no state of such a generator."""
        self.module.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), index)

    def seeded_state(self, index: int, seed: int) -> bytes:
        """Return the state that a generator of that device has after ``manual_seed(seed)``."""
        generator = torch.Generator(device=self.name(index)).manual_seed(seed)
        return generator.get_state().cpu().numpy().tobytes()


def current_accelerator() -> Accelerator | None:
    """Return the accelerator that torch would use here, or None; starts no device."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return Accelerator(device.type, torch.get_device_module(device.type))


def capture_devices(here: Accelerator | None) -> dict[str, Any] | None:
    """Return type, current index, and the state of each visible device; None if none is in use."""
    if here is None or not here.initialised:
        return None
    states = [here.get_state(index) for index in range(here.count)]
    return {"type": here.kind, "current": here.current, "states": states}


def device_sources(saved: dict[str, Any] | None, here: Accelerator) -> dict[int, int]:
    """Return which saved device's state each device here gets, as {index here: index saved}.

    The device that the rank uses (the current one) gets the state of the device that it used then, whatever
    their indices. The others keep their index if as many devices are visible as were at the save, with the
    two swapped that would clash; if the number differs (``CUDA_VISIBLE_DEVICES`` cut down to one per rank,
    say) indices mean nothing and the others get none. Raises IncompatibleState for a record that is none.
    """
    if saved is None or saved.get("type") != here.kind:
        return {}
    states, then = saved.get("states"), saved.get("current")
    if not isinstance(states, list) or not isinstance(then, int) or not 0 <= then < len(states):
        raise IncompatibleState(
            f"the saved RNG record of {here.kind} devices is malformed; load_rng_state=False skips it"
        )
    if len(states) != here.count:
        return {here.current: then}
    sources = {index: index for index in range(here.count)}
    sources[here.current], sources[then] = then, here.current
    return sources


def device_notes(saved: dict[str, Any] | None, here: Accelerator | None) -> list[str]:
    """Say which saved states find no device, which devices here no state, and which changed their index."""
    sources = {} if here is None else device_sources(saved, here)
    notes = []
    if saved is not None:
        lost = sorted(set(range(len(saved["states"]))) - set(sources.values()))
        notes += [f"{saved['type']}:{index}: state saved, but no such device here; not restored" for index in lost]
    if here is not None and (here.initialised or sources):
        idle = sorted(set(range(here.count)) - set(sources))
        notes += [f"{here.name(index)}: no saved state, left as it is" for index in idle]
        moved = {index: source for index, source in sources.items() if index != source}
        notes += [f"{here.name(index)}: got the state of {here.name(source)}" for index, source in moved.items()]
    return notes
