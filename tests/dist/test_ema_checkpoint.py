"""Averages in checkpoints, in one process: what is stored where, what comes back, and what is never lost in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import same_bits
from manager_support import Net, build, manager, train

from distckpt import EMAModel, open_checkpoint
from distckpt.averaging.schedules import CountRatio
from distckpt.errors import ConfigError, IncompatibleState


def averages(ema: EMAModel) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in ema.state_dict()["shadow"].items()}


def trained(root: Path, steps: int = 3, **options: Any) -> tuple[Net, EMAModel]:
    """Train, save step ``steps`` under ``root``, and return model and average."""
    model, optimizer = build()
    ema = EMAModel(model, **{"decay": 0.9, **options})
    with manager(root, model, optimizer, stateful={"ema": ema}) as m:
        for _ in range(steps):
            train(model, optimizer)
            ema.update()
        m.save(step=steps)
    return model, ema


def test_the_averaged_model_is_read_without_a_job(tmp_path: Path) -> None:
    model, ema = trained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.verify("full").ok
    found = checkpoint.state_dict(prefix="ema.")
    other = Net()
    other.load_state_dict(found)  # strict: every parameter and buffer is there
    with ema.averaged():
        assert [n for n, v in model.state_dict().items() if not same_bits(v, found[n])] == []
    assert checkpoint.objects["ema"]["updates"] == 3
    assert checkpoint.objects["ema"]["averages"][""]["schedule"]["decay"] == 0.9
    # What is only followed is stored once, as the model's.
    assert checkpoint.manifest.aliases["ema.norm.running_mean"] == "model.norm.running_mean"
    assert not any(name.startswith("ema.norm.num") for name in checkpoint.manifest.tensors)


def test_a_resumed_job_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"decay": 0.99, "warmup": CountRatio(), "every": 2}
    model, optimizer = build()
    ema = EMAModel(model, **options)
    with manager(tmp_path, model, optimizer, stateful={"ema": ema}) as m:
        for step in range(1, 7):
            train(model, optimizer)
            ema.update()
            if step == 3:  # in the middle of two
                m.save(step=step)
    again, again_optimizer = build(seed=5)
    resumed = EMAModel(again, **options)
    with manager(tmp_path, again, again_optimizer, stateful={"ema": resumed}) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert report.rederived == report.missing == report.unexpected == []
        for _ in range(3):
            train(again, again_optimizer)
            resumed.update()
    assert resumed.state_dict()["progress"] == ema.state_dict()["progress"]
    wanted = averages(ema)
    assert [n for n, v in averages(resumed).items() if not same_bits(v, wanted[n])] == []


def test_decay_and_schedule_come_from_the_checkpoint_and_the_report_says_so(tmp_path: Path) -> None:
    trained(tmp_path, warmup=CountRatio())
    model, optimizer = build(seed=5)
    ema = EMAModel(model, decay=0.5)
    with manager(tmp_path, model, optimizer, stateful={"ema": ema}) as m:
        report = m.resume()
    assert report is not None
    assert report.rederived == ["ema: average: decay 0.5 was set, goes on with the saved decay 0.9, CountRatio()"]
    assert ema.decay == 0.9
    assert ema.updates == 3


def test_an_average_that_the_checkpoint_lacks_is_not_silent(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        train(model, optimizer)
        m.save(step=1)
    other, other_optimizer = build(seed=5)
    ema = EMAModel(other)
    with manager(tmp_path, other, other_optimizer, stateful={"ema": ema}) as m:
        with pytest.raises(IncompatibleState, match=r"not in the checkpoint: ema, ema\.down"):
            m.resume()
        report = m.resume(strict=False)
    assert report is not None
    assert "ema" in report.missing
    assert report.rederived == ["ema: not in the checkpoint; begins again from the loaded weights"]
    assert same_bits(averages(ema)["up.weight"], model.up.weight.detach())
    assert ema.updates == 0


def test_an_average_that_nobody_asks_for_is_not_silent(tmp_path: Path) -> None:
    trained(tmp_path)
    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        with pytest.raises(IncompatibleState, match="in the checkpoint but not here: ema"):
            m.resume()
        report = m.resume(exclude=("ema", "ema.*"))
    assert report is not None
    assert "ema.up.weight" in report.skipped


def test_left_out_it_begins_again_from_the_loaded_weights(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    other, optimizer = build(seed=5)
    ema = EMAModel(other)
    with manager(tmp_path, other, optimizer, stateful={"ema": ema}) as m:
        report = m.load(3, include=("model.*",))
    assert report.rederived == ["ema: left out of this load; begins again from the loaded weights"]
    assert same_bits(averages(ema)["up.weight"], model.up.weight.detach())


def test_a_part_that_is_left_out_begins_again_and_is_named(tmp_path: Path) -> None:
    model, before = trained(tmp_path)
    other, optimizer = build(seed=5)
    ema = EMAModel(other, decay=0.9)
    with manager(tmp_path, other, optimizer, stateful={"ema": ema}) as m:
        report = m.load(3, exclude=("ema.up.weight",))
    assert "ema: ['up.weight'] begin again from the loaded weights; they were not loaded" in report.rederived
    assert same_bits(averages(ema)["up.weight"], model.up.weight.detach())
    assert same_bits(averages(ema)["down.weight"], averages(before)["down.weight"])
    assert ema.updates == 3


@pytest.mark.parametrize("saved_at", [2, 5])
def test_a_delayed_start_survives_a_resume(tmp_path: Path, saved_at: int) -> None:
    model, ema = trained(tmp_path, steps=saved_at, start=4)
    found = open_checkpoint(tmp_path).state_dict("ema.")
    wanted = model.state_dict() if saved_at < 4 else {**model.state_dict(), **averages(ema)}
    assert [n for n in wanted if not same_bits(found[n], wanted[n])] == []
    # Until it starts, the average is the model, and costs no byte.
    stored = [n for n in open_checkpoint(tmp_path).manifest.tensors if n.startswith("ema.")]
    assert bool(stored) == (saved_at >= 4)
    other, optimizer = build(seed=5)
    resumed = EMAModel(other, decay=0.9, start=4)
    with manager(tmp_path, other, optimizer, stateful={"ema": resumed}) as m:
        m.resume(prove=True)
    assert resumed.state_dict()["progress"] == ema.state_dict()["progress"]
    for _ in range(3):
        train(model)
        with torch.no_grad():
            for one, two in zip(model.parameters(), other.parameters(), strict=True):
                one.add_(0.5)
                two.copy_(one)
        ema.update()
        resumed.update()
    wanted = averages(ema)
    assert [n for n, v in averages(resumed).items() if not same_bits(v, wanted[n])] == []


def test_several_averages_lie_under_their_decays(tmp_path: Path) -> None:
    model, ema = trained(tmp_path, decay=[0.5, 0.999])
    checkpoint = open_checkpoint(tmp_path)
    for name in ("0.5", "0.999"):
        found = checkpoint.state_dict(f"ema.{name}.")
        assert found.keys() == model.state_dict().keys()
        with ema.averaged(name):
            assert [n for n, v in model.state_dict().items() if not same_bits(v, found[n])] == []
    other, optimizer = build(seed=5)
    same = EMAModel(other, decay=[0.5, 0.999])
    with manager(tmp_path, other, optimizer, stateful={"ema": same}) as m:
        m.resume(prove=True)
    found = same.state_dict()["shadow"]
    assert all(same_bits(found["0.5"][n], v) for n, v in ema.state_dict()["shadow"]["0.5"].items())
    with (
        manager(tmp_path, other, optimizer, stateful={"ema": EMAModel(other, decay=[0.5, 0.99])}) as m,
        pytest.raises(IncompatibleState, match=r"ema\.0\.99\."),
    ):
        m.resume()


def test_saving_or_loading_while_averaged_weights_are_in_the_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    model, optimizer = build()
    ema = EMAModel(model, decay=0.9)
    with manager(tmp_path, model, optimizer, stateful={"ema": ema}) as m:
        m.resume()
        with ema.averaged():
            with pytest.raises(IncompatibleState, match="restore"):
                m.load(3)
            with pytest.raises(Exception, match="averaged weights are in the model"):
                m.save(step=4)
        train(model, optimizer)
        assert m.save(step=5) is not None


@pytest.mark.parametrize("mode", ["async", "full", "offloaded", "fp64"])
def test_other_ways_to_save_store_the_same(tmp_path: Path, mode: str) -> None:
    model, optimizer = build()
    ema = EMAModel(model, decay=0.9, device="cpu" if mode == "offloaded" else None,
                   dtype=torch.float64 if mode == "fp64" else torch.float32)  # fmt: skip
    options: dict[str, Any] = {"async": {"async_save": True}, "full": {"mode": "full"}}.get(mode, {})
    with manager(tmp_path, model, optimizer, stateful={"ema": ema}, **options) as m:
        train(model, optimizer)
        ema.update()
        wanted = averages(ema)
        m.save(step=1)
        train(model, optimizer)
        ema.update()
    found = open_checkpoint(tmp_path).state_dict("ema.")
    assert [n for n in wanted if not same_bits(found[n], wanted[n])] == []


def test_what_was_frozen_or_freed_between_save_and_load_is_said(tmp_path: Path) -> None:
    model, ema = trained(tmp_path)
    kept = averages(ema)
    other, optimizer = build(seed=5)
    other.up.requires_grad_(False)
    partly = EMAModel(other, decay=0.9)
    with manager(tmp_path, other, optimizer, stateful={"ema": partly}) as m:
        report = m.resume()
        assert report is not None
        assert [note for note in report.rederived if "up.weight" in note] == [
            "ema: averages of ['up.weight', 'up.bias'] are left out; here they are frozen and follow the model"
        ]
        m.save(step=4)
    found = open_checkpoint(tmp_path).state_dict("ema.")
    assert same_bits(found["up.weight"], model.up.weight.detach())
    assert same_bits(found["down.weight"], kept["down.weight"])
    free, optimizer = build(seed=6)
    whole = EMAModel(free, decay=0.9)
    with manager(tmp_path, free, optimizer, stateful={"ema": whole}) as m:
        m.resume()
    assert same_bits(averages(whole)["up.weight"], model.up.weight.detach())


def test_an_average_of_a_part_of_the_model_is_not_mistaken_for_the_whole(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    ema = EMAModel(model[1])
    model[1][1].running_mean.fill_(7.0)
    with manager(tmp_path, model, stateful={"ema": ema}) as m:
        m.save(step=1)
    found = open_checkpoint(tmp_path).state_dict("ema.")
    assert found.keys() == model[1].state_dict().keys()
    assert found["1.running_mean"].tolist() == [7.0, 7.0]
    other = copy.deepcopy(model[1])
    with manager(tmp_path, torch.nn.Sequential(model[0], other), stateful={"ema": EMAModel(other)}) as m:
        m.resume(prove=True)


def test_it_cannot_be_declared_per_rank(tmp_path: Path) -> None:
    model, optimizer = build()
    with pytest.raises(ConfigError, match="sharded like the model"):
        manager(tmp_path, model, optimizer, stateful={"ema": EMAModel(model)}, per_rank=("ema",))
