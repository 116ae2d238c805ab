"""The names under a checkpoint root, and the one check that keeps a name from becoming a path.

Every maker has a parser that is its exact inverse: ``parse(make(x)) == x``, and ``parse`` returns None for
any other string (other zero padding, non-ASCII digits, trailing newline, ...): a name never has two
spellings.
"""

from __future__ import annotations

import re
from typing import Final

from distckpt.errors import ManifestError

ROOT_FILE: Final = "distckpt.json"
PINNED: Final = "pinned"
EVALUATIONS: Final = "evaluations"

MAX_COMPONENT_BYTES: Final = 255
MAX_PATH_BYTES: Final = 4096
MAX_NUMBER: Final = 2**63 - 1

_STEP_DIGITS: Final = 10
_GENERATION_DIGITS: Final = 6
_SERIAL_DIGITS: Final = 6
_RANK_DIGITS: Final = 5

_NONCE = re.compile(r"[0-9a-f]{8}")
_STEP = re.compile(r"step-([0-9]{10,19})")
_ATTEMPT = re.compile(r"g([0-9]{6,19})-([0-9a-f]{8})")
_SHARD = re.compile(r"([0-9]{5,19})-of-([0-9]{5,19})\.safetensors")
_MANIFEST = re.compile(r"manifest-g([0-9]{6,19})\.json")
_GENERATION = re.compile(r"generations/([0-9]{6,19})\.json")
_METRICS = re.compile(r"metrics/g([0-9]{6,19})-([0-9]{6,19})\.json")
_COMPONENT = re.compile(r"[A-Za-z0-9._-]+")

# Windows opens devices under these names, with any extension; a checkpoint must be copyable there.
_RESERVED: Final = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))]
)


def _pad(number: int, digits: int, what: str) -> str:
    """Return ``number`` with at least ``digits`` digits; ValueError unless it is an int in [0, 2**63)."""
    if type(number) is not int or not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"{what} must be an int in [0, 2**63), not {number!r}")
    return f"{number:0{digits}d}"


def _unpad(text: str, digits: int) -> int | None:
    """Undo ``_pad``; None when the padding is not the one that ``_pad`` gives."""
    number = int(text)
    return number if number <= MAX_NUMBER and f"{number:0{digits}d}" == text else None


def _single(pattern: re.Pattern[str], name: str, digits: int) -> int | None:
    found = pattern.fullmatch(name)
    return None if found is None else _unpad(found[1], digits)


def _pair(pattern: re.Pattern[str], name: str, digits: tuple[int, int]) -> tuple[int, int] | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    first, second = _unpad(found[1], digits[0]), _unpad(found[2], digits[1])
    return None if first is None or second is None else (first, second)


def step_folder(step: int) -> str:
    """Return the folder of a step: ``step-0000001200``. Grows past ten digits; ValueError if negative."""
    return f"step-{_pad(step, _STEP_DIGITS, 'step')}"


def parse_step_folder(name: str) -> int | None:
    """Return the step of a folder name (no slash), or None if ``step_folder`` never makes that name."""
    return _single(_STEP, name, _STEP_DIGITS)


def attempt_name(generation: int, nonce: str) -> str:
    """Return the folder of one attempt: ``g000003-1a2b3c4d``; the nonce is 8 lowercase hex digits."""
    if _NONCE.fullmatch(nonce) is None:
        raise ValueError(f"nonce must be 8 lowercase hex digits, not {nonce!r}")
    return f"g{_pad(generation, _GENERATION_DIGITS, 'generation')}-{nonce}"


def parse_attempt_name(name: str) -> tuple[int, str] | None:
    """Return (generation, nonce), or None if ``attempt_name`` never makes that name."""
    found = _ATTEMPT.fullmatch(name)
    if found is None:
        return None
    generation = _unpad(found[1], _GENERATION_DIGITS)
    return None if generation is None else (generation, found[2])


def shard_name(rank: int, world: int) -> str:
    """Return the file of one rank: ``00002-of-00008.safetensors``; ValueError unless 0 <= rank < world."""
    text = f"{_pad(rank, _RANK_DIGITS, 'rank')}-of-{_pad(world, _RANK_DIGITS, 'world')}.safetensors"
    if rank >= world:
        raise ValueError(f"rank {rank} does not exist in a world of {world}")
    return text


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Return (rank, world), or None if ``shard_name`` never makes that name."""
    found = _pair(_SHARD, name, (_RANK_DIGITS, _RANK_DIGITS))
    return None if found is None or found[0] >= found[1] else found


def manifest_name(generation: int) -> str:
    """Return the manifest's name in its step folder: ``manifest-g000003.json``."""
    return f"manifest-g{_pad(generation, _GENERATION_DIGITS, 'generation')}.json"


def parse_manifest_name(name: str) -> int | None:
    """Return the generation, or None if ``manifest_name`` never makes that name."""
    return _single(_MANIFEST, name, _GENERATION_DIGITS)


def generation_file(generation: int) -> str:
    """Return the record of a job start, relative to the root: ``generations/000003.json``."""
    return f"generations/{_pad(generation, _GENERATION_DIGITS, 'generation')}.json"


def parse_generation_file(name: str) -> int | None:
    """Return the generation, or None if ``generation_file`` never makes that name."""
    return _single(_GENERATION, name, _GENERATION_DIGITS)


def metrics_file(generation: int, serial: int) -> str:
    """Return one file of metrics, relative to the root: ``metrics/g000003-000012.json``."""
    first = _pad(generation, _GENERATION_DIGITS, "generation")
    return f"metrics/g{first}-{_pad(serial, _SERIAL_DIGITS, 'serial')}.json"


def parse_metrics_file(name: str) -> tuple[int, int] | None:
    """Return (generation, serial), or None if ``metrics_file`` never makes that name."""
    return _pair(_METRICS, name, (_GENERATION_DIGITS, _SERIAL_DIGITS))


def _component_problem(component: str) -> str | None:
    """Say what is wrong with one part of a path, or return None."""
    if not component:
        return "has an empty component (it is absolute, ends in a slash, or has two in a row)"
    if component in (".", ".."):
        return f"has the component {component!r}"
    if len(component) > MAX_COMPONENT_BYTES:
        return f"has a component of {len(component)} bytes (at most {MAX_COMPONENT_BYTES} are allowed)"
    if _COMPONENT.fullmatch(component) is None:
        return f"has the component {component!r} (only A-Z a-z 0-9 . _ - are allowed)"
    if component.endswith("."):
        return f"has the component {component!r}, which ends in a dot"
    if component.split(".", 1)[0].lower() in _RESERVED:
        return f"has the component {component!r}, a device name on Windows"
    return None


def check_relative_path(path: object, where: str) -> None:
    """Raise ``ManifestError`` naming ``where`` (file and field) unless ``path`` is safe below a folder.

    Safe: a str, relative, at most 4096 bytes, components of 1 to 255 characters from ``[A-Za-z0-9._-]``, none
    of them ``.``, ``..``, ending in a dot or a Windows device. The alphabet alone rules out backslashes, NUL,
    control characters and drive letters.
    """
    if not isinstance(path, str):
        raise ManifestError(f"{where}: a path must be a string, not {type(path).__name__}")
    if len(path) > MAX_PATH_BYTES:
        raise ManifestError(f"{where}: a path of {len(path)} characters (at most {MAX_PATH_BYTES})")
    for component in path.split("/"):
        problem = _component_problem(component)
        if problem is not None:
            raise ManifestError(f"{where}: path {path[:300]!r} {problem}; the manifest is damaged or hostile")
