"""The one place that opens pickles: a child process that reads what a torch file *describes*, and runs nothing of it.

Run as ``python -m distckpt.importers.restricted_unpickler``: requests come as one JSON line on standard input, one JSON
line per file goes out. The child has no torch. A pickle may name only what ``HANDLERS`` and ``PROFILES`` (stand_ins.py) list, and
each of these is a stand-in, so no code of any library can be reached; anything else is refused by name.
Tensors are never loaded: their dtype, shape, strides and byte offset in the file are the answer. Memory, processor
time and writing are capped, so that a hostile file costs an error. torch's own ``weights_only`` has the same rule, but
runs in the reader's process and loads whole storages where a file cannot be mapped.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import resource
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any, Final

from distckpt.format import typed_json
from distckpt.format.dtypes import is_known, itemsize
from distckpt.importers.stand_ins import (
    HANDLERS,
    PROFILES,
    Inert,
    Named,
    NumpyArray,
    NumpyDtype,
    Refused,
    Storage,
    Tensor,
    Unreadable,
)

MAX_MEMORY: Final = 4 << 30
MAX_CPU_S: Final = 600
MAX_PICKLE: Final = 1 << 30
MAX_NODES: Final = 20_000_000

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001


_RENAMED: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""What Python 2 called them, and protocols below 3 still do."""


class _Unpickler(pickle.Unpickler):
    """Finds only what is listed."""

    def __init__(self, file: IO[bytes], allowed: frozenset[str], storage: Callable[[Any], Any]) -> None:
        super().__init__(file)
        self._allowed, self._storage = allowed, storage
        self._inert: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in HANDLERS:
            return HANDLERS[full]
        if module == "torch" and is_known(name):
            return Named(full, name)
        if full in self._allowed:
            return self._inert.setdefault(full, type(name, (Inert,), {"qualname": full}))
        raise Refused(full)

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


# ---------------------------------------------------------------- files


class _Slice(io.RawIOBase):
    """Bytes [start, start + size) of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def describe(path: str, start: int, size: int | None, form: str, allowed: frozenset[str]) -> Any:
    """Return what a file (or a part of it) describes. ``form``: ``torch`` for torch.save, ``pickle`` for a bare one."""
    with open(path, "rb", buffering=0) as raw:
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise Unreadable("not a regular file")
        whole = os.fstat(raw.fileno()).st_size
        size = whole - start if size is None else size
        if not 0 <= start <= start + size <= whole:
            raise Unreadable(f"bytes [{start}, {start + size}) of a file of {whole}; it was truncated")
        file = io.BufferedReader(_Slice(raw, start, size), 1 << 16)  # type: ignore[arg-type]
        if form == "pickle":
            if size > MAX_PICKLE:
                raise Unreadable(f"a pickle of {size} bytes, more than {MAX_PICKLE}")
            return _Unpickler(file, allowed, _no_storage).load()
        head = file.peek(4)[:4]
        if head == b"PK\x03\x04":
            return _read_zip(file, start, allowed)
        return _read_legacy(file, start, size, allowed)


def _no_storage(pid: Any) -> Any:
    raise Refused(f"a persistent object {pid!r:.80}")


def _read_zip(file: IO[bytes], start: int, allowed: frozenset[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise Unreadable("two records of one name")
        roots = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Unreadable("not a file of torch.save: it has no data.pkl")
        folder = roots[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in records:
            raise Unreadable("a TorchScript archive; save its state_dict instead")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise Unreadable("written on a big-endian machine")
        known: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            dtype, key, numel = _storage_id(pid)
            if key not in known:
                info = records.get(f"{folder}data/{key}")
                nbytes = numel * (itemsize(dtype) if dtype else 1)
                if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < nbytes:
                    raise Unreadable(f"record {key!r:.40} is missing, compressed or too short")
                known[key] = Storage(dtype, numel, start + _data_offset(file, info))
            return known[key]

        if records[roots[0]].file_size > MAX_PICKLE:
            raise Unreadable(f"a pickle of more than {MAX_PICKLE} bytes")
        return _Unpickler(io.BytesIO(archive.read(roots[0])), allowed, storage).load()


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise Unreadable("a damaged zip record")
    name, extra = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name + extra)


def _storage_id(pid: Any) -> tuple[str | None, str, int]:
    if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Named):
        raise Refused(f"a persistent object {pid!r:.80}")
    if type(pid[2]) is not str or type(pid[4]) is not int or not 0 <= pid[4] < 1 << 62:
        raise Unreadable("a storage's record makes no sense")
    if pid[1].dtype is None and pid[1].name != "torch.UntypedStorage":
        raise Refused(pid[1].name)
    return pid[1].dtype, pid[2], pid[4]


def _read_legacy(file: IO[bytes], start: int, size: int, allowed: frozenset[str]) -> Any:
    """Read the format before torch 1.6: five pickles, then each storage as its length and its bytes."""
    known: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        dtype, key, numel = _storage_id(pid)
        if len(pid) > 5 and pid[5] is not None:
            raise Unreadable("storages that are views of others; save the file again with a newer torch")
        return known.setdefault(key, Storage(dtype, numel))

    try:
        head = [_Unpickler(file, frozenset(), _no_storage).load() for _ in range(3)]
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as cause:
        raise Unreadable(f"neither a zip file nor a pickle of torch.save ({cause})") from cause
    if head[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or not isinstance(head[2], dict) or not head[2]["little_endian"]:
        raise Unreadable("a pickle that torch.save did not write")
    found = _Unpickler(file, allowed, storage).load()
    for key in _Unpickler(file, frozenset(), _no_storage).load():
        item = known[key]
        (numel,) = struct.unpack("<q", file.read(8))
        nbytes = numel * (itemsize(item.dtype) if item.dtype else 1)
        if numel != item.numel or file.tell() + nbytes > size:
            raise Unreadable(f"storage {key!r:.40} is truncated")
        item.start = start + file.tell()
        file.seek(nbytes, 1)
    if any(item.start < 0 for item in known.values()):
        raise Unreadable("a storage's bytes are missing")
    return found


# ---------------------------------------------------------------- the answer


class _Plain:
    """Turns what was unpickled into plain values, and tensors into references to a table."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self._index: dict[int, int] = {}
        self._kept: list[Any] = []
        self._nodes = 0

    def value(self, node: Any) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES} values")
        if node is None or type(node) in (bool, int, float, str, bytes, complex, bytearray):
            return node
        if type(node) in (list, tuple, set, frozenset):
            return type(node)(map(self.value, node))
        if type(node) in (dict, collections.OrderedDict):
            return type(node)((self._key(key), self.value(item)) for key, item in node.items())
        if isinstance(node, Tensor):
            return typed_json.Ref(str(self._tensor(node)))
        if isinstance(node, Inert):
            return self._object(node)
        if isinstance(node, NumpyArray):
            return _numpy(node)
        if isinstance(node, (Named, NumpyDtype)):
            return node.name if isinstance(node, Named) else node.text
        if isinstance(node, type) and issubclass(node, Inert):
            return node.qualname
        raise Unreadable(f"a value of type {type(node).__name__} where data was expected")

    def _object(self, node: Inert) -> Any:
        if not isinstance(node.state, dict) and len(node.args) == 1:
            return self.value(node.args[0])  # an enum's value
        state = node.state if isinstance(node.state, dict) else {"state": node.state, "args": node.args}
        return {"class": node.qualname, **{str(key): self.value(item) for key, item in state.items()}}

    def _key(self, key: Any) -> Any:
        if isinstance(key, Inert):
            return tuple((name, self.value(item)) for name, item in sorted((key.state or {}).items()))
        return self.value(key)

    def _tensor(self, node: Tensor) -> int:
        if id(node) not in self._index:
            self._index[id(node)] = len(self.tensors)
            self._kept.append(node)
            at = node.storage.start + node.offset * itemsize(node.dtype)
            self.tensors.append([node.dtype, at, list(node.shape), list(node.stride)])
        return self._index[id(node)]


def _numpy(node: NumpyArray) -> Any:
    import numpy as np

    _, shape, dtype, fortran, raw = node.state
    if (
        not isinstance(dtype, NumpyDtype)
        or dtype.text.lstrip("<|=")[:1] not in tuple("biufc")
        or type(raw) is not bytes
    ):
        raise Unreadable("a NumPy array of a kind that is not plain numbers")
    if dtype.order == ">":
        raise Unreadable("a big-endian NumPy array")
    array = np.frombuffer(raw, np.dtype(dtype.text)).reshape(shape, order="F" if fortran else "C")
    return array.copy() if shape else array[()]


def split(value: Any, levels: int = 2) -> dict[str, Any]:
    """Return typed JSON in parts, an entry each of the outer dicts: one part has a limit, a checkpoint's index has not."""
    if levels and type(value) is dict:
        return {"dict": [[typed_json.encode(key), split(item, levels - 1)] for key, item in value.items()]}
    return {"value": typed_json.encode(value)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"tree", "tensors"}`` for one file, or ``{"refused"}`` or ``{"unreadable"}`` with the reason."""
    allowed = PROFILES[request["profile"]] | frozenset(request["allow"])
    plain = _Plain()
    try:
        found = describe(request["path"], request["start"], request["size"], request["form"], allowed)
        tree = split(plain.value(found))
    except Refused as refused:
        return {"refused": str(refused)}
    except (RecursionError, MemoryError) as cause:
        return {"unreadable": f"its pickle is nested without end or asks for too much memory ({type(cause).__name__})"}
    except Exception as cause:  # a hostile pickle may raise anything
        return {"unreadable": str(cause) if isinstance(cause, Unreadable) else f"{type(cause).__name__}: {cause}"}
    return {"tree": tree, "tensors": plain.tensors}


def main() -> None:
    """Answer the requests on standard input."""
    requests = json.loads(sys.stdin.buffer.readline())
    for limit, most in (
        (resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CPU, MAX_CPU_S), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    for request in requests:
        sys.stdout.write(json.dumps(answer(request)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
