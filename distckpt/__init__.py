"""distckpt: checkpoints for sharded PyTorch training. The public names are resolved when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CheckpointConfig": "distckpt.config",
    "CheckpointManager": "distckpt.manager.manager",
    "Checkpoint": "distckpt.format.checkpoint",
    "open_checkpoint": "distckpt.format.checkpoint",
    "list_checkpoints": "distckpt.format.checkpoint",
    "EMAModel": "distckpt.averaging.ema",
    "resume_training": "distckpt.manager.resume",
    "ResumableSampler": "distckpt.engines.sampler",
    "average_checkpoints": "distckpt.averaging.average",
    "average_across_ranks": "distckpt.averaging.across",
    "compare_candidates": "distckpt.averaging.contenders",
    "evaluate_checkpoints": "distckpt.selection.evaluate",
    "export_inference_checkpoint": "distckpt.export.inference",
    "select_top_k_by_metric": "distckpt.selection.select",
    "write_report": "distckpt.analysis.report",
    "diff_checkpoints": "distckpt.analysis.diff",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from distckpt.analysis.diff import diff_checkpoints as diff_checkpoints
    from distckpt.analysis.report import write_report as write_report
    from distckpt.averaging.across import average_across_ranks as average_across_ranks
    from distckpt.averaging.average import average_checkpoints as average_checkpoints
    from distckpt.averaging.contenders import compare_candidates as compare_candidates
    from distckpt.averaging.ema import EMAModel as EMAModel
    from distckpt.config import CheckpointConfig as CheckpointConfig
    from distckpt.engines.sampler import ResumableSampler as ResumableSampler
    from distckpt.export.inference import export_inference_checkpoint as export_inference_checkpoint
    from distckpt.format.checkpoint import Checkpoint as Checkpoint
    from distckpt.format.checkpoint import list_checkpoints as list_checkpoints
    from distckpt.format.checkpoint import open_checkpoint as open_checkpoint
    from distckpt.manager.manager import CheckpointManager as CheckpointManager
    from distckpt.manager.resume import resume_training as resume_training
    from distckpt.selection.evaluate import evaluate_checkpoints as evaluate_checkpoints
    from distckpt.selection.select import select_top_k_by_metric as select_top_k_by_metric


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
