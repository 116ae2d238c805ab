"""resume_training: the checklist of a resume as one call, for scripts that have no manager."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distckpt.config import CheckpointConfig
from distckpt.errors import CheckpointNotFound
from distckpt.manager.manager import CheckpointManager
from distckpt.manager.report import LoadReport


def resume_training(
    checkpoint_path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    *,
    stateful: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadReport:
    """Load weights, optimizer, scheduler, scaler, RNG and other state of a checkpoint into live objects.

    ``checkpoint_path``: a run's folder or URL (its newest that can be loaded) or one step of it. Call it on all
    ranks. Options are the fields of ``LoadOptions``. Nothing is written, and the job's own saves are up to it.
    Returns the report: ``epoch``, ``step``, ``metrics``, ``extra_state``, and what was loaded, missing, re-derived.
    Raises ``CheckpointNotFound`` where there is none, ``CorruptCheckpoint``, ``IncompatibleState``.
    """
    from distckpt.format.names import parse_manifest_name, parse_step_folder

    text = os.fspath(checkpoint_path).rstrip("/")
    head, _, last = text.rpartition("/")
    step_path = text if parse_step_folder(last) is not None else head if parse_manifest_name(last) is not None else None
    root = step_path.rpartition("/")[0] if step_path is not None else text
    config = CheckpointConfig(root or "/", preemption_signals=(), control_file=None, save_total_limit=None)
    manager = CheckpointManager(config, model, optimizer, scheduler, scaler, stateful=stateful)
    try:
        if step_path is not None:
            return manager.load(text, **options)
        report = manager.loader.newest(manager._key("resume"), manager._options(options))
    finally:
        manager.close()
    if report is None:
        raise CheckpointNotFound(f"{text} holds no committed checkpoint; check the path, or start without resuming")
    return report
