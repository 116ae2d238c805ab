"""A folder written by torch.distributed.checkpoint: ``.metadata`` and ``*.distcp`` files, read without torch's pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range, tiling_error
from distckpt.dcp.dcp_names import nested_objects
from distckpt.errors import CorruptCheckpoint, IncompatibleState
from distckpt.export.stream import Buffer, Stream
from distckpt.format.dtypes import itemsize
from distckpt.format.names import check_relative_path
from distckpt.importers.files import FileTensor
from distckpt.importers.pickled import Pickled, read_pickled
from distckpt.importers.source import Options, Source, box_of

METADATA = ".metadata"

Path_ = tuple[str | int, ...]
Chunks = list[tuple[Box, FileTensor]]


def is_dcp_folder(path: Path) -> bool:
    """Whether a folder has DCP's metadata file."""
    return (path / METADATA).is_file()


def open_dcp_folder(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a DCP folder. Chunks are read where they lie, so memory does not depend on their sizes.

    ``optimizer`` at the top is renamed ``optim``, a common wrapper (``app.model.…``) is dropped; names without
    ``model`` get the prefix. Raises ``ForbiddenPickle``, ``CorruptCheckpoint``, ``IncompatibleState`` (extensions such as
    compression).
    """
    folder = Path(path)
    metadata = read_pickled([Pickled(folder / METADATA, form="pickle")], profile="dcp")[0]
    try:
        entries: Mapping[str, Any] = metadata["state_dict_metadata"]
        stored = {
            (i["fqn"], i.get("offset")): info for key, info in metadata["storage_data"].items() if (i := dict(key))
        }
        planner = metadata.get("planner_data") or {}
        wanted = [_record(folder, info) for info in stored.values()]
    except (KeyError, TypeError, AttributeError) as cause:
        raise CorruptCheckpoint(
            f"{folder / METADATA}: not the metadata of torch.distributed.checkpoint ({cause})"
        ) from cause
    records = dict(zip(stored, read_pickled(wanted, allow=options.allow), strict=True))
    source = Source("dcp", os.fspath(path))
    paths = _our_paths(entries, planner if isinstance(planner, dict) else {}, options.prefix)
    flat: dict[str, Any] = {}
    for fqn, entry in entries.items():
        name = ".".join(map(str, paths[fqn]))
        if "size" in entry:
            source.add(name, _tensor(folder, fqn, entry, records))
        else:
            flat[name] = _one(folder, fqn, records)
    names = {".".join(map(str, path)): path for path in paths.values()}
    for name, value in nested_objects(flat, set(source.tensors), names).items():
        source.add_tree(name, value) if name in flat else source.objects.__setitem__(name, value)
    if any(name.startswith("optim.state.0.") for name in source.tensors):
        source.notes.append(
            "optimizer state is keyed by number there and stays so; it cannot be loaded by parameter name"
        )
    return source


def _record(folder: Path, info: Mapping[str, Any]) -> Pickled:
    if info.get("transform_descriptors"):
        raise IncompatibleState(
            f"{folder}: written with extensions {info['transform_descriptors']}; save it without them"
        )
    check_relative_path(info["relative_path"], f"{folder / METADATA}: relative_path")
    return Pickled(folder / info["relative_path"], info["offset"], info["length"])


def _our_paths(entries: Mapping[str, Any], planner: Mapping[str, Any], prefix: str) -> dict[str, Path_]:
    """Return each flattened name's key path in our terms: ``("model", ...)``, ``("optim", ...)``, others as they are."""
    paths: dict[str, Path_] = {}
    for fqn in entries:
        known = planner.get(fqn)
        paths[fqn] = tuple(known) if isinstance(known, (tuple, list)) and known else tuple(fqn.split("."))
    tops = {path[0] for path in paths.values()}
    inner = {path[1] for path in paths.values() if len(path) > 1}
    if len(tops) == 1 and "model" not in tops and "model" in inner:
        paths = {fqn: path[1:] for fqn, path in paths.items()}
        tops = inner
    if "optim" not in tops:
        paths = {fqn: ("optim", *path[1:]) if path[0] == "optimizer" else path for fqn, path in paths.items()}
    if "model" not in tops and prefix:
        head = prefix.rstrip(".")
        has = {fqn for fqn, entry in entries.items() if "size" in entry and paths[fqn][0] != "optim"}
        paths = {fqn: (head, *path) if fqn in has else path for fqn, path in paths.items()}
    return paths


def _one(folder: Path, fqn: str, records: Mapping[Any, Any]) -> Any:
    if (fqn, None) not in records:
        raise CorruptCheckpoint(f"{folder}: the metadata says nothing about where {fqn!r} is stored")
    return records[fqn, None]


def _tensor(folder: Path, fqn: str, entry: Mapping[str, Any], records: Mapping[Any, Any]) -> Stream:
    shape = tuple(entry["size"])
    dtype = str(entry["properties"]["state"][0]).removeprefix("torch.")
    chunks: Chunks = []
    for chunk in entry["chunks"]:
        box = box_of(chunk["offsets"], chunk["sizes"])
        found = records.get((fqn, tuple(chunk["offsets"])))
        if not isinstance(found, FileTensor) or (found.dtype, found.shape) != (dtype, box.sizes):
            raise CorruptCheckpoint(
                f"{folder}: chunk {box.offsets} of {fqn!r} is not the {dtype} {box.sizes} it should be"
            )
        chunks.append((box, found))
    wrong = tiling_error(shape, [box for box, _ in chunks])
    if wrong:
        raise CorruptCheckpoint(f"{folder}: the chunks of {fqn!r} {list(shape)} do not make it whole: {wrong}")
    return _assembled(dtype, shape, chunks)


def _assembled(dtype: str, shape: tuple[int, ...], chunks: Sequence[tuple[Box, FileTensor]]) -> Stream:
    """Return a tensor whose boxes lie in several places; a read opens only those that it touches."""
    size = itemsize(dtype)

    def read(start: int, stop: int) -> Buffer:
        import numpy as np

        first, last = start // size, -(-stop // size)
        out = bytearray((last - first) * size)
        at = 0
        for region in flat_range_to_boxes(shape, first, last):
            target = np.frombuffer(out, np.uint8, region.numel * size, at).reshape(*region.sizes, size)
            for box, tensor in chunks:
                common = region.intersect(box)
                if common is not None:
                    part = _part(tensor, common.relative_to(box.offsets), size).reshape(*common.sizes, size)
                    target[common.relative_to(region.offsets).slices] = part
            at += region.numel * size
        return memoryview(out)[start - first * size : stop - first * size]

    return Stream(dtype, shape, read)


def _part(tensor: FileTensor, local: Box, size: int) -> Any:
    """Return a region of one stored chunk as bytes."""
    import numpy as np

    stream = tensor.stream()
    flat = is_flat_range(local, tensor.shape)
    if flat is not None:
        return np.frombuffer(stream.read(flat[0] * size, flat[1] * size), np.uint8)
    # A region that is not one run: whole rows of the chunk that hold it, then the cut.
    rows = local.sizes[0]
    row = tensor.numel // tensor.shape[0] * size
    data = stream.read(local.offsets[0] * row, (local.offsets[0] + rows) * row)
    whole = np.frombuffer(data, np.uint8).reshape(rows, *tensor.shape[1:], size)
    return whole[(slice(None), *Box(local.offsets[1:], local.sizes[1:]).slices)]
