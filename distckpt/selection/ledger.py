"""What is known about each checkpoint of a run: its own metrics, the run's history, and evaluations of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distckpt.config import CheckpointConfig
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.format import names
from distckpt.format.catalog import CheckpointInfo, list_checkpoints, parse_location
from distckpt.manager.root import RunRoot
from distckpt.selection.cache import read_results
from distckpt.selection.evaluation import Evaluation, Home
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint and its metrics from one source: an ``evaluation``, or the run itself."""

    name: str
    path: str
    step: int
    generation: int = 0
    epoch: float | None = None
    nbytes: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    evaluation: Evaluation | None = None


def candidate_of(evaluation: Evaluation) -> Candidate:
    """Return an evaluated checkpoint as a candidate."""
    c = evaluation.checkpoint
    return Candidate(
        c.name, c.path, c.step, c.generation, c.epoch, c.nbytes, evaluation.metrics, evaluation.counts, evaluation.n, evaluation
    )  # fmt: skip


def run_candidates(path: str | os.PathLike[str]) -> list[Candidate]:
    """Return the checkpoints at a path with the run's own metrics, earliest first.

    Those given to ``save`` count first, then what the history (``manager.step``) has for the same step.
    Raises ``CheckpointNotFound`` where there are none.
    """
    infos = list_checkpoints(path)
    if not infos:
        raise CheckpointNotFound(f"{os.fspath(path)}: no checkpoint is there; check the path")
    store = parse_location(path).store
    history: dict[int, dict[str, Any]] = {}
    for row in RunRoot(store, CheckpointConfig(str(getattr(store, "root", store.url)))).read_metrics():
        history.setdefault(row["step"], {}).update(row["metrics"])
    ordered = sorted(infos, key=lambda info: (info.step, info.generation))
    return [_from_run(info, history.get(info.step, {})) for info in ordered]


def _from_run(info: CheckpointInfo, history: Mapping[str, Any]) -> Candidate:
    metrics = {**history, **info.metrics}
    return Candidate(f"step {info.step}", info.path, info.step, info.generation, info.epoch, info.nbytes, metrics)


def evaluations(path: str | os.PathLike[str], data: str | None = None) -> list[Evaluation]:
    """Return the results below a root, a step's folder or a results folder, by step; of equal ones the newest.

    ``data``: only on data of this name, or ``name@digest`` (its first digits) where one name stands for several. The path
    of a checkpoint that was removed since is empty.
    """
    at = parse_location(path)
    found: dict[tuple[Any, ...], Evaluation] = {}
    for home in _homes(at.store, at.step):
        paths = _paths(at.store, home)
        for one in read_results(home):
            one = _moved(one, paths)
            if data is not None and not _is(one, data):
                continue
            c = one.checkpoint
            key = (c.digest, c.prefix, one.data.digest, one.evaluator.name, one.evaluator.version, one.costs)
            if key not in found or (one.created, len(one.metrics)) > (found[key].created, len(found[key].metrics)):
                found[key] = one
    return sorted(found.values(), key=lambda one: (one.step, one.generation, one.name, one.data.name))


def evaluated_candidates(path: str | os.PathLike[str], data: str, *, evaluator: str | None = None) -> list[Candidate]:
    """Return the checkpoints that were evaluated on data of this name.

    Raises ``CheckpointNotFound`` where there is none; ``ConfigError`` where several evaluators, or several states of
    the data under one name, leave open which is meant.
    """
    every = evaluations(path)
    found = [one for one in every if _is(one, data) and evaluator in (None, one.evaluator.name)]
    gone = sorted({one.name for one in found if not one.checkpoint.path})
    if gone:
        log.warning("%s: %s evaluated, but removed since: not chosen from", os.fspath(path), ", ".join(gone))
        found = [one for one in found if one.checkpoint.path]
    if not found:
        known = sorted({str(one.data) for one in every})
        raise CheckpointNotFound(
            f"{os.fspath(path)}: no evaluation on data {data!r}; there are {', '.join(known) or 'none'}"
        )
    states = sorted({str(one.data) for one in found})
    if len(states) > 1:
        raise ConfigError(
            f"data {data!r} means {' and '.join(states)}: results on different rows are not comparable; evaluate again, or "
            "name one as name@digest"
        )
    by = sorted({one.evaluator.name for one in found})
    if len(by) > 1:
        raise ConfigError(f"data {data!r} was evaluated by {' and '.join(by)}; say which (evaluator=, --evaluator)")
    newest: dict[tuple[str, str], Evaluation] = {}
    for one in sorted(found, key=lambda one: one.created):
        newest[one.checkpoint.digest, one.checkpoint.prefix] = one
    return sorted(map(candidate_of, newest.values()), key=lambda c: (c.step, c.generation, c.name))


def candidates_of(
    source: str | os.PathLike[str] | Sequence[Any], data: str | None = None, *, evaluator: str | None = None
) -> list[Candidate]:
    """Return candidates from a root or results folder, or from paths, evaluations and candidates.

    With ``data``, metrics are those of the evaluations on it; without, those of the run itself.
    """
    if isinstance(source, (str, os.PathLike)):
        return evaluated_candidates(source, data, evaluator=evaluator) if data else run_candidates(source)
    found: list[Candidate] = []
    for one in source:
        if isinstance(one, Candidate):
            found.append(one)
        elif isinstance(one, Evaluation):
            found.append(candidate_of(one))
        elif isinstance(one, CheckpointInfo):
            found += candidates_of(one.path, data, evaluator=evaluator)
        else:
            found += candidates_of(os.fspath(one), data, evaluator=evaluator)
    every = [candidate.name for candidate in found]
    return [replace(c, name=f"{c.name} ({c.path})") if every.count(c.name) > 1 else c for c in found]


def _is(evaluation: Evaluation, data: str) -> bool:
    name, _, digest = data.partition("@")
    return evaluation.data.name == name and evaluation.data.digest.startswith(digest)


def _homes(store: Store, step: int | None) -> list[Home]:
    folders = [names.step_folder(step)] if step is not None else list(store.list_folders(""))
    return [Home(store, folder) for folder in folders if names.EVALUATIONS in store.list_folders(folder)]


def _paths(store: Store, home: Home) -> dict[int, str] | None:
    """Return, for results in a step's folder, generation to the present path of the commit; None in other folders."""
    if names.parse_step_folder(home.folder) is None:
        return None
    root = str(getattr(store, "root", store.url))
    found = (
        names.parse_manifest_name(e.name.rpartition("/")[2]) for e in store.list(home.folder) if e.name.count("/") == 1
    )
    return {g: f"{root}/{home.folder}/{names.manifest_name(g)}" for g in found if g is not None}


def _moved(evaluation: Evaluation, paths: Mapping[int, str] | None) -> Evaluation:
    """Return the evaluation with the checkpoint's path as it is now: a root may have been moved. Empty: it is gone."""
    if paths is None or evaluation.checkpoint.kind != "distckpt":
        return evaluation
    path = paths.get(evaluation.checkpoint.generation, "")
    return replace(evaluation, checkpoint=replace(evaluation.checkpoint, path=path))
