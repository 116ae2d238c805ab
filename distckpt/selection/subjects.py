"""What is evaluated: the checkpoints of a root, single ones, and Hugging Face folders, each with a digest of its content."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xxhash

from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.format import names
from distckpt.format.catalog import list_checkpoints
from distckpt.format.checkpoint import open_checkpoint
from distckpt.format.digest import digest
from distckpt.selection.evaluation import CheckpointId, Home, slug
from distckpt.storage import open_store

if TYPE_CHECKING:
    import torch

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_NOT_CONTENT: Final = ("trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin")
_CHUNK: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint about to be evaluated. ``home``: where results about it go, None for nowhere."""

    id: CheckpointId
    home: Home | None

    @property
    def path(self) -> str:
        """Path or URL that opens it."""
        return self.id.path

    @property
    def config(self) -> Any:
        """The model's configuration as the checkpoint has it: what ``save`` was given, or ``config.json``."""
        if self.id.kind == "huggingface":
            import json

            return json.loads((Path(self.path) / "config.json").read_text(encoding="utf-8"))
        return open_checkpoint(self.path).config

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights under the model's own names, on the CPU, each byte verified (distckpt checkpoints)."""
        if self.id.kind == "distckpt":
            return open_checkpoint(self.path).state_dict(self.id.prefix)
        from safetensors.torch import load_file

        files = sorted(Path(self.path).glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{self.path}: no safetensors files; let the model's library load this folder")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


def find_subjects(
    checkpoints: Paths,
    *,
    steps: Sequence[int] | None = None,
    prefix: str = "model.",
    results: str | os.PathLike[str] | None = None,
) -> list[Subject]:
    """Return the checkpoints that paths mean, in order of (step, name) within each path.

    A path is a root (all checkpoints of its lineage), a step's folder, a manifest, a Hugging Face folder or a folder of
    such. ``steps`` picks by step, or by the number at the end of a folder's name. ``results``: a folder or URL for
    results; by default those of distckpt checkpoints go into their step folders, others nowhere.

    Raises ``CheckpointNotFound`` where a path means nothing, or a step is not there.
    """
    paths = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
    found = [subject for path in paths for subject in _at(os.fspath(path), prefix)]
    if steps is not None:
        absent = sorted(set(steps) - {subject.id.step for subject in found})
        if absent:
            there = ", ".join(str(step) for step in sorted({subject.id.step for subject in found})[:20])
            raise CheckpointNotFound(f"{', '.join(map(str, paths))}: no step {absent[0]}; there are {there or 'none'}")
        found = [subject for subject in found if subject.id.step in steps]
    if not found:
        raise CheckpointNotFound(f"{', '.join(map(str, paths)) or 'no path'}: no checkpoint is there; check the path")
    if results is not None:
        store = open_store(results)
        found = [replace(s, home=Home(store, f"{slug(s.id.name)}-{s.id.digest[:8]}")) for s in found]
    return _named_apart(found)


def _named_apart(found: list[Subject]) -> list[Subject]:
    """Give those of the same short name (from several roots) the ends of their paths as names."""
    every = [subject.id.name for subject in found]
    twice = {name for name in every if every.count(name) > 1}
    longer = (
        "/".join(s.path.rstrip("/").split("/")[-3:-1] if "manifest-" in s.path else s.path.split("/")[-2:])
        for s in found
    )
    return [
        replace(subject, id=replace(subject.id, name=name)) if subject.id.name in twice else subject
        for subject, name in zip(found, longer, strict=True)
    ]


def _at(path: str, prefix: str) -> list[Subject]:
    folder = Path(path)
    if "://" not in path and is_huggingface(folder):
        return [_huggingface(folder, 0)]
    infos = [info for info in list_checkpoints(path) if info.problem is None]
    if not infos and "://" not in path and folder.is_dir():
        inside = sorted(
            (sub for sub in folder.iterdir() if is_huggingface(sub)), key=lambda sub: (_number(sub.name), sub.name)
        )
        return [_huggingface(sub, index) for index, sub in enumerate(inside)]
    found = []
    for info in sorted(infos, key=lambda info: (info.step, info.generation)):
        checkpoint = open_checkpoint(info.path)
        store, commit = checkpoint.store, checkpoint.committed
        name = f"step {info.step}" if prefix == "model." else f"step {info.step} ({prefix.rstrip('.') or 'all'})"
        where = (
            name,
            f"{getattr(store, 'root', store.url)}/{commit.manifest_path}",
            digest(store.read(commit.manifest_path)),
        )
        facts = CheckpointId(*where, info.step, info.generation, info.epoch, prefix, info.nbytes)
        found.append(Subject(facts, Home(store, commit.folder)))
    return found


def is_huggingface(path: Path) -> bool:
    """Whether this is a folder with a model's configuration and weights."""
    return (path / "config.json").is_file() and any((*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")))


def _number(name: str) -> int:
    """Return the last number in a folder's name (``epoch_2``, ``checkpoint-500``), -1 for none."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else -1


def _huggingface(folder: Path, index: int) -> Subject:
    path = folder.resolve()
    number = _number(path.name)
    content, nbytes = folder_digest(path)
    step = number if 0 <= number <= names.MAX_NUMBER else index
    return Subject(CheckpointId(path.name, str(path), content, step, nbytes=nbytes, kind="huggingface"), None)


def folder_digest(folder: Path) -> tuple[str, int]:
    """Return a digest of a folder's weights, configuration and tokenizer, and their bytes; training state is left out."""
    state, total = xxhash.xxh3_128(), 0
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json", ".txt", ".model") or file.name in _NOT_CONTENT:
            continue
        size = file.stat().st_size
        state.update(f"{file.name} {size}\0".encode())
        with file.open("rb") as stream:
            for chunk in iter(partial(stream.read, _CHUNK), b""):
                state.update(chunk)
        total += size
    return state.hexdigest(), total
