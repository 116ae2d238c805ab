"""A Hugging Face folder: safetensors or, where there are none, ``.bin`` files; one file, or shards with their index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, DistckptError
from distckpt.format.dtypes import from_tag, itemsize
from distckpt.format.names import check_relative_path
from distckpt.format.plain_json import strict_loads
from distckpt.importers.files import FileTensor, read_bytes, regular_file
from distckpt.importers.pickled import Pickled, read_pickled
from distckpt.importers.source import Options, Source

MAX_HEADER: Final = 100_000_000
MAX_JSON: Final = 256 << 20
_KINDS: Final = (
    ("model.safetensors.index.json", "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)


def is_huggingface(path: Path) -> bool:
    """Whether a path is a safetensors file or a folder with a model's files."""
    if path.is_file():
        return path.suffix == ".safetensors"
    named = any((path / name).is_file() for index, single, _ in _KINDS for name in (index, single))
    return named or any(path.glob("*.safetensors"))


def open_huggingface(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a folder or a safetensors file. Where safetensors are there, pickled files beside them are never opened.

    Every name gets the prefix. ``config.json`` becomes the model config. Raises ``CheckpointNotFound``,
    ``CorruptCheckpoint``, ``ForbiddenPickle``.
    """
    folder = Path(path)
    source = Source("huggingface", os.fspath(path))
    names: dict[str, str] | None
    if folder.is_file():
        files, names, folder = [folder], None, folder.parent
    else:
        files, names = _files(folder)
    found, tied = _contents(files, options)
    if names is not None:
        absent = sorted(name for name, file in names.items() if found.get(name, (None, ""))[1] != file)
        if absent:
            raise CorruptCheckpoint(
                f"{folder}: the index promises {absent[0]!r} in {names[absent[0]]}; it is not there"
            )
    for name, (tensor, _) in found.items():
        if names is None or name in names:
            source.add(options.prefix + name, tensor)
    for alias, target in tied.items():
        if target in found and alias not in found:
            source.aliases[options.prefix + alias] = options.prefix + target
    config = folder / "config.json"
    if config.is_file():
        source.config = _json(config)
    return source


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    for index, single, suffix in _KINDS:
        if (folder / index).is_file():
            content = _json(folder / index)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise CorruptCheckpoint(f"{folder / index}: has no weight_map")
            for file in set(names.values()):
                check_relative_path(file, f"{folder / index}: weight_map")
            return [regular_file(folder / file) for file in sorted(set(names.values()))], names
        if (folder / single).is_file():
            return [folder / single], None
        others = sorted(folder.glob(f"*{suffix}")) if suffix == ".safetensors" else []
        if len(others) == 1:
            return others, None
        if others:
            raise CheckpointNotFound(f"{folder}: {len(others)} safetensors files and no {index}; name one of them")
    raise CheckpointNotFound(f"{folder}: no safetensors and no pytorch_model.bin; check the path")


def _contents(files: list[Path], options: Options) -> tuple[dict[str, tuple[FileTensor, str]], dict[str, str]]:
    """Return (name to tensor and file's name, tied names that the files' metadata gives)."""
    found: dict[str, tuple[FileTensor, str]] = {}
    tied: dict[str, str] = {}
    pickled = [file for file in files if file.suffix != ".safetensors"]
    trees = dict(zip(pickled, read_pickled([Pickled(f) for f in pickled], allow=options.allow), strict=True))
    for file in files:
        if file in trees:
            tree = trees[file]
            if not isinstance(tree, dict):
                raise CorruptCheckpoint(f"{file}: holds a {type(tree).__name__}, not a state dict")
            tensors: dict[str, FileTensor] = {str(k): v for k, v in tree.items() if isinstance(v, FileTensor)}
        else:
            tensors, metadata = read_safetensors(file)
            tied |= metadata
        for name, tensor in tensors.items():
            if name in found:
                raise CorruptCheckpoint(f"{file}: {name!r} is in {found[name][1]} too")
            found[name] = (tensor, file.name)
    return found, tied


def read_safetensors(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Return a safetensors file's tensors and metadata, from its header alone; ``CorruptCheckpoint`` if it lies."""
    size = regular_file(path).stat().st_size
    length = int.from_bytes(read_bytes(os.fspath(path), 0, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise CorruptCheckpoint(f"{path}: a header of {length} bytes in a file of {size}; damaged or hostile")
    header = strict_loads(
        read_bytes(os.fspath(path), 8, length), where=os.fspath(path), max_bytes=MAX_HEADER, error=CorruptCheckpoint
    )
    tensors: dict[str, FileTensor] = {}
    try:
        metadata = header.pop("__metadata__", {})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = from_tag(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            strides = [1] * len(shape)
            for dim in range(len(shape) - 1, 0, -1):
                strides[dim - 1] = strides[dim] * shape[dim]
            tensor = FileTensor(os.fspath(path), 8 + length + start, dtype, shape, tuple(strides))
            numbers = all(type(n) is int and n >= 0 for n in (start, stop, *shape))
            if not numbers or stop - start != tensor.numel * itemsize(dtype) or 8 + length + stop > size:
                raise ValueError(f"{name!r}: bytes [{start}, {stop}) for {dtype} {list(shape)}")
            tensors[name] = tensor
        tied = {str(key): str(value) for key, value in metadata.items() if value in tensors}
    except DistckptError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CorruptCheckpoint(f"{path}: its header makes no sense: {cause}; damaged or hostile") from cause
    return tensors, tied


def _json(path: Path) -> Any:
    return strict_loads(path.read_bytes(), where=os.fspath(path), max_bytes=MAX_JSON, error=CorruptCheckpoint)
