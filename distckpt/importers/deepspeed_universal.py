"""DeepSpeed's universal checkpoints: ``zero/<FQN>/fp32.pt``, ``exp_avg.pt``, … beside the model files of the source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distckpt.engines.base import OPTIM_GROUPS, OPTIM_STATE
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, IncompatibleState
from distckpt.export.stream import Stream
from distckpt.importers.deepspeed_native import add_engine_state, add_rest, add_value, tag_folder
from distckpt.importers.files import FileTensor
from distckpt.importers.pickled import Pickled, read_pickled
from distckpt.importers.source import Options, Source

_SETTINGS = "optimizer_state.pt"


def universal_folder(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """Return the folder that holds ``zero/``: the path, or what its ``latest_universal`` (or ``latest``) file names."""
    root = Path(path)
    if (root / "zero").is_dir():
        return root
    latest = "latest_universal" if (root / "latest_universal").is_file() else "latest"
    named = [root / f"global_step{step}_universal"] if step is not None else []
    folder = named[0] if named and named[0].is_dir() else tag_folder(path, step, latest)
    if not (folder / "zero").is_dir():
        raise CheckpointNotFound(f"{folder}: has no folder 'zero'; it is no universal checkpoint")
    return folder


def is_universal(path: Path) -> bool:
    """Whether a folder holds a universal checkpoint, or names one and no native one."""
    try:
        if (path / "latest").is_file():
            return (tag_folder(path, None) / "zero").is_dir()
        universal_folder(path)
    except (CheckpointNotFound, OSError):
        return False
    return True


def open_universal(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a universal checkpoint. Which ones have optimizer state says which parameters were trained.

    A weight that has ``fp32.pt`` alone was not trained: it is taken from the model file, in its own dtype, where it is
    there. Where no ``step`` was kept (stage 3), the engine's is taken. Raises as ``open_deepspeed``.
    """
    folder = universal_folder(path, options.step)
    models = sorted(f for f in folder.glob("*mp_rank_*_model_states.pt") if f.is_file())
    if not models:
        raise CorruptCheckpoint(f"{folder}: has no model states file")
    files = sorted(f for f in (folder / "zero").rglob("*.pt") if f.parent != folder / "zero")
    settings = [f for f in (folder / "zero" / _SETTINGS,) if f.is_file()]
    opened = read_pickled([Pickled(f) for f in (*models, *settings, *files)], profile="deepspeed", allow=options.allow)
    states = opened[: len(models)]
    optimizer: Mapping[str, Any] = opened[len(models)] if settings else {}
    source = Source("universal", os.fspath(path))
    add_engine_state(source, states[0], optimizer)
    shapes = {n: tuple(s) for group in states[0].get("param_shapes") or () for n, s in group.items()}
    values: dict[str, dict[str, Any]] = {}
    for file, content in zip(files, opened[len(models) + len(settings) :], strict=True):
        name = str(file.parent.relative_to(folder / "zero"))
        values.setdefault(name, {})[file.stem] = content["param"] if isinstance(content, dict) else content
    trained = {name: found for name, found in values.items() if name in shapes or len(found) > 1}
    for name, found in trained.items():
        _add(source, name, found, shapes.get(name), options)
    if options.optimizer and settings:
        source.objects[OPTIM_GROUPS] = _groups(source, optimizer, states[0])
    add_rest(source, states, options, folder)
    for name, found in values.items():
        full = options.prefix + name
        if full not in source.tensors and full not in source.aliases and isinstance(found.get("fp32"), FileTensor):
            source.add(full, found["fp32"])
    source.tie_state()
    return source


def _add(source: Source, name: str, found: Mapping[str, Any], shape: tuple[int, ...] | None, options: Options) -> None:
    if not isinstance(found.get("fp32"), FileTensor):
        raise CorruptCheckpoint(f"{source.path}: {name!r} has no fp32.pt")
    for key, value in found.items():
        if key != "fp32" and not options.optimizer:
            continue
        full = options.prefix + name if key == "fp32" else f"{OPTIM_STATE}{name}.{key}"
        if isinstance(value, FileTensor) and value.shape:
            source.add(full, _shaped(source, full, value, shape))
        else:
            add_value(source, full, key, value)
    if options.optimizer and "step" not in found and len(found) > 1 and source.step is not None:
        add_value(source, f"{OPTIM_STATE}{name}.step", "step", source.step)
        note = "the universal form of stage 3 keeps no optimizer step; the engine's global step was taken"
        if note not in source.notes:
            source.notes.append(note)


def _shaped(source: Source, full: str, value: FileTensor, shape: tuple[int, ...] | None) -> Stream:
    """Return a tensor in its parameter's shape: stage 3 stores it flat."""
    stream = value.stream()
    if shape is None or shape == value.shape:
        return stream
    if FileTensor(value.path, 0, value.dtype, shape, (0,) * len(shape)).numel != value.numel:
        raise IncompatibleState(f"{source.path}: {full} has {list(value.shape)} where its parameter has {list(shape)}")
    return Stream(stream.dtype, shape, stream.read)


def _groups(source: Source, optimizer: Mapping[str, Any], state: Mapping[str, Any]) -> list[dict[str, Any]]:
    shapes = [list(group) for group in state.get("param_shapes") or ()]
    groups = []
    for index, group in enumerate(optimizer.get("param_groups") or ()):
        owned = group["params"] if optimizer.get("zero_stage") == 3 else [index]
        if any(number >= len(shapes) for number in owned):
            raise CorruptCheckpoint(f"{source.path}: param groups and param_shapes do not fit")
        groups.append({**group, "params": [name for number in owned for name in shapes[number]]})
    return groups
