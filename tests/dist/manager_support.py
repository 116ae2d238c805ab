"""A small model with every kind of state, and short ways to train it, save it and compare it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layout_models import same_bits
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager

MANAGER_ARGUMENTS = {"scheduler", "scaler", "stateful", "store"}


class Net(nn.Module):
    """Dropout and a batch norm between two linears: parameters, buffers, randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.down = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(self.norm(self.up(x))))


def build(seed: int = 0, lr: float = 0.01) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 1) -> list[str]:
    """Take steps that draw from torch, NumPy and Python; returns the losses as exact hex."""
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 4) + float(np.random.rand()) + random.random()
        loss = model(x).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def manager(root: Path | str, model: nn.Module, optimizer: Any = None, **options: Any) -> CheckpointManager:
    """Make a manager that watches no signals and raises at the first failed save, unless told otherwise."""
    given = {name: options.pop(name) for name in list(options) if name in MANAGER_ARGUMENTS}
    defaults: dict[str, Any] = {"preemption_signals": (), "control_file": None, "verbose": False, "threads": 2,
                                "max_consecutive_failures": 0, "timeout_s": 20.0}
    config = CheckpointConfig(root, **{**defaults, **options})
    return CheckpointManager(config, model, optimizer, **given)


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copy every tensor of a model and its optimizers, under names of their place."""
    out = {f"model.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    names = {p: n for n, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            out |= {f"optim.state.{names[parameter]}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return out


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not same_bits(found[name], wanted[name])]
    assert not different


def steps_in(root: Path) -> list[int]:
    """Return the committed steps, from the names on disk alone."""
    return sorted(int(p.parent.name.removeprefix("step-")) for p in root.glob("step-*/manifest-*.json"))


def mutate(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Change every tensor in place: parameters, buffers, optimizer state."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    value.add_(1)


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Part:
    """A ``Stateful`` that holds whatever it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state
