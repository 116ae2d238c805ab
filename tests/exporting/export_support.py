"""Small models to export, each with one trap in it, and ways to save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, export_inference_checkpoint
from distckpt.errors import ExportRefused
from distckpt.export.outcome import Check, ExportReport
from distckpt.selection.predictions import Predictions


class Small(nn.Module):
    """Dropout, a batch norm (buffers, one of them whole numbers), and a tied pair: 4 numbers to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.mix, self.again, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.again.weight = self.mix.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.again(torch.tanh(self.mix(self.drop(self.norm(self.up(x)))))))


class AlwaysDropped(Small):
    """Dropout by function, without a word about the mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)


class OneBatch(Small):
    """Multiplies by the batch size of the first call: a trace keeps it as a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (int(x.shape[0]) + 0.0)


class ThreeRowsOnly(Small):
    """Another path for exactly the batch that graphs are recorded with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.shape[0] == 3 else super().forward(x) + 1


class Doubled(Small):
    """A stray NumPy number makes the output float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.tensor(np.array([1.5]))


class RandomTable(Small):
    """A table that no checkpoint has, and that every build fills anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table


class FixedTable(Small):
    """A table that no checkpoint has, and that every build fills alike."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table


class Idle(Small):
    """A layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Untied(Small):
    """The same names, but two weights where the model has one."""

    def __init__(self) -> None:
        super().__init__()
        self.again.weight = nn.Parameter(torch.randn(8, 8))


class Cancelling(nn.Module):
    """Large numbers that nearly cancel: in bfloat16 nothing is left of what tells the classes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(100 + torch.randn(4, 3) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight - 100 * x.sum(-1, keepdim=True)) * 0.01


def rows(count: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(4).astype(np.float32), "y": int(rng.integers(3))} for _ in range(count)]


def accuracy(model: Any, rows: Any) -> Predictions:
    """An evaluator function."""
    x = torch.as_tensor(np.stack([row["x"] for row in rows]))
    return Predictions(ids=rows.ids, labels=[row["y"] for row in rows], logits=model(x))


def trained(make: Callable[[], nn.Module] = Small, seed: int = 0) -> nn.Module:
    """A model whose every tensor moved away from where it began."""
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def saved(folder: Path, model: nn.Module, *, step: int = 3, **options: Any) -> Path:
    """Save a model with an optimizer's state under a root."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    given = {"stateful": options.pop("stateful")} if "stateful" in options else {}
    config = CheckpointConfig(folder, preemption_signals=(), control_file=None, verbose=False, threads=2)
    with CheckpointManager(config, model, optimizer, **given) as manager:
        manager.save(step=step, epoch=1, metrics={"loss": 0.5}, **options)
    return folder


def exported(root: Path, target: Path, to: str = "safetensors", model: Any = Small, **options: Any) -> ExportReport:
    """Export with real rows, the metric, and no timing."""
    given: dict[str, Any] = {"data": rows(), "data_name": "test", "evaluator": accuracy, "benchmark": 0, **options}
    return export_inference_checkpoint(root, target, to=to, model=model, **given)


def refused(root: Path, target: Path, to: str = "safetensors", model: Any = Small, **options: Any) -> dict[str, Check]:
    """Export, see that it is refused and that nothing is left, and return the checks that failed by name."""
    before = {path.name for path in target.parent.iterdir()}
    with pytest.raises(ExportRefused) as caught:
        exported(root, target, to, model, **options)
    assert {path.name for path in target.parent.iterdir()} == before
    wrong = {check.name: check for check in caught.value.checks if check.status == "fail"}
    assert wrong
    assert all(name in str(caught.value) for name in list(wrong)[:3])
    return wrong


def by_name(report: ExportReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}
