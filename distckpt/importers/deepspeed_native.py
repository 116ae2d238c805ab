"""DeepSpeed's own checkpoints, ZeRO stages 1 to 3 of any world size, without DeepSpeed.

Stages 1 and 2: per param group one flat vector of all its parameters in the order of ``param_shapes``, with
``param_alignment_paddings`` between them, cut into equal partitions, one a rank; the padding at its end is left out of
the saved weights but not always of the optimizer state. (``param_slice_mappings`` is not used: with
``round_robin_gradients`` DeepSpeed 0.19 writes it in another order than the data.) Stage 3: per sub-group, each
parameter is cut into ceil(numel / ranks) elements, and a rank's flat vector holds its part of each. Parameters that
no optimizer has, and buffers, are in the model files, in the dtype they trained in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt.engines.base import OPTIM_GROUPS, OPTIM_STATE
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, IncompatibleState
from distckpt.importers.files import FileTensor, Run, joined
from distckpt.importers.pickled import Pickled, read_pickled
from distckpt.importers.source import Options, Source, add_optimizer, constant
from distckpt.importers.torch_file import add_state_dict

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_ENGINE = frozenset(
    ("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "ds_version",
     "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
     "global_samples", "dp_world_size", "mp_world_size", "ds_config", "checkpoint_parallel_dimensions",
     "universal_checkpoint_info", "sparse_tensor_module_names")
)  # fmt: skip
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Shapes = list[dict[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Flat:
    """One flat vector over ranks: per rank the values by key (``fp32``, ``exp_avg``, …), and where each parameter is.

    ``places[name]`` are (rank, first element, last element + 1) in the order of the parameter's own elements.
    """

    values: list[dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, list[tuple[int, int, int]]]


def tag_folder(path: str | os.PathLike[str], step: int | None, latest: str = "latest") -> Path:
    """Return the folder of one save: the path itself, ``global_step<step>`` in it, or what its ``latest`` file names."""
    root = Path(path)
    if step is not None and (root / f"global_step{step}").is_dir():
        return root / f"global_step{step}"
    if any(map(_MODEL.fullmatch, _names(root))):
        return root
    if step is not None:
        raise CheckpointNotFound(f"{root}: no folder global_step{step}; it has {_names(root)[:10]}")
    if not (root / latest).is_file():
        raise CheckpointNotFound(f"{root}: neither model states nor a file {latest!r} that names their folder")
    tag = (root / latest).read_text(encoding="utf-8", errors="replace").strip()
    if tag in ("", ".", "..") or "/" in tag or "\0" in tag or not (root / tag).is_dir():
        raise CheckpointNotFound(f"{root / latest}: names {tag!r:.80}, and no such folder is here")
    return root / tag


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def is_deepspeed(path: Path) -> bool:
    """Whether a folder holds DeepSpeed's files, or a ``latest`` file beside a folder that does."""
    try:
        names = _names(tag_folder(path, None))
    except (CheckpointNotFound, OSError):
        return False
    return any(map(_MODEL.fullmatch, names))


def open_deepspeed(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a native checkpoint: a run's folder (``--step``, else its ``latest``) or one tag's folder.

    Masters become ``model.<FQN>`` in fp32. Without optimizer files the trained weights are taken in their own dtype.
    Raises ``IncompatibleState`` for tensor or pipeline parallelism and experts, ``CorruptCheckpoint`` for missing ranks.
    """
    folder = tag_folder(path, options.step)
    models, optims = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIM)
    _refuse_unsupported(folder)
    opened = read_pickled([Pickled(f) for f in (*models, *optims)], profile="deepspeed", allow=options.allow)
    states, optimizers = opened[: len(models)], [o["optimizer_state_dict"] for o in opened[len(models) :]]
    source = Source("deepspeed", os.fspath(path))
    add_engine_state(source, states[0], optimizers[0] if optimizers else {})
    stage = _stage(optimizers)
    if optimizers:
        _check_world(folder, optimizers)
        shapes: Shapes = [{n: tuple(s) for n, s in group.items()} for group in states[0]["param_shapes"]]
        flats = partitions3(optimizers, shapes) if stage == 3 else partitions12(optimizers, shapes)
        for flat in flats:
            _add_flat(source, flat, folder, options)
        if options.optimizer:
            source.objects[OPTIM_GROUPS] = _groups(optimizers[0], shapes, stage)
    add_rest(source, states, options, folder)
    if options.optimizer and isinstance(states[0].get("optimizer"), dict):
        _add_stage0(source, states[0]["optimizer"])
    source.tie_state()
    return source


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found: dict[int, Path] = {}
    for name in _names(folder):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match[2]):
            raise IncompatibleState(f"{folder / name}: tensor-parallel shards; convert them by ds_to_universal first")
        found[int(match[1] or 0)] = folder / name
    if sorted(found) != list(range(len(found))):
        raise CorruptCheckpoint(f"{folder}: files of ranks {sorted(found)} are there; some ranks' are missing")
    return [found[rank] for rank in sorted(found)]


def _refuse_unsupported(folder: Path) -> None:
    for name in _names(folder):
        if name.startswith(("layer_", "expp_rank_")):
            raise IncompatibleState(
                f"{folder / name}: pipeline stages and experts are not supported; convert by ds_to_universal"
            )


def _stage(optimizers: Sequence[Mapping[str, Any]]) -> int:
    if not optimizers:
        return 0
    stage = optimizers[0].get("zero_stage", 1)  # the bf16 optimizer of stage 1 names none
    if stage not in (1, 2, 3):
        raise IncompatibleState(f"ZeRO stage {stage!r}; only 1, 2 and 3 are known")
    return int(stage)


def _check_world(folder: Path, optimizers: Sequence[Mapping[str, Any]]) -> None:
    count = optimizers[0]["partition_count"]
    counts = set(count) if isinstance(count, list) else {count}
    if counts != {len(optimizers)}:
        raise CorruptCheckpoint(
            f"{folder}: saved by {sorted(counts)} ranks, {len(optimizers)} optimizer files are there"
        )


def partitions12(optimizers: Sequence[Mapping[str, Any]], shapes: Shapes) -> list[Flat]:
    """Return the flat vectors of stages 1 and 2, one a param group."""
    flats = []
    for index, group in enumerate(shapes):
        values = []
        for state in optimizers:
            base = state["base_optimizer_state"]
            if isinstance(base, list):  # elastic: a list by group, already without padding
                own = base[index]
                settings: Mapping[str, Any] = {"step": state.get("base_optimizer_state_step")}
            else:
                settings = base["param_groups"][index]
                own = base["state"].get(settings["params"][0], {})
            values.append({"fp32": state["single_partition_of_fp32_groups"][index], **_with_step(own, settings)})
        own_padding = optimizers[0].get("param_alignment_paddings")
        between = own_padding[index] if own_padding else [0] * len(group)
        size = _partition([v["fp32"].numel for v in values], optimizers, index)
        places: dict[str, list[tuple[int, int, int]]] = {}
        at = 0
        for (name, shape), padding in zip(group.items(), between, strict=True):
            places[name] = _cut(at, at + math.prod(shape), size)
            at += math.prod(shape) + padding
        flats.append(Flat(values, group, places))
    return flats


def _with_step(own: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return optimizer values with a step: DeepSpeed's fused Adam counts in the param group instead."""
    step = settings.get("step")
    return dict(own) if not own or "step" in own or step is None else {**own, "step": step}


def _partition(saved: Sequence[int], optimizers: Sequence[Mapping[str, Any]], index: int) -> int:
    """Return how many elements each rank's partition has, its padding included, from how many each one saved."""
    first = optimizers[0]
    if "group_paddings" not in first:  # the oldest files: the end of the last partitions may be left out
        size = max(saved)
        if any(count != size for count in saved[: -(-sum(saved) // size) - 1]):
            raise CorruptCheckpoint(f"group {index}: partitions of {list(saved)} elements make no whole")
        return size
    # The bf16 optimizer of stage 1 names no stage and saves its padding; the others leave it out.
    lean = "param_alignment_paddings" in first or "zero_stage" in first
    paddings = [state["group_paddings"][index] if lean else 0 for state in optimizers]
    sizes = {count + padding for count, padding in zip(saved, paddings, strict=True)}
    if len(sizes) != 1:
        raise CorruptCheckpoint(f"group {index}: partitions of {sorted(sizes)} elements; they must be equal")
    return sizes.pop()


def _cut(start: int, stop: int, size: int) -> list[tuple[int, int, int]]:
    """Return elements [start, stop) of vectors of ``size``, end to end, as (vector, start, stop)."""
    out = []
    while start < stop:
        rank, begin = divmod(start, size)
        end = min(size, begin + stop - start)
        out.append((rank, begin, end))
        start += end - begin
    return out


def partitions3(optimizers: Sequence[Mapping[str, Any]], shapes: Shapes) -> list[Flat]:
    """Return the flat vectors of stage 3, one a sub-group."""
    world, flats = len(optimizers), []
    for index, group in enumerate(shapes):
        values = []
        for state in optimizers:
            base = state["optimizer_state_dict"]
            settings: Mapping[str, Any] = next((g for g in base["param_groups"] if index in g["params"]), {})
            own = _with_step(base["state"].get(index, {}), settings)
            values.append({"fp32": state["fp32_flat_groups"][index], **own})
        places: dict[str, list[tuple[int, int, int]]] = {}
        at = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            part = -(-numel // world)
            counts = [max(0, min(part, numel - rank * part)) for rank in range(world)]
            places[name] = [(rank, at, at + count) for rank, count in enumerate(counts) if count]
            at += part
        if any(v["fp32"].numel != at for v in values):
            raise CorruptCheckpoint(
                f"sub-group {index}: {[v['fp32'].numel for v in values]} elements, its parameters need {at}"
            )
        flats.append(Flat(values, group, places))
    return flats


def _add_flat(source: Source, flat: Flat, folder: Path, options: Options) -> None:
    for name, shape in flat.shapes.items():
        for key, sample in flat.values[0].items():
            if key != "fp32" and not options.optimizer:
                continue
            full = f"{options.prefix}{name}" if key == "fp32" else f"{OPTIM_STATE}{name}.{key}"
            if not (isinstance(sample, FileTensor) and sample.shape):
                add_value(source, full, key, sample)
                continue
            runs = []
            for rank, start, stop in flat.places[name]:
                vector = flat.values[rank].get(key)
                if not isinstance(vector, FileTensor) or stop > vector.numel:
                    raise CorruptCheckpoint(f"{folder}: {key} of {name!r} is not whole in the file of rank {rank}")
                runs.append(Run(vector, start, stop))
            source.add(full, joined(sample.dtype, shape, runs, f"{folder}: {key} of {name!r}"))


def add_value(source: Source, full: str, key: str, value: Any) -> None:
    """Add an optimizer value that is the same for all ranks; a step becomes a 0-d float32, as torch's optimizers have it."""
    if isinstance(value, FileTensor):
        # Every parameter of the group shares it; each gets its own copy, as live optimizers have.
        source.add(full, value.stream())
    elif key == "step" and isinstance(value, (int, float)):
        source.add(full, constant("float32", _float32(value)))
    else:
        source.add_tree(full, value)


def _float32(value: float) -> bytes:
    import struct

    return struct.pack("<f", value)


def _groups(optimizer: Mapping[str, Any], shapes: Shapes, stage: int) -> list[dict[str, Any]]:
    base = optimizer["optimizer_state_dict"] if stage == 3 else optimizer["base_optimizer_state"]
    if isinstance(base, list):
        return [{"params": list(group)} for group in shapes]  # elastic files keep no settings
    groups = []
    for index, group in enumerate(base["param_groups"]):
        owned = group["params"] if stage == 3 else [index]
        groups.append({**group, "params": [name for number in owned for name in shapes[number]]})
    return groups


def _add_stage0(source: Source, optimizer: Mapping[str, Any]) -> None:
    if "param_groups" in optimizer:
        add_optimizer(source, optimizer)
    else:
        raise IncompatibleState(
            f"{source.path}: optimizer state of DeepSpeed's 16-bit optimizers without ZeRO; convert with --no-optimizer"
        )


def add_rest(source: Source, states: Sequence[Mapping[str, Any]], options: Options, folder: Path) -> None:
    """Add buffers, frozen parameters, and (without masters) weights from the model files; ties come from ``shared_params``."""
    first = states[0]
    module, shared = first["module"], first.get("shared_params") or {}
    for name, other in shared.items():
        pair = (options.prefix + name, options.prefix + other)
        alias, target = pair if pair[1] in source.tensors else pair[::-1]
        if target in source.tensors and alias not in source.tensors:
            source.aliases[alias] = target
    shapes = {n: tuple(s) for n, s in (first.get("frozen_param_shapes") or {}).items()}
    known = {*source.tensors, *source.aliases}
    if len(states) > 1:  # stage 3: the model files hold one part of each frozen parameter a rank
        for name, shape in shapes.items():
            parts = [state["frozen_param_fragments"][name] for state in states]
            runs, left = [], math.prod(shape)
            for part in parts:
                runs.append(Run(part, 0, min(part.numel, left)))
                left -= min(part.numel, left)
            source.add(options.prefix + name, joined(parts[0].dtype, shape, runs, f"{folder}: {name!r}"))
        buffers = set(first.get("buffer_names") or ())
        absent = [n for n in module if n not in buffers and n not in shapes and options.prefix + n not in known]
        if absent:
            raise CorruptCheckpoint(
                f"{folder}: weights {absent[:3]} are nowhere whole; the optimizer files are missing"
            )
        module = {name: value for name, value in module.items() if name in buffers}
    rest = {name: value for name, value in module.items() if options.prefix + name not in known}
    if rest:
        add_state_dict(source, rest, options.prefix)


def add_engine_state(source: Source, state: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Add the engine's counters as ``engine.deepspeed``, the LR scheduler, and the client's state as ``extra_state``."""
    steps = int(state.get("global_steps", 0))
    config = state.get("ds_config") if isinstance(state.get("ds_config"), dict) else {}
    window = _accumulation(config or {}, int(state.get("dp_world_size") or 1))
    counters: dict[str, Any] = {
        "global_steps": steps, "global_samples": int(state.get("global_samples", 0)),
        "skipped_steps": int(state.get("skipped_steps", 0)), "micro_steps": steps * window,
        "gradient_accumulation_steps": window, "overflow": bool(optimizer.get("overflow", False)),
    }  # fmt: skip
    scaler = optimizer.get("loss_scaler")
    if isinstance(scaler, dict) and "cur_scale" in scaler:
        dynamic = bool(optimizer.get("dynamic_loss_scale", scaler.get("dynamic", False)))
        counters["loss_scale"] = {**{n: scaler[n] for n in _SCALER if n in scaler}, "dynamic": dynamic}
    source.objects["engine.deepspeed"] = counters
    source.step = steps
    if state.get("lr_scheduler") is not None:
        source.add_tree("scheduler", state["lr_scheduler"])
    client = {str(name): value for name, value in state.items() if name not in _ENGINE}
    if client:
        source.add_tree("extra_state", client)
        epoch = client.get("epoch")
        source.epoch = epoch if type(epoch) in (int, float) else None


def _accumulation(config: Mapping[str, Any], ranks: int) -> int:
    """Return how many micro batches make a step, from a DeepSpeed config."""
    given = config.get("gradient_accumulation_steps")
    if isinstance(given, int) and given > 0:
        return given
    whole, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    if isinstance(whole, int) and isinstance(micro, int) and micro > 0:
        return max(1, whole // (micro * ranks))
    return 1
