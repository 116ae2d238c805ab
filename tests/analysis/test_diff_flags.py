"""What should have changed and did not, or the reverse: from a real training, and case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diff_support import flags_of, saved, written
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, EMAModel, diff_checkpoints
from distckpt.errors import ConfigError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("positions", torch.arange(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 of a training in which layers.1.0 is frozen; then 3, in which its weight moves and its neighbour's

    does not, nothing else happens to the statistics of layer 2, and the average is not updated.
    """
    folder = tmp_path_factory.mktemp("run") / "root"
    torch.manual_seed(0)
    model = Model()
    model.layers[1][0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    average = EMAModel(model, decay=0.5)
    with CheckpointManager(CheckpointConfig(folder), model=model, optimizer=optimizer, stateful={"ema": average}) as m:
        for step in (1, 2, 3):
            if step == 3:
                model.layers[2][1].eval()
                model.layers[2][0].weight.requires_grad_(False)
                with torch.no_grad():
                    model.layers[1][0].weight[0, 0] += 1
                    model.positions[2] = 5
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 3:
                average.update()
            m.save(epoch=0, step=step)
    return folder


def test_a_healthy_training_has_no_flags(run: Path) -> None:
    found = diff_checkpoints(run, run, step_a=1, step_b=2)
    assert not found.equal
    assert found.flags == ()
    still = [t.name for t in found.tensors if not t.differs and t.name.startswith("model.")]
    assert sorted(still) == ["model.layers.1.0.bias", "model.layers.1.0.weight", "model.positions"]


def test_what_is_wrong_is_flagged(run: Path) -> None:
    flags = flags_of(diff_checkpoints(run, run, step_a=2, step_b=3))
    assert flags.pop("unchanged") == ("model.layers.2.0.weight",)
    assert flags.pop("untrained-changed") == ("model.layers.1.0.weight",)
    assert flags.pop("integers-changed") == ("model.positions",)
    assert {name.rpartition(".")[2] for name in flags.pop("statistics-unchanged")} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    lagging = flags.pop("average-unchanged")
    assert {"ema.embed.weight", "ema.head.bias"} <= set(lagging)
    assert "ema.layers.2.0.weight" not in lagging
    assert flags == {}


def test_frozen_by_name(run: Path) -> None:
    frozen = diff_checkpoints(run, run, step_a=1, step_b=2, frozen=["layers.1.0.*"])
    assert frozen.flags == ()
    found = diff_checkpoints(run, run, step_a=2, step_b=3, frozen=["layers.1.0.*", "layers.2.0.weight"])
    assert flags_of(found)["frozen-changed"] == ("model.layers.1.0.weight",)
    assert "untrained-changed" not in flags_of(found)
    assert "unchanged" not in flags_of(found)
    with pytest.raises(ConfigError, match=r"'layer\.1\.\*' is the name of no tensor"):
        diff_checkpoints(run, run, step_a=1, step_b=2, frozen=["layer.1.*"])


def test_without_steps_and_optimizers_weights_are_judged_by_each_other(tmp_path: Path) -> None:
    x = {f"model.{i}.w": np.full(4, i, np.float32) for i in range(4)}
    y = {name: value + (name != "model.2.w") for name, value in x.items()}
    a, b = (written(tmp_path / name, "huggingface", t) for name, t in (("a", x), ("b", y)))
    assert flags_of(diff_checkpoints(a, b)) == {"unchanged": ("model.2.w",)}
    assert flags_of(diff_checkpoints(a, a)) == {}


def state(value: float, moment: float, step: float) -> dict[str, Any]:
    return {
        "model.w": np.full(5, value, np.float32),
        "model.v": np.full(3, value, np.float32),
        "optim.state.w.exp_avg": np.full(5, moment, np.float32),
        "optim.state.w.step": np.array(step, np.float32),
        "optim.state.v.exp_avg": np.full(3, value, np.float32),
        "optim.state.v.step": np.array(value, np.float32),
    }


@pytest.mark.parametrize(
    ("b", "step", "flags"),
    [
        (state(2, 2, 2), 2, {}),
        (state(1, 1, 1), 2, {"no-weight-changed": ("model.v", "model.w")}),
        (state(2, 1, 2), 2, {"optimizer-unchanged": ("optim.state.w.exp_avg",)}),
        (state(2, 2, 0), 2, {"counter-back": ("optim.state.w.step",)}),
        (state(2, 2, 2), 1, {"same-step": ("model.v", "model.w")}),
        (state(1, 1, 1), 1, {}),
        (state(2, np.inf, 2), 2, {"not-finite": ("optim.state.w.exp_avg",)}),
    ],
)
def test_case_by_case(tmp_path: Path, b: dict[str, Any], step: int, flags: dict[str, tuple[str, ...]]) -> None:
    found = diff_checkpoints(saved(tmp_path / "a", state(1, 1, 1)), saved(tmp_path / "b", b, step=step))
    assert flags_of(found) == flags
    assert found.equal is (step == 1 and not flags)
