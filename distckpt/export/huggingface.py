"""A Hugging Face folder: safetensors shards of bounded size, their index, and the model's config. Memory: one chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from distckpt.errors import IncompatibleState
from distckpt.export.stream import Progress, Stream, new_folder
from distckpt.format.dtypes import itemsize, safetensors_tag

MAX_SHARD: Final = 5 * 10**9
"""Bytes of tensors in one file, unless a single tensor is larger; the default of the transformers library."""


def export_huggingface(
    streams: Mapping[str, Stream],
    target: str | os.PathLike[str],
    *,
    aliases: Mapping[str, str] | None = None,
    config: Any = None,
    max_shard_size: int = MAX_SHARD,
    progress: Progress = lambda nbytes: None,
) -> list[str]:
    """Write a new folder and return its safetensors files' names.

    Tied tensors are written once; ``aliases`` (further name to written name) stand in the files' metadata, as
    ``safetensors.torch.save_model`` writes them. ``config``, if it is a dict of plain JSON, becomes ``config.json``.
    Raises ``IncompatibleState`` for a dtype that safetensors lacks, ``ConfigError`` if the folder is in use.
    """
    for name, stream in streams.items():
        if safetensors_tag(stream.dtype) is None:
            raise IncompatibleState(f"{name}: safetensors has no {stream.dtype}; leave the tensor out or convert it")
    shards = _split(streams, max_shard_size)
    width = len(shards)
    files = [f"model-{i + 1:05}-of-{width:05}.safetensors" if width > 1 else "model.safetensors" for i in range(width)]
    weight_map: dict[str, str] = {}
    with new_folder(target) as draft:
        for file, names in zip(files, shards, strict=True):
            tied = {alias: name for alias, name in (aliases or {}).items() if name in names}
            write_safetensors(draft / file, {name: streams[name] for name in names}, tied, progress)
            weight_map |= dict.fromkeys(names, file)
        total = sum(stream.nbytes for stream in streams.values())
        _write_json(
            draft / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        if isinstance(config, dict):
            _write_json(draft / "config.json", config)
    return files


def write_safetensors(
    path: str | os.PathLike[str],
    streams: Mapping[str, Stream],
    metadata: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write one new safetensors file. Tensors of larger elements have to come first, or readers find them unaligned."""
    with open(path, "xb") as out:
        out.write(_header(streams, metadata))
        for stream in streams.values():
            for chunk in stream.chunks():
                out.write(chunk)
                progress(len(chunk))


def by_element_size(streams: Mapping[str, Stream]) -> dict[str, Stream]:
    """Return the streams in the order that ``write_safetensors`` wants."""
    return dict(sorted(streams.items(), key=lambda item: -itemsize(item[1].dtype)))


def _split(streams: Mapping[str, Stream], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stream in streams.items():
        if shards[-1] and filled + stream.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += stream.nbytes
    for names in shards:
        names[:] = by_element_size({name: streams[name] for name in names})
    return shards


def _header(streams: Mapping[str, Stream], tied: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **tied}}
    at = 0
    for name, stream in streams.items():
        tag, end = safetensors_tag(stream.dtype), at + stream.nbytes
        entries[name] = {"dtype": tag, "shape": list(stream.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: os.PathLike[str], value: Any) -> None:
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as cause:
        name = os.path.basename(path)
        raise IncompatibleState(
            f"{name}: the model's config is not plain JSON ({cause}); save it as plain values"
        ) from cause
    with open(path, "x", encoding="utf-8") as file:
        file.write(text + "\n")
