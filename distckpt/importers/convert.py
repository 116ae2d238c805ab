"""``distckpt convert``: a checkpoint of one kind as one of another, streamed and verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from distckpt.config import DEFAULT_THREADS
from distckpt.dcp.leaves import tree_refs
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE
from distckpt.engines.param_state import split_state_names
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, IncompatibleState
from distckpt.export.dcp_folder import export_dcp_folder
from distckpt.export.huggingface import MAX_SHARD, export_huggingface
from distckpt.export.stream import Progress, Recorder, Stream, discard, stream_fingerprint
from distckpt.export.torch_file import export_torch_file
from distckpt.format.catalog import parse_location
from distckpt.format.lineage import list_committed
from distckpt.format.typed_json import Ref
from distckpt.importers.commit_source import SHARD_BYTES, commit_source
from distckpt.importers.dcp_folder import is_dcp_folder, open_dcp_folder
from distckpt.importers.deepspeed_native import is_deepspeed, open_deepspeed
from distckpt.importers.deepspeed_universal import is_universal, open_universal
from distckpt.importers.huggingface import is_huggingface, open_huggingface
from distckpt.importers.source import Options, Source, open_distckpt, unused_refs
from distckpt.importers.torch_file import open_torch_file

TARGETS: Final = ("distckpt", "dcp", "torch", "huggingface")


def _is_distckpt(path: Path) -> bool:
    at = parse_location(path)
    return at.step is not None or bool(list_committed(at.store))


_KINDS: Final[Mapping[str, tuple[Callable[[Path], bool], Callable[[str, Options], Source]]]] = {
    "distckpt": (_is_distckpt, open_distckpt),
    "dcp": (is_dcp_folder, open_dcp_folder),
    "universal": (is_universal, open_universal),
    "deepspeed": (is_deepspeed, open_deepspeed),
    "huggingface": (is_huggingface, open_huggingface),
    "torch": (Path.is_file, open_torch_file),
}
SOURCES: Final = ("auto", *_KINDS)


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. ``path`` is what was written; ``notes`` what was assumed or left out."""

    source: str
    target: str
    path: str
    step: int | None
    tensors: int
    aliases: int
    objects: int
    nbytes: int
    notes: tuple[str, ...]
    verified: bool = True


def kind_of(path: str | os.PathLike[str]) -> str:
    """Say what kind of checkpoint a path is; ``CheckpointNotFound`` if nothing is there, ``ConfigError`` if unknown.

    A folder that holds several kinds (native and universal DeepSpeed, safetensors and pickles) is the first of
    ``SOURCES``; a file is only ever opened because it was named.
    """
    text = os.fspath(path)
    if "://" in text:
        return "distckpt"
    if not os.path.exists(text):
        raise CheckpointNotFound(f"{text}: no such file or folder; check the path")
    for kind, (fits, _) in _KINDS.items():
        if (os.path.isdir(text) or kind in ("huggingface", "torch", "distckpt")) and fits(Path(text)):
            return kind
    raise ConfigError(
        f"{text}: of no kind that can be read ({', '.join(_KINDS)}); name the folder with the files in it"
    )


def open_source(path: str | os.PathLike[str], kind: str = "auto", options: Options | None = None) -> Source:
    """Open a checkpoint of any kind. Raises what its importer raises, ``ConfigError`` for an unknown kind."""
    if kind not in SOURCES:
        raise ConfigError(f"--from {kind}: choose one of {', '.join(SOURCES)}")
    options = options or Options()
    source = _KINDS[kind_of(path) if kind == "auto" else kind][1](os.fspath(path), options)
    if not options.optimizer:
        source.without_optimizer()
    absent = unused_refs(source)
    if absent:
        raise CorruptCheckpoint(f"{source.path}: values refer to tensors that are not there: {sorted(absent)[:5]}")
    return source


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = "distckpt",
    kind: str = "auto",
    step: int | None = None,
    prefix: str = MODEL,
    optimizer: bool | None = None,
    max_shard_size: int | None = None,
    allow: tuple[str, ...] = (),
    threads: int = DEFAULT_THREADS,
    progress: Progress = lambda nbytes: None,
) -> Report:
    """Write the checkpoint ``src`` as a new one of kind ``to``, and read back and compare every byte of it.

    ``step``: which step of a source that has several; for others, the step that the result gets. ``prefix``: what model
    names get in distckpt, and what is selected and taken off on the way out. ``optimizer`` is kept by default where the
    target is distckpt or dcp. ``max_shard_size``: bytes of tensors in one file. ``allow``: classes whose attributes may
    be read from pickles. Memory: to distckpt ``threads`` times three chunks of 8 MiB, to dcp the largest tensor, else
    three chunks, whatever the size of the model. ``progress`` is told bytes as they are written and, except to distckpt,
    again as they are read back.

    Raises ``ConfigError`` (target in use, unknown kind), ``ForbiddenPickle``, ``CorruptCheckpoint``, ``IncompatibleState``,
    ``CheckpointNotFound``. A failed export leaves no target; a failed import leaves an
    attempt that was never committed, which ``distckpt gc`` removes.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to}: choose one of {', '.join(TARGETS)}")
    keep = to in ("distckpt", "dcp") if optimizer is None else optimizer
    several = kind in ("distckpt", "deepspeed", "universal") or (kind == "auto" and kind_of(src) in _WITH_STEPS)
    options = Options(step if several else None, prefix, keep, allow)
    source = open_source(src, kind, options)
    if to == "distckpt":
        size = max_shard_size or SHARD_BYTES
        written = commit_source(
            source, dst, step=None if several else step, shard_bytes=size, threads=threads, progress=progress
        )
        return _report(source, to, written.path, written.step, source.tensors)
    seen = Recorder(source.tensors)
    if to == "dcp":
        for name, value in source.objects.items():
            _plain(name, value)
        streams = export_dcp_folder(replace(source.offer(), tensors=seen.streams), dst, progress)
    elif to == "torch":
        tree, streams = _torch_tree(source, seen.streams, prefix, keep)
        export_torch_file(tree, streams, dst, progress)
    else:
        streams = _weights(seen.streams, prefix)
        tied = _weights(source.aliases, prefix)
        aliases = {name: target.removeprefix(prefix) for name, target in tied.items() if target.startswith(prefix)}
        most = max_shard_size or MAX_SHARD
        export_huggingface(streams, dst, aliases=aliases, config=source.config, max_shard_size=most, progress=progress)
    named = {MODEL + n.removeprefix(prefix) if n.startswith(prefix) else n: s for n, s in streams.items()}
    if to != "torch":
        named = {MODEL + n: s for n, s in streams.items()} if to == "huggingface" else dict(streams)
    try:
        _compare({name: seen.fingerprint(stream) for name, stream in named.items()}, dst, to, allow, progress)
    except BaseException:
        # It was made by us a moment ago; nothing that was there before can be in it.
        discard(dst)
        raise
    if source.per_rank:
        source.notes.append("objects that each rank has for itself (RNG states) have no place there and were left out")
    return _report(source, to, os.fspath(dst), source.step, streams)


_WITH_STEPS: Final = ("distckpt", "deepspeed", "universal")


def _weights(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    if not found and named and isinstance(next(iter(named.values())), Stream):
        known = sorted({name.split(".", 1)[0] for name in named})[:10]
        raise IncompatibleState(
            f"no tensor's name starts with {prefix!r}; names start with {known}; choose another --prefix"
        )
    return found


def _torch_tree(
    source: Source, tensors: Mapping[str, Stream], prefix: str, whole: bool
) -> tuple[Any, dict[str, Stream]]:
    """Return what ``torch.load`` is to give, with references, and the streams referred to.

    Weights alone: the model's state dict. With the optimizer: ``{"model", "optim": {"state", "param_groups"}, …}``.
    """
    weights = {n: Ref(prefix + n) for n in _weights(tensors, prefix)}
    weights |= {n: Ref(target) for n, target in _weights(source.aliases, prefix).items() if target in tensors}
    if not whole:
        return weights, {ref.name: tensors[ref.name] for ref in weights.values()}
    objects = {name: value for name, value in source.objects.items() if not name.startswith(MODEL)}
    referenced = {ref for value in objects.values() for ref in tree_refs(value)}
    state: dict[str, dict[str, Any]] = {}
    every = [*tensors, *source.aliases, *objects]
    for fqn, keys in split_state_names(every, weights).items():
        state[fqn] = {k: objects.pop(n) if n in objects else Ref(source.aliases.get(n, n)) for k, n in keys.items()}
    optim = {"state": state, "param_groups": objects.pop(OPTIM_GROUPS, [])}
    rest = {n: Ref(n) for n in tensors if not n.startswith((prefix, OPTIM_STATE)) and n not in referenced}
    for name, value in objects.items():
        _plain(name, value)
    tree = {"model": weights, "optim": optim, **objects, **rest}
    return tree, {name: tensors[name] for name in dict.fromkeys(tree_refs(tree))}


def _plain(name: str, value: Any) -> None:
    """Refuse a value that ``weights_only`` readers could not load."""
    if isinstance(value, dict):
        for key, item in value.items():
            _plain(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            _plain(f"{name}.{index}", item)
    elif not (value is None or isinstance(value, (Ref, bool, int, float, str, bytes))):
        raise IncompatibleState(
            f"{name} is a {type(value).__name__}, which readers of plain checkpoints refuse; leave it out"
        )


def _compare(
    wanted: Mapping[str, str], dst: str | os.PathLike[str], to: str, allow: tuple[str, ...], progress: Progress
) -> None:
    """Open what was written as a stranger would, and compare every tensor; ``CorruptCheckpoint`` names a difference."""
    there = open_source(dst, to, Options(prefix="" if to == "dcp" else MODEL, allow=allow))
    found = {name: stream_fingerprint(stream, progress) for name, stream in there.tensors.items()}
    if found != wanted:
        names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise CorruptCheckpoint(
            f"{os.fspath(dst)}: {names[0]!r} does not read back as written; the storage is at fault"
        )


def _report(source: Source, to: str, path: str, step: int | None, streams: Mapping[str, Stream]) -> Report:
    nbytes = sum(stream.nbytes for stream in streams.values())
    return Report(
        source.kind, to, path, step, len(streams), len(source.aliases), len(source.objects), nbytes, tuple(source.notes)
    )
