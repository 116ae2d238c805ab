"""Runs to report on: tiny, rich (restarts, evaluations, averages), and broken in every way that is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import builders
import numpy as np
from evaluation_support import binary

from distckpt import clock
from distckpt.analysis.reading import RunReader
from distckpt.format import names, typed_json
from distckpt.format.digest import digest
from distckpt.format.lineage import Committed, create_generation, ensure_root, heartbeat
from distckpt.selection.cache import keys, save
from distckpt.selection.evaluation import CheckpointId, DataId, Evaluation, EvaluatorId, Home
from distckpt.selection.metrics import measure
from distckpt.selection.predictions import Predictions
from distckpt.storage import open_store
from distckpt.storage.base import Store

SETTINGS = {"settings": {"metric_name": "val_loss", "metric_mode": "min", "save_total_limit": 5}}
NASTY = "<script>alert('x')</script>\"&<b>"


def log_metrics(store: Store, generation: int, serial: int, rows: list[tuple[int, float, dict[str, Any]]]) -> None:
    """Store rows of (step, second, metrics) as a job does."""
    content = [{"step": step, "epoch": None, "time": time, "metrics": metrics} for step, time, metrics in rows]
    store.create(names.metrics_file(generation, serial), typed_json.dumps(content))


def weights(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    drift = np.random.default_rng(step)
    shapes = {
        "model.embed.weight": (40, 16),
        "model.layers.0.w": (16, 16),
        "model.layers.1.w": (16, 16),
        "optim.state.w.exp_avg": (40, 16),
    }
    return {
        name: (rng.standard_normal(shape) + 0.001 * step * drift.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def commit(store: Store, step: int, generation: int = 1, provenance: Any = None, **more: Any) -> Committed:
    """Commit a checkpoint with the settings of a manager in its provenance."""
    import msgspec

    from distckpt.format.commit import commit as commit_manifest

    manifest = builders.prepare(store, step, generation, 2, more.pop("tensors", None) or weights(step), **more)
    told = typed_json.encode(SETTINGS if provenance is None else provenance)
    manifest = msgspec.structs.replace(manifest, provenance=told)
    return Committed(step, generation, commit_manifest(store, manifest, check_fencing=False))


def tiny(folder: Path) -> Path:
    """One checkpoint, no metrics."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None, owner="pid 1")
    commit(store, 10)
    return folder


def loss(step: int) -> float:
    return 0.3 + 2.2 * math.exp(-step / 150) + 0.05 * math.sin(step / 9)


def rich(folder: Path, epochs: int = 6) -> Path:
    """Steps 100 to 600, an epoch each; a restart from 300 that lost 20 steps; evaluations on two sets of rows."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None, host="node-1", owner="pid 11")
    now = clock.now()
    serial = {1: 0, 2: 0}
    for epoch in range(1, epochs + 1):
        step, generation = epoch * 100, 1 if epoch <= 3 else 2
        if epoch == 4:
            log_metrics(store, 1, 90, _rows(301, 321, now))
            create_generation(store, resumed_from=(1, 300), host="node-2", owner="pid 22")
        serial[generation] += 1
        log_metrics(store, generation, serial[generation], _rows(step - 99, step + 1, now - (600 - step)))
        told = {
            "val_loss": loss(step) + (0.02 if epoch == 6 else 0.1 if epoch < 5 else 0),
            "accuracy": 0.6 + epoch * 0.05,
        }
        commit(store, step, generation, epoch=epoch, metrics=told)
        for data, shift in (("validation", 0), ("test", 3)):
            hits = 20 + 9 * epoch - 4 * (epoch == 5) - shift
            evaluate(
                store, step, generation, binary(hits, 80 - hits, 45 - 4 * epoch, 275 + 4 * epoch), data, epoch=epoch
            )
    heartbeat(store, 2)
    return folder


def _rows(start: int, stop: int, began: float) -> list[tuple[int, float, dict[str, Any]]]:
    stall = {step: 0.8 * (step % 100 == 1) for step in range(start, stop)}
    return [
        (
            step,
            began + (step - start) * 0.05 + stall[step],
            {"train_loss": loss(step), "lr": 1e-3 * min(1, step / 60), "grad_norm": 1 + math.sin(step)},
        )
        for step in range(start, stop)
    ]


def evaluate(
    store: Store, step: int, generation: int, predictions: Predictions, data: str, epoch: float | None = None
) -> Evaluation:
    """Store an evaluation of a commit as ``evaluate_checkpoints`` does."""
    folder = names.step_folder(step)
    path = f"{folder}/{names.manifest_name(generation)}"
    checkpoint = CheckpointId(
        f"step {step}", f"{store.url}/{path}", digest(store.read(path)), step, generation, epoch, "model."
    )
    found = measure(predictions)
    evaluator = EvaluatorId("test", "1")
    rows = DataId(data, digest(data.encode()), len(predictions))
    one = Evaluation(
        checkpoint, rows, evaluator, found.metrics, found.counts, found.n, found.classes, found.confusion,
        key=keys(checkpoint, rows, evaluator, []), created=clock.utc_text(),
    )  # fmt: skip
    return save(Home(store, folder), one, predictions)


def averaged(folder: Path, source: Path, steps: tuple[int, ...] = (400, 500, 600)) -> Path:
    """A root of its own with an average of some of a run's checkpoints, evaluated on both sets of rows."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None)
    members = [s for s in RunReader(source).read().saves if s.step in steps]
    rows = [
        {
            "kind": "distckpt",
            "name": f"step {s.step}",
            "step": s.step,
            "prefix": "model.",
            "weight": 1 / len(members),
            "manifest": s.digest,
        }
        for s in members
    ]
    commit(store, max(steps), 1, provenance={"averaged_from": rows, "method": "uniform"})
    for data in ("validation", "test"):
        evaluate(store, max(steps), 1, binary(71, 9, 20, 300), data)
    return folder


def broken(folder: Path) -> Path:
    """Damaged shards and manifests, lost records and metrics, orphans, strays, retries, NaN, hostile names."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None, host=NASTY, owner=NASTY)
    values = {100: 1.0, 200: math.nan, 300: math.inf, 400: 0.5}
    for step, value in values.items():
        commit(store, step, 1, metrics={"val_loss": value, NASTY: step, "text": NASTY})
    builders.prepare(store, 450, 1, tensors=weights(450), nonce="abad1dea")
    heartbeat(store, 1)
    _age(folder / "generations/000001.alive")
    create_generation(store, resumed_from=(1, 200), host="b")
    commit(store, 500, 2, save_id="0123.retry2", metrics={"val_loss": 0.4})
    create_generation(store, resumed_from=(2, 500), host="c")
    commit(store, 600, 3)
    commit(store, 700, 3)
    _cut(next((folder / names.step_folder(500)).glob("g*/*.safetensors")))
    manifest = folder / names.step_folder(700) / names.manifest_name(3)
    _overwrite(manifest, manifest.read_bytes()[:-40])
    _overwrite(folder / "generations/000003.json", b"{")
    log_metrics(
        store,
        1,
        1,
        [
            (step, clock.now() - 500 + step, {NASTY: math.nan if step % 7 == 0 else step, "train_loss": step / 100})
            for step in range(1, 401)
        ],
    )
    _overwrite(folder / names.metrics_file(2, 1), b"nonsense", new=True)
    return folder


def _cut(path: Path) -> None:
    _overwrite(path, path.read_bytes()[:-100])


def _overwrite(path: Path, data: bytes, new: bool = False) -> None:
    if not new:
        path.chmod(0o644)
    path.write_bytes(data)


def _age(path: Path) -> None:
    import os

    old = clock.now() - 7200
    os.utime(path, (old, old))
