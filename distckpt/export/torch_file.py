"""A ``torch.save`` file, written tensor by tensor: ``torch.load(path, weights_only=True)`` reads it, mapped or not.

The layout is torch's own since 1.6: a zip of stored records, ``data.pkl`` and one record per storage, each aligned to 64
bytes as torch aligns them. Tied tensors share their record. Memory: one chunk.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, Final

import torch

from distckpt.dcp.leaves import torch_dtype
from distckpt.export.stream import Progress, Stream, new_file
from distckpt.format.dtypes import itemsize

_ALIGN: Final = 64
_ZIP64: Final = 20
"""Bytes that a record's zip64 sizes take in its local header, before our padding."""


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Stands for a storage in the pickle: saved by its key, typed or in bytes."""

    key: str
    dtype: str
    numel: int

    def persistent_id(self) -> tuple[Any, ...]:
        typed = _storage_class(self.dtype)
        if typed is None:
            return ("storage", torch.UntypedStorage, self.key, "cpu", self.numel * itemsize(self.dtype))
        return ("storage", typed, self.key, "cpu", self.numel)


class _Tensor:
    """Pickles as the call that rebuilds a tensor from its storage."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> Any:
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        common: tuple[Any, ...] = (self.storage, 0, self.shape, tuple(strides), False, OrderedDict())
        if _storage_class(self.storage.dtype) is None:
            return torch._utils._rebuild_tensor_v3, (*common, torch_dtype(self.storage.dtype))
        return torch._utils._rebuild_tensor_v2, common


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id() if isinstance(obj, _Storage) else None


def _storage_class(dtype: str) -> Any:
    """Return torch's storage class of a dtype, None for the newer dtypes that have none."""
    name = torch.storage._dtype_to_storage_type_map().get(torch_dtype(dtype))
    return None if name is None else getattr(torch, name)


def export_torch_file(
    tree: Any, streams: Mapping[str, Stream], target: str | os.PathLike[str], progress: Progress = lambda nbytes: None
) -> None:
    """Write ``tree``, in which each ``typed_json.Ref`` names a stream, so that it exists completely or not at all.

    Raises ``ConfigError`` if the target exists. References to one name share memory when loaded.
    """
    keys = {name: str(number) for number, name in enumerate(streams)}
    stand_ins = {
        name: _Tensor(_Storage(keys[name], stream.dtype, math.prod(stream.shape)), stream.shape)
        for name, stream in streams.items()
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_replaced(tree, stand_ins))
    with (
        new_file(target) as draft,
        open(draft, "xb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        _record(archive, file, "archive/data.pkl", buffer.getvalue())
        _record(archive, file, "archive/byteorder", b"little")
        for name, stream in streams.items():
            with _open(archive, file, f"archive/data/{keys[name]}") as record:
                for chunk in stream.chunks():
                    record.write(chunk)
                    progress(len(chunk))
        _record(archive, file, "archive/version", b"3\n")


def _replaced(tree: Any, tensors: Mapping[str, _Tensor]) -> Any:
    from distckpt.dcp.leaves import unflatten_tree

    return unflatten_tree(tree, tensors)  # type: ignore[arg-type]


def _open(archive: zipfile.ZipFile, file: IO[bytes], name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(name)
    start = file.tell() + 30 + len(name) + _ZIP64 + 4
    padding = -start % _ALIGN
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(info, "w", force_zip64=True)


def _record(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes) -> None:
    with _open(archive, file, name) as record:
        record.write(data)
