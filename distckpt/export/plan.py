"""What an export was asked for, and what is known about it so far: the values that its parts pass on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from distckpt.export.artefact import Target
from distckpt.export.feeds import Batches
from distckpt.export.networks import Builder
from distckpt.export.outcome import Check, Latency, Port, failed
from distckpt.export.runners import Signature
from distckpt.export.stream import Progress, fingerprint
from distckpt.export.weights import Weights
from distckpt.selection.data import EvaluationData
from distckpt.selection.evaluators import Evaluator
from distckpt.selection.metrics import Custom


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What was asked for, opened and checked. ``limits``: tolerance, agreement, metric tolerance, or None each."""

    target: Target
    stored: Weights
    dtype: str | None
    model: Any
    config: Any
    tokenizer: Path | None
    tokenizer_wanted: bool
    data: EvaluationData | None
    inputs: Any
    evaluator: Evaluator | None
    metrics: Mapping[str, Custom]
    text: str
    max_length: int | None
    batch_size: int
    limits: tuple[float | None, float | None, float | None]
    benchmark: int
    max_shard_size: int
    external_data: bool | None
    stamp: Mapping[str, str]
    reopen: Callable[[Path, str], Weights]
    where: str
    progress: Progress

    @property
    def readable(self) -> str:
        """What kind of checkpoint the written weights are, to whoever opens them."""
        return "torch" if self.target.format == "torch" else "huggingface"

    def written(self, draft: Path) -> Path:
        """Return what a reader opens in a draft: the folder, or the file."""
        return draft if self.target.format == "huggingface" else draft / self.target.main

    @property
    def means_doubles(self) -> bool:
        """Whether float64 was trained in or asked for."""
        return self.dtype == "float64" or any(stream.dtype == "float64" for stream in self.stored.tensors.values())


@dataclass(slots=True, eq=False)
class Proof:
    """Answers and figures so far."""

    weights: Weights
    dtype: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    content: str = ""
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    latency: list[Latency] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    doubles: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    def name_content(self, fingerprints: Mapping[str, str]) -> None:
        """Name the weights by one digest, the same in every format."""
        told = (f"{name} {print_}" for name, print_ in sorted(fingerprints.items()))
        self.content = fingerprint(self.dtype, (), told)

    @property
    def failed(self) -> bool:
        """Whether a check failed already."""
        return bool(failed(self.checks))


@dataclass(slots=True, eq=False)
class Trained:
    """The trained model itself, on real rows where there are some."""

    builder: Builder
    module: nn.Module
    signature: Signature | None = None
    batches: Batches | None = None
    feed: Any = None
    tokenizer: Any = None
