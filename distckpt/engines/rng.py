"""Random number states: capture, restore, and the rule that gives new ranks streams of their own.

Covered are the process-wide generators: Python's ``random``, NumPy's legacy global state, torch's CPU
generator and the default generator of every device of the current accelerator. A generator that a program
makes for itself (``random.Random()``, ``numpy.random.default_rng()``, ``torch.Generator()``) is that
program's own state, to be saved as such.

A state is a plain dict of ints, floats, bytes and small NumPy arrays. Reading it advances nothing.
"""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from distckpt.engines.accelerator import (
    Accelerator,
    capture_devices,
    current_accelerator,
    device_notes,
    device_sources,
)
from distckpt.errors import IncompatibleState
from distckpt.format.digest import digest

logger = logging.getLogger("distckpt")

RngState: TypeAlias = dict[str, Any]

VERSION: Final = 1
RULE: Final = "distckpt-rng-1"
"""Names the rule of ``derive_rng``; a changed rule gets a new name."""

_REFUSALS: Final = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, struct.error)
_BIT_GENERATORS: Final = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def capture_rng() -> RngState:
    """Return the state of every process-wide generator of this rank, advancing none of them.

    ``python``: version, 625 words (uint32, little-endian bytes), gauss_next. ``numpy``:
    ``get_state(legacy=False)``. ``torch``: bytes. ``devices``: None, or the accelerator's type, the current
    device's index, and the bytes of each visible device. A process that has not initialised its accelerator
    yet has ``devices`` None: asking would start it, and a generator that was never used has no position to
    keep.
    """
    version, words, gauss_next = random.getstate()
    return {
        "version": VERSION,
        "python": {
            "version": version,
            "words": struct.pack(f"<{len(words)}I", *words),
            "gauss_next": gauss_next,
        },
        "numpy": _copied(np.random.get_state(legacy=False)),
        "torch": _to_bytes(torch.get_rng_state()),
        "devices": capture_devices(current_accelerator()),
    }


def restore_rng(state: RngState) -> list[str]:
    """Set every generator that ``state`` holds and that exists here, bit for bit; return their names.

    Names are ``python``, ``numpy``, ``torch`` and ``cuda:0``, ... What could not be matched (see
    ``rng_differences``) is logged as a warning each, never passed over. Raises IncompatibleState where a
    saved state does not fit this Python, NumPy or torch.
    """
    differences = rng_differences(state)
    steps: list[tuple[str, Callable[[], None]]] = [
        (name, partial(restore, state[name])) for name, restore in _RESTORERS.items() if state.get(name) is not None
    ]
    here = current_accelerator()
    for index, saved in _device_states(state.get("devices"), here).items():
        assert here is not None
        steps.append((here.name(index), partial(here.set_state, index, saved)))
    for name, apply in steps:
        try:
            apply()
        except _REFUSALS as error:
            raise IncompatibleState(
                f"the saved RNG state of {name!r} does not fit here ({type(error).__name__}: {error}); "
                "resume with the versions it was saved with, or load with load_rng_state=False"
            ) from error
    for difference in differences:
        logger.warning("RNG: %s", difference)
    return [name for name, _ in steps]


def rng_differences(state: RngState) -> list[str]:
    """Return, in words, what of ``state`` has no place here, and what here has no saved state.

    The list is empty if all match. Raises IncompatibleState for a state of another version, or none at all.
    """
    if state.get("version") != VERSION:
        raise IncompatibleState(
            f"RNG state of version {state.get('version')!r}, this distckpt reads version {VERSION}; "
            "load with load_rng_state=False, or use the release that wrote it"
        )
    notes = [f"{name}: no saved state, left as it is" for name in _RESTORERS if state.get(name) is None]
    devices, here = state.get("devices"), current_accelerator()
    if devices is not None and "base" in devices:
        if devices["type"] is not None and (here is None or devices["type"] != here.kind):
            notes.append(f"{devices['type']}: streams were derived, but there is no such device here")
        return notes
    return notes + device_notes(devices, here)


def derive_rng(states_of_old_rank: RngState, *, rank: int, step: int) -> RngState:
    """Return the state for a rank that did not exist when the checkpoint was saved.

    Give it the saved state of rank ``rank mod old world size``, the new rank, and the checkpoint's step.
    The rule, called ``distckpt-rng-1``, with C the encoding of ``canonical``, H the xxh3-128 as 32
    lowercase hex digits and int() of hex digits big-endian:

    - ``base = H(C([saved, "distckpt-rng-1", rank, step]))``
    - ``seed(stream) = int(H(C(["distckpt-rng-1", base, stream])))``, a number of 128 bits
    - Python: ``random.Random(seed("python"))``
    - NumPy: the bit generator of the saved state's kind, made by ``kind(seed("numpy"))``; no cached gauss
    - torch CPU: ``Generator().manual_seed(seed("torch") mod 2**64)`` (torch's Mersenne Twister keeps 32
      bits of it)
    - device i of the accelerator: ``Generator(device).manual_seed(seed("device:i") mod 2**64)``

    The result has ``capture_rng``'s form, except that ``devices`` holds ``base`` in place of states, since
    only ``restore_rng`` on the new rank knows the devices there. Raises IncompatibleState for an unknown
    bit generator.
    """
    base = digest(canonical([states_of_old_rank, RULE, rank, step]))
    kind = (states_of_old_rank.get("numpy") or {}).get("bit_generator", "MT19937")
    version, words, gauss_next = random.Random(_stream_seed(base, "python")).getstate()
    seeded = torch.Generator().manual_seed(_stream_seed(base, "torch") % 2**64)
    return {
        "version": VERSION,
        "python": {
            "version": version,
            "words": struct.pack(f"<{len(words)}I", *words),
            "gauss_next": gauss_next,
        },
        "numpy": _copied({**_bit_generator(kind, _stream_seed(base, "numpy")).state, "has_gauss": 0, "gauss": 0.0}),
        "torch": _to_bytes(seeded.get_state()),
        "devices": {"type": (states_of_old_rank.get("devices") or {}).get("type"), "base": base},
    }


def fingerprint(state: RngState) -> str:
    """Return the xxh3-128 of ``canonical(state)``; a state read back from storage has the same."""
    return digest(canonical(state))


def canonical(value: Any) -> bytes:
    """Return bytes that depend on nothing but the value: a tag letter, then the content.

    None ``n``; bool and int ``i`` + decimal digits (True is 1); float ``f`` + IEEE 754 big-endian; str
    ``s`` + UTF-8; bytes ``b`` + them. list and tuple ``l`` + each item framed; dict (str keys, sorted by
    code point) ``d`` + each key and value framed; a NumPy array as the dict of ``dtype`` (``dtype.str``,
    little-endian), ``shape`` and C-order ``data``; a framed item is its length in 8 bytes little-endian,
    then its bytes. TypeError for anything else.
    """
    if value is None:
        return b"n"
    if isinstance(value, bool | int | np.integer):
        return b"i" + str(int(value)).encode()
    if isinstance(value, float | np.floating):
        return b"f" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"s" + value.encode()
    if isinstance(value, bytes | bytearray):
        return b"b" + bytes(value)
    if isinstance(value, list | tuple):
        return b"l" + b"".join(_framed(canonical(item)) for item in value)
    if isinstance(value, dict):
        parts = (_framed(canonical(key)) + _framed(canonical(value[key])) for key in sorted(value))
        return b"d" + b"".join(parts)
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return canonical({"dtype": array.dtype.str, "shape": list(value.shape), "data": array.tobytes()})
    raise TypeError(f"no canonical bytes for {type(value).__qualname__}")


def _framed(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _stream_seed(base: str, stream: str) -> int:
    return int(digest(canonical([RULE, base, stream])), 16)


def _copied(state: Any) -> dict[str, Any]:
    """Copy a NumPy state so that no array in it is shared, with plain Python scalars."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            copied[key] = _copied(value)
        elif isinstance(value, np.ndarray):
            copied[key] = value.copy()
        else:
            copied[key] = value.item() if isinstance(value, np.generic) else value
    return copied


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _bit_generator(kind: str, seed: int | None = None) -> Any:
    if kind not in _BIT_GENERATORS:
        raise IncompatibleState(
            f"NumPy's global state uses the bit generator {kind!r}; known are {', '.join(_BIT_GENERATORS)}"
        )
    return getattr(np.random, kind)(seed)


def _restore_python(saved: dict[str, Any]) -> None:
    words = struct.unpack(f"<{len(saved['words']) // 4}I", saved["words"])
    random.setstate((saved["version"], words, saved["gauss_next"]))


def _restore_numpy(saved: dict[str, Any]) -> None:
    kind = saved["bit_generator"]
    if np.random.get_state(legacy=False)["bit_generator"] != kind:
        np.random.set_bit_generator(  # type: ignore[attr-defined]
            _bit_generator(kind)
        )
    np.random.set_state(_copied(saved))


def _restore_torch(saved: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(saved), dtype=torch.uint8))


_RESTORERS: Final[dict[str, Callable[[Any], None]]] = {
    "python": _restore_python,
    "numpy": _restore_numpy,
    "torch": _restore_torch,
}


def _device_states(saved: dict[str, Any] | None, here: Accelerator | None) -> dict[int, bytes]:
    """Return the state that each device here gets, by index."""
    if saved is None or here is None:
        return {}
    if "base" not in saved:
        return {to: saved["states"][source] for to, source in device_sources(saved, here).items()}
    if saved["type"] != here.kind and not here.initialised:
        return {}
    seeds = {index: _stream_seed(saved["base"], f"device:{index}") % 2**64 for index in range(here.count)}
    return {index: here.seeded_state(index, seed) for index, seed in seeds.items()}
