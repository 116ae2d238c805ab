"""What a load takes and leaves: strictness both ways, patterns, what does not fit, proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from manager_support import Part, assert_same, build, manager, snapshot, train
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from distckpt import open_checkpoint
from distckpt.errors import IncompatibleState


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """One checkpoint of model, optimizer, scheduler and a part, at step 4."""
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(model, optimizer)
    with manager(tmp_path, model, optimizer, scheduler=scheduler, stateful={"part": Part({"n": 5, "t": torch.ones(3)})}) as m:
        m.save(step=4)
    return tmp_path


def test_names_on_one_side_only_are_refused_unless_not_strict(saved: Path) -> None:
    class Wider(type(build()[0])):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)
            self.norm = nn.Identity()

    model = Wider()
    before = model.extra.weight.detach().clone()
    with manager(saved, model, strict=False) as m:
        with pytest.raises(IncompatibleState, match=r"not in the checkpoint: model.extra.bias, model.extra.weight") as caught:
            m.load(4, strict=True)
        assert "in the checkpoint but not here: model.norm.bias" in str(caught.value)
        assert "no optimizer was given" in str(caught.value)
        report = m.load(4)
    assert report.missing == ["model.extra.bias", "model.extra.weight"]
    assert {"model.norm.weight", "optim.param_groups", "optim.state.up.weight.exp_avg", "scheduler", "part", "part.t"} <= set(
        report.unexpected
    )
    assert {n for n in report.loaded if n.startswith("model.")} == {
        "model.up.weight", "model.up.bias", "model.down.weight", "model.down.bias"
    }
    assert torch.equal(model.extra.weight, before)
    assert torch.equal(model.up.weight, open_checkpoint(saved).read("model.up.weight"))


def test_patterns_choose_what_is_loaded(saved: Path) -> None:
    model, optimizer = build(seed=3)
    scheduler, part = torch.optim.lr_scheduler.StepLR(optimizer, 2), Part({})
    before = snapshot(model, optimizer)
    with manager(saved, model, optimizer, scheduler=scheduler, stateful={"part": part}) as m:
        report = m.load(4, include=("model.*", "part*"), exclude=("model.up.*", "model.norm.num_*"))
    now, disk = snapshot(model, optimizer), open_checkpoint(saved).state_dict("model.")
    taken = {n for n in now if torch.equal(now[n], disk[n.removeprefix("model.")])}
    kept = {n for n in now if torch.equal(now[n], before[n])}
    assert {"model.up.weight", "model.up.bias", "model.norm.num_batches_tracked"} <= kept
    assert {"model.down.weight", "model.down.bias", "model.norm.running_mean"} <= taken
    assert part.state["n"] == 5
    assert not optimizer.state
    assert {"model.up.weight", "optim.param_groups", "scheduler", "rng"} <= set(report.skipped)
    assert report.missing == report.unexpected == []


def test_optimizer_and_rng_can_be_left_alone(saved: Path) -> None:
    model, optimizer = build(seed=3, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = torch.get_rng_state()
    parts: dict[str, Any] = {"scheduler": scheduler, "stateful": {"part": Part({})}}
    with manager(saved, model, optimizer, **parts) as m:
        report = m.load(4, load_optimizer=False, load_rng_state=False)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert {"optim.param_groups", "scheduler", "rng"} <= set(report.skipped)
    with manager(saved, build()[0]) as m:  # an inference model: weights only
        report = m.load("latest", include=("model.*",))
        assert all(n.startswith("model.") for n in report.loaded)
        assert len(report.loaded) == 9


def test_a_checkpoint_without_an_optimizer_does_not_pass_for_one_with_it(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, save_optimizer=False, save_rng_state=False) as m:
        m.save(step=1)
    assert not [n for n in open_checkpoint(tmp_path).tensors if n.startswith("optim")]
    with manager(tmp_path, model, optimizer) as m:
        with pytest.raises(IncompatibleState, match=r"not in the checkpoint: optim\.param_groups, rng"):
            m.load(1)
        m.load(1, load_optimizer=False, load_rng_state=False)
        assert m.load(1, strict=False).missing == ["optim.param_groups", "rng"]


def fsdp1(rank: int, root: Path) -> None:
    """FSDP1: a save before the first step takes none itself, keeps the settings, and brings the optimizer back there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    with manager(root, model, optimizer) as m:
        m.save(step=0)
        assert not optimizer.state
        train(model, optimizer)
        m.save(step=1)
        optimizer.param_groups[0]["lr"] = 9.0
        report = m.load(0, prove=True)
        assert report.missing == report.unexpected == []
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.125
        m.load(1, prove=True)
        assert optimizer.state


def test_fsdp1_before_and_after_the_first_step(tmp_path: Path) -> None:
    run_ranks(2, fsdp1, tmp_path)


def test_a_part_whose_name_begins_like_scheduler_is_not_the_scheduler(tmp_path: Path) -> None:
    model, optimizer = build()
    part = Part({"n": 1})
    with manager(tmp_path, model, optimizer, stateful={"scheduler_of_data": part}) as m:
        m.save(step=1)
        part.state = {}
        m.load(1, load_optimizer=False)
        assert part.state == {"n": 1}


def test_shapes_and_dtypes_that_differ_are_named(saved: Path) -> None:
    model, optimizer = build()
    model.down = nn.Linear(8, 3)
    model.up = model.up.half()
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(saved, model, optimizer) as m, pytest.raises(IncompatibleState) as caught:
        m.load(4, include=("model.*",))
    assert "model.down.weight has shape [3, 8] here and [1, 8] in the checkpoint" in str(caught.value)
    assert "model.up.bias is float16 here and float32 in the checkpoint" in str(caught.value)


def test_param_groups_may_be_cut_differently_only_where_settings_agree(tmp_path: Path) -> None:
    model, optimizer = build(lr=0.25)
    train(model, optimizer)
    with manager(tmp_path / "one", model, optimizer) as m:
        m.save(step=1)
    split = [{"params": list(model.up.parameters())}, {"params": [*model.norm.parameters(), *model.down.parameters()]}]
    optimizer = torch.optim.AdamW(split, lr=0.5)
    with manager(tmp_path / "one", model, optimizer) as m:
        m.load(1, prove=True)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    optimizer.param_groups[1]["lr"] = 0.125
    with manager(tmp_path / "two", model, optimizer) as m:
        m.save(step=1)
    with (manager(tmp_path / "two", model, torch.optim.AdamW(model.parameters())) as m,
          pytest.raises(IncompatibleState, match=r"up\.weight … .* in one optimizer group here but in several")):
        m.load(1)


def test_a_parameter_frozen_then_and_trained_now(tmp_path: Path) -> None:
    model, _ = build()
    model.up.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer)
    with manager(tmp_path, model, optimizer) as m:
        m.save(step=1)
    wanted = snapshot(model, optimizer)
    other, _ = build(seed=2)
    other.up.requires_grad_(False)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    with manager(tmp_path, other, fresh) as m:
        m.load(1, prove=True)
        assert_same(snapshot(other, fresh), wanted)
    other, fresh = build(seed=2)  # all trained now
    with manager(tmp_path, other, fresh) as m:
        with pytest.raises(IncompatibleState, match=r"no optimizer settings for \['up.weight', 'up.bias'\].*load_optimizer"):
            m.load(1)
        m.load(1, load_optimizer=False)
    assert torch.equal(other.up.weight, model.up.weight)


def test_prove_catches_whatever_changes_a_weight_after_reading(saved: Path) -> None:
    model, optimizer = build()

    class Meddler(Part):
        def load_state_dict(self, state: Any) -> None:
            with torch.no_grad():
                model.down.weight.view(-1)[3] += 1e-6

    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with manager(saved, model, optimizer, scheduler=scheduler, stateful={"part": Meddler({})}) as m:
        m.load(4)  # without a proof nobody notices
        with pytest.raises(IncompatibleState, match=r"live state differs from it in model.down.weight"):
            m.load(4, prove=True)


def test_prove_catches_a_load_state_dict_hook(tmp_path: Path) -> None:
    class Packed(nn.Module):
        """Its state dict is made by a hook, so a load has to go through ``load_state_dict``."""

        def __init__(self, off: float) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))
            self.off = off
            self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}w": self.w * 2}))
            self.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *_: state.update({f"{prefix}w": state[f"{prefix}w"] / 2 + self.off})
                if f"{prefix}w" in state else None
            )

    with manager(tmp_path, Packed(0.0)) as m:
        m.save(step=1)
        m.load(1, prove=True)
    with manager(tmp_path, Packed(1.0)) as m, pytest.raises(IncompatibleState, match=r"model\.w"):
        m.load(1, prove=True)
