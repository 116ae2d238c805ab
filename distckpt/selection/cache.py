"""Results on storage: one JSON file for each evaluation, never rewritten, and the predictions beside it.

``<folder>/evaluations/<data>.<evaluator>.<key>.<more>.json``, where ``key`` stands for checkpoint, data and evaluator, and
``more`` for what was computed from the predictions (own metrics, costs); ``<data>.<evaluator>.<key>.safetensors``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from distckpt.errors import AlreadyExists, CheckpointNotFound, CorruptCheckpoint, StoreError
from distckpt.format import names
from distckpt.format.digest import digest
from distckpt.format.plain_json import canonical, strict_loads
from distckpt.selection.evaluation import CheckpointId, DataId, Evaluation, EvaluatorId, Home, StoredPredictions, slug
from distckpt.selection.predictions import Predictions
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")
MAX_RESULT_BYTES: Final = 64 << 20


def keys(checkpoint: CheckpointId, data: DataId, evaluator: EvaluatorId, more: Any) -> str:
    """Return the two keys of a result as they stand in its name, joined by a dot."""
    first = digest(canonical([checkpoint.digest, checkpoint.prefix, data.digest, evaluator.name, evaluator.version]))
    return f"{first[:12]}.{digest(canonical(more))[:8]}"


def read_results(home: Home) -> list[Evaluation]:
    """Return every readable result about a checkpoint, by file name; a damaged one is passed over with a warning."""
    return [evaluation for _, evaluation in _results(home)]


def _results(home: Home) -> Iterator[tuple[str, Evaluation]]:
    listed = sorted(entry.name for entry in home.store.list(f"{home.folder}/{names.EVALUATIONS}"))
    for name in listed:
        if name.endswith(".json"):
            evaluation = _read(home, name)
            if evaluation is not None:
                yield name, evaluation


def _read(home: Home, name: str) -> Evaluation | None:
    where = f"{home.store.url}/{name}"
    try:
        content = strict_loads(home.store.read(name), where=where, max_bytes=MAX_RESULT_BYTES, error=CorruptCheckpoint)
        return Evaluation.from_json(content, where=where, home=home)
    except (CorruptCheckpoint, StoreError) as error:
        log.warning("a result is not used: %s", error)
        return None


def find(home: Home, checkpoint: CheckpointId, key: str) -> tuple[Evaluation | None, StoredPredictions | None]:
    """Return the result of this key, and the predictions of its first part, each if they are there."""
    first = key.partition(".")[0]
    exact, stored = None, None
    for evaluation in read_results(home):
        same = (evaluation.checkpoint.digest, evaluation.checkpoint.prefix) == (checkpoint.digest, checkpoint.prefix)
        if not same or not evaluation.key.startswith(f"{first}."):
            continue
        stored = stored or evaluation.predictions
        if evaluation.key == key:
            exact = replace(evaluation, checkpoint=checkpoint)  # a root may have been moved: its present path
    return exact, stored


def save(home: Home, evaluation: Evaluation, predictions: Predictions | StoredPredictions | None) -> Evaluation:
    """Store a result, its predictions first; returns it as it is now found.

    Of two processes that store the same, the first wins and both go on. Raises ``StoreError``.
    """
    stem = f"{slug(evaluation.data.name)}.{slug(evaluation.evaluator.name)}"
    if isinstance(predictions, Predictions):
        data = predictions.to_bytes()
        stored = StoredPredictions(f"{stem}.{evaluation.key.partition('.')[0]}.safetensors", digest(data), len(data))
        predictions = _create_other(home.store, home, stored, data)
    evaluation = replace(evaluation, predictions=predictions, home=home)
    text = canonical(evaluation.to_json())
    for serial in range(1, 10):
        name = home.name(f"{stem}.{evaluation.key}{'' if serial == 1 else f'-{serial}'}.json")
        try:
            home.store.create(name, text)
            return evaluation
        except AlreadyExists:
            there = _read(home, name)  # None: it is damaged, and never rewritten
            if there is not None and there.key == evaluation.key:
                return replace(there, checkpoint=evaluation.checkpoint)
    raise StoreError(f"{home.store.url}/{home.name(stem)}: nine damaged results of one name; remove them by hand")


def _create_other(store: Store, home: Home, stored: StoredPredictions, data: bytes) -> StoredPredictions:
    """Create the file; under the next free name if the first is taken by other bytes."""
    base = stored.file.removesuffix(".safetensors")
    for serial in range(1, 10):
        file = f"{base}{'' if serial == 1 else f'-{serial}'}.safetensors"
        try:
            store.create(home.name(file), data)
            return replace(stored, file=file)
        except AlreadyExists:
            continue
    raise StoreError(f"{store.url}/{home.name(stored.file)}: nine others of this name; remove damaged ones by hand")


def load_predictions(evaluation: Evaluation) -> Predictions:
    """Return what the evaluation kept about each row, verified.

    Raises ``CheckpointNotFound`` if nothing was kept, ``CorruptCheckpoint`` if it is not what was written, ``StoreError``.
    """
    stored, home = evaluation.predictions, evaluation.home
    if stored is None or home is None:
        raise CheckpointNotFound(
            f"{evaluation.name}, {evaluation.data}: no predictions were kept; evaluate with a place for results"
        )
    where = f"{home.store.url}/{home.name(stored.file)}"
    data = home.store.read(home.name(stored.file))
    if len(data) != stored.nbytes or digest(data) != stored.digest:
        raise CorruptCheckpoint(f"{where}: not the bytes that its result names; remove both and evaluate again")
    return Predictions.from_bytes(data, where=where)
