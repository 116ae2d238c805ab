"""A list of pipeline stages as the model: what lies at a stage's own root is in checkpoints like all else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manager_support import manager
from torch import nn

from distckpt import EMAModel, open_checkpoint
from distckpt.engines.choose import engine_for
from distckpt.errors import ConfigError


class Stage(nn.Module):
    """A part of a model: its layer, and at its root a parameter, a buffer, and a table that can be computed again."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(2, 2)})
        self.register_parameter(f"scale{number}", nn.Parameter(torch.full((2,), float(number))))
        self.register_buffer(f"bias{number}", torch.full((2,), 10.0 + number))
        self.register_buffer("table", torch.arange(2.0), persistent=False)
        self.register_parameter("embedding", nn.Parameter(torch.ones(3)) if number == 1 else None)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_stage_has_at_its_root_is_saved_and_loaded(count: int, tmp_path: Path) -> None:
    stages = [Stage(number) for number in range(count)]
    with manager(tmp_path, stages, stateful={"ema": EMAModel(stages)}) as m:
        for number, stage in enumerate(stages):
            setattr(stage, f"bias{number}", torch.full((2,), 20.0 + number))  # another tensor in its place
        m.save(step=1)
    wanted = {name: value.clone() for stage in stages for name, value in stage.state_dict().items()}
    stored = open_checkpoint(tmp_path).state_dict("model.")
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], value) for name, value in wanted.items())
    others = [Stage(number) for number in range(count)]
    with torch.no_grad():
        for tensor in (t for stage in others for t in stage.state_dict().values()):
            tensor.fill_(-1.0)
    with manager(tmp_path, others, stateful={"ema": EMAModel(others)}) as m:
        m.load("latest")
    loaded = {name: value for stage in others for name, value in stage.state_dict().items()}
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def test_a_stage_that_has_a_name_of_another_is_refused() -> None:
    first, second = Stage(0), Stage(1)
    second.register_parameter("shared", nn.Parameter(torch.ones(1)))
    first.register_parameter("shared", second.shared)  # one tensor is no trouble
    names = engine_for([first, second], None).state(optimizer=False).tensors
    assert "model.shared" in names
    assert "model.table" not in names
    second.register_buffer("bias0", torch.ones(2))
    with pytest.raises(ConfigError, match="'bias0' of their own"):
        engine_for([first, second], None)


def test_what_is_done_to_the_stages_together_is_done_to_each() -> None:
    stages = [Stage(0), Stage(1)]
    with EMAModel(stages).averaged() as module:
        module.to(torch.float64)
    for number, stage in enumerate(stages):
        assert stage.state_dict().keys() == Stage(number).state_dict().keys()
        assert all(value.dtype == torch.float64 for value in stage.state_dict().values())
        assert torch.equal(stage.get_buffer(f"bias{number}"), torch.full((2,), 10.0 + number, dtype=torch.float64))
