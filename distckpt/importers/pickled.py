"""Asking the child process (restricted_unpickler.py) what pickled files describe; no pickle is opened in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import distckpt
from distckpt.errors import CorruptCheckpoint, ForbiddenPickle
from distckpt.format import typed_json
from distckpt.format.dtypes import is_known
from distckpt.importers.files import FileTensor

TIMEOUT_S: Final = 900.0
MAX_ANSWER: Final = 2 << 30


@dataclass(frozen=True, slots=True)
class Pickled:
    """A file, or bytes [start, start + size) of one. ``form``: ``torch`` (torch.save) or ``pickle`` (a bare pickle)."""

    path: str | os.PathLike[str]
    start: int = 0
    size: int | None = None
    form: str = "torch"


def read_pickled(files: Sequence[Pickled], *, profile: str = "torch", allow: Sequence[str] = ()) -> list[Any]:
    """Return each file's content: plain values, and a ``FileTensor`` where a tensor was.

    An object of a class that ``profile`` or ``allow`` lists becomes a dict of its attributes with its ``class``; its
    code does not run. Raises ``ForbiddenPickle`` naming the file and what it names, ``CorruptCheckpoint`` otherwise.
    """
    if not files:
        return []
    requests = [
        {"path": os.path.abspath(f.path), "start": f.start, "size": f.size, "form": f.form, "profile": profile,
         "allow": list(allow)}
        for f in files
    ]  # fmt: skip
    lines = _ask(requests)
    return [_content(request, line) for request, line in zip(requests, lines, strict=True)]


def _ask(requests: list[dict[str, Any]]) -> list[bytes]:
    root = str(Path(distckpt.__file__).resolve().parents[1])
    environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "LANG", "LC_ALL") if key in os.environ}
    environment |= {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-s", "-m", "distckpt.importers.restricted_unpickler"]
    names = f"{requests[0]['path']}" + (f" and {len(requests) - 1} more" if requests[1:] else "")
    try:
        done = subprocess.run(
            command, input=json.dumps(requests).encode() + b"\n", capture_output=True, env=environment, cwd="/",
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as cause:
        raise CorruptCheckpoint(f"{names}: unpickling took more than {TIMEOUT_S:.0f} s; damaged or hostile") from cause
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(requests):
        culprit = requests[min(len(lines), len(requests) - 1)]["path"]
        tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise CorruptCheckpoint(
            f"{culprit}: the process that unpickles it ended with status {done.returncode} {' '.join(tail)}; the file is "
            "damaged or hostile, or larger than the limits of restricted_unpickler.py"
        )
    return lines


def _content(request: Mapping[str, Any], line: bytes) -> Any:
    path = request["path"]
    found = typed_json.strict_loads(line, where=path, max_bytes=MAX_ANSWER, error=CorruptCheckpoint)
    if "refused" in found:
        raise ForbiddenPickle(
            f"{path}: its pickle names {found['refused']}, which is not on the list of what may be read; nothing of the file "
            "was run. If it is a plain class, --allow it by this name to read its attributes as data"
        )
    if "unreadable" in found:
        raise CorruptCheckpoint(f"{path}: {found['unreadable']}")
    tensors = [_tensor(path, row) for row in found["tensors"]]
    return _placed(_joined(found["tree"], path), tensors)


def _joined(part: Mapping[str, Any], path: str) -> Any:
    """Undo ``restricted_unpickler.split``."""
    if "dict" in part:
        items = part["dict"]
        return {typed_json.decode(k, where=path, error=CorruptCheckpoint): _joined(item, path) for k, item in items}
    return typed_json.decode(part["value"], where=path, error=CorruptCheckpoint)


def _tensor(path: str, row: list[Any]) -> FileTensor:
    dtype, start, shape, stride = row
    numbers = (start, *shape, *stride)
    if not is_known(dtype) or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(stride):
        raise CorruptCheckpoint(f"{path}: a tensor's record makes no sense")
    return FileTensor(path, start, dtype, tuple(shape), tuple(stride))


def _placed(tree: Any, tensors: Sequence[FileTensor]) -> Any:
    if isinstance(tree, typed_json.Ref):
        return tensors[int(tree.name)]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_placed(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return type(tree)((key, _placed(item, tensors)) for key, item in tree.items())
    return tree
