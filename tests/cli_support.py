"""A root for tests of the command line, and ways to run commands in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import builders
import pytest

from distckpt.cli.main import main
from distckpt.format import names
from distckpt.format.lineage import create_generation, ensure_root
from distckpt.storage import open_store
from distckpt.storage.base import Store

LONG = "validation/accuracy_top5_of_held_out_documents"
SMALL = {"model.w": builders.some_tensors()["model.embed.weight"], "optim.step": builders.some_tensors()["optim.step"]}


def build(folder: Path) -> Store:
    """Steps 100..400 of generation 1 (400 a stray), 500 and 600 of generation 2 that resumed from 300; an orphan."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None, owner="first")
    for step in (100, 200, 300, 400):
        save(store, step, 1)
    builders.prepare(store, 450, 1, tensors=SMALL, nonce="abad1dea")
    create_generation(store, resumed_from=(1, 300), owner="second")
    for step in (500, 600):
        save(store, step, 2)
    return store


def save(store: Store, step: int, generation: int) -> None:
    metrics = {"loss": abs(step - 200) / 100, LONG: step / 1000}
    more: dict[str, Any] = {"objects": {"scheduler": {"last_epoch": 3}}, "rank_objects": {"rng": {"state": (1, 2)}}}
    aliases = {"model.tied": "model.w"}
    builders.build_checkpoint(
        store,
        step,
        generation,
        tensors=SMALL,
        metrics=metrics,
        epoch=step // 200,
        aliases=aliases,
        config={"width": 8},
        **more,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error) of one command."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def shard_of(root: Path, step: int, generation: int, rank: int) -> Path:
    committed = builders.Committed(step, generation, f"{names.step_folder(step)}/{names.manifest_name(generation)}")
    return root / builders.shard_paths(open_store(root), committed)[rank]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """Flip a bit of the last byte: of a tensor's data."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def marks(document: Any) -> dict[int, list[str]]:
    return {row["step"]: row["marks"] for row in document["checkpoints"]}
