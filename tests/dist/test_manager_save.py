"""What a save stores, and what a load gives back: every component, in one process."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manager_support import Part, assert_same, build, manager, snapshot, steps_in, train
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint, resume_training
from distckpt.dcp import reader
from distckpt.engines.module_walk import named_modules, named_parameters
from distckpt.errors import CheckpointNotFound, ConfigError, IncompatibleState, UnserializableState


def test_save_and_resume_give_back_every_tensor(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        assert m.resume() is None
        train(model, optimizer, steps=3)
        path = m.save(epoch=2, step=3, metrics={"loss": 0.5}, model_config={"width": 8, "act": ("gelu", None)})
        wanted = snapshot(model, optimizer)
        assert path == str(tmp_path / "step-0000000003")
        assert m.get_latest_checkpoint() == m.get_best_checkpoint() == path
    other, fresh = build(seed=1, lr=0.5)
    with manager(tmp_path, other, fresh) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert (report.step, report.epoch, report.metrics, report.generation) == (3, 2, {"loss": 0.5}, 1)
        assert report.model_config == {"width": 8, "act": ("gelu", None)}
        assert report.missing == report.unexpected == report.skipped == report.fallbacks == []
        assert report.proved == len(wanted)
    assert_same(snapshot(other, fresh), wanted)
    assert fresh.param_groups[0]["lr"] == 0.01


def test_modules_are_walked_as_torch_walks_them() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(2, 2)]), "c": shared[0]})
    model.register_module("nothing", None)
    model.register_parameter("none", None)
    model.register_parameter("own", shared[0].weight)
    walked = list(named_modules(model))
    assert walked == list(model.named_modules(remove_duplicate=False))
    assert [name for name, _ in walked].count("b.0.1.0") == 1
    parameters, wanted = list(named_parameters(model)), list(model.named_parameters(remove_duplicate=False))
    assert [(name, id(p)) for name, p in parameters] == [(name, id(p)) for name, p in wanted]
    assert len(parameters) == 9


def test_requests_of_a_load_are_copied_on_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once where the page cache does not have it, however many are read at a time."""
    entered: list[tuple[int, int]] = []

    class Turn(threading.BoundedSemaphore):
        def __enter__(self) -> bool:
            entered.append((len(entered), threading.get_ident()))
            return super().__enter__()

    model = nn.Linear(1024, 4096, bias=False)  # 16 MiB: four requests
    with manager(tmp_path, model) as m:
        m.save(step=1)
        wanted = model.weight.detach().clone()
        nn.init.zeros_(model.weight)
        monkeypatch.setattr(reader, "turns", lambda nbytes, pieces: Turn(1))
        monkeypatch.setattr(reader.CheckpointReader, "_read_cached", lambda *_: False)
        m.load(1)
    assert torch.equal(model.weight, wanted)
    assert len(entered) == 2 * 4  # to ask the page cache, and to copy


def test_several_optimizers_schedulers_and_a_scaler(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Any, ...]:
        model, _ = build(seed)
        first = torch.optim.SGD(model.up.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.AdamW([*model.norm.parameters(), *model.down.parameters()], lr=0.2, amsgrad=True)
        schedulers = {
            "a": torch.optim.lr_scheduler.MultiStepLR(first, [2, 3]),
            "b": torch.optim.lr_scheduler.SequentialLR(
                second, [torch.optim.lr_scheduler.ConstantLR(second), torch.optim.lr_scheduler.ExponentialLR(second, 0.5)], [2]
            ),
        }
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return model, (first, second), schedulers, scaler

    model, optimizers, schedulers, scaler = make(0)
    with manager(tmp_path, model, list(optimizers), scheduler=schedulers, scaler=scaler) as m:
        for _ in range(3):
            train(model, *optimizers)
            for scheduler in schedulers.values():
                scheduler.step()
        scaler.scale(torch.ones(1))
        scaler.update(new_scale=128.0)
        m.save(step=3)
    wanted = snapshot(model, *optimizers), {k: repr(s.state_dict()) for k, s in schedulers.items()}
    model, optimizers, schedulers, scaler = make(1)
    with manager(tmp_path, model, {"x": optimizers[0], "y": optimizers[1]}, scheduler=schedulers, scaler=scaler) as m:
        m.resume(prove=True)
    assert_same(snapshot(model, *optimizers), wanted[0])
    assert {k: repr(s.state_dict()) for k, s in schedulers.items()} == wanted[1]
    assert scaler.get_scale() == 128.0
    assert [o.param_groups[0]["lr"] for o in optimizers] == [s.get_last_lr()[0] for s in schedulers.values()]


def test_schedulers_may_be_one_or_a_list(tmp_path: Path) -> None:
    for number, wrap in enumerate((lambda s: s, lambda s: [s], lambda s: (s, s))):
        model, optimizer = build()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        with manager(tmp_path / str(number), model, optimizer, scheduler=wrap(scheduler)) as m:
            train(model, optimizer)
            scheduler.step()
            m.save(step=1)
            scheduler.step()
            report = m.load("latest")
            assert scheduler.last_epoch == 1
            assert [n for n in report.loaded if n.startswith("scheduler")] == [["scheduler"], ["scheduler.0"],
                                                                              ["scheduler.0", "scheduler.1"]][number]


def test_a_stateful_may_hold_tensors_at_any_depth(tmp_path: Path) -> None:
    model, optimizer = build()
    tree = {
        "ema": [torch.arange(5.0), {"deep": (torch.tensor(True), torch.ones(2, 0), "text")}],
        "big": torch.arange(300_000, dtype=torch.int64),
        7: {"when": math.inf, "nan": math.nan, "raw": b"\0\xff", "set": {1, 2}, "none": None},
    }
    part = Part(tree)
    with manager(tmp_path, model, optimizer, stateful={"part": part}) as m:
        m.save(step=1, extra_state={"note": (1, 2), "t": torch.full((3,), 2.0)})
    assert open_checkpoint(tmp_path).tensors["part.big"].nbytes == 2_400_000
    part = Part({"ema": [torch.zeros(5), {"deep": (torch.tensor(False), torch.ones(2, 0), "")}]})  # lacks some, fits some
    with manager(tmp_path, model, optimizer, stateful={"part": part}) as m:
        report = m.load(1)
    assert repr(part.state) == repr(tree)
    assert torch.equal(part.state["big"], tree["big"])
    assert report.extra_state["note"] == (1, 2)
    assert torch.equal(report.extra_state["t"], torch.full((3,), 2.0))


def test_a_stateful_may_change_shape_and_its_refusal_names_it(tmp_path: Path) -> None:
    model, _ = build()
    with manager(tmp_path, model, stateful={"seen": Part({"t": torch.arange(6)}), "picky": nn.Linear(2, 2)}) as m:
        m.save(step=1)
    part = Part({"t": torch.zeros(2, dtype=torch.int32)})
    with manager(tmp_path, model, stateful={"seen": part, "picky": nn.Linear(2, 2)}) as m:
        m.load(1)
    assert torch.equal(part.state["t"], torch.arange(6))
    with (manager(tmp_path, model, stateful={"seen": part, "picky": nn.Linear(3, 2)}) as m,
          pytest.raises(IncompatibleState, match=r"stateful 'picky': Linear.load_state_dict refused (.|\n)*size mismatch")):
        m.load(1)


def test_what_cannot_be_stored_is_refused_with_its_key_path(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, stateful={"part": Part({"a": [1, object()]})}) as m:
        with pytest.raises(UnserializableState, match=r"\$\.part\.a\[1\].*object"):
            m.save(step=1)
        m.components.parts["part"].state = {}
        with pytest.raises(UnserializableState, match=r"\$\.extra_state\.f.*function"):
            m.save(step=1, extra_state={"f": lambda: None})
        with pytest.raises(UnserializableState, match=r"\$\.metrics\.loss"):
            m.step(1, metrics={"loss": object()})
        with pytest.raises(UnserializableState, match=r"\$\.model_config"):
            m.save(step=1, model_config=object())
        assert steps_in(tmp_path) == []
        assert m.save(step=1) is not None  # none of it leaves the manager unusable


def test_names_that_clash_are_refused() -> None:
    model, optimizer = build()
    for name in ("model", "optim", "rng", "extra_state"):
        with pytest.raises(ConfigError, match=f"'{name}' is taken"):
            manager("memory://clash", model, optimizer, stateful={name: Part({})})
    with pytest.raises(ConfigError, match=r"'thing'.*needs state_dict"):
        manager("memory://clash", model, optimizer, stateful={"thing": 3})
    with pytest.raises(ConfigError, match=r"want a torch\.optim\.Optimizer"):
        manager("memory://clash", model, "adam")
    with pytest.raises(ConfigError, match=r"name \['nobody'\]"):
        manager("memory://clash", model, optimizer, per_rank=("nobody",))
    with pytest.raises(ConfigError, match="async_save"):
        CheckpointConfig("memory://clash", mode="full", async_save=True)


def test_metrics_become_plain_numbers(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        m.save(step=1, metrics={"loss": torch.tensor(0.5, requires_grad=True), "acc": np.float32(0.25), "n": np.int64(3)})
        m.save(step=2, metrics={"loss": torch.tensor([0.75]), "curve": [1, 2]})
        assert m.get_best_checkpoint() == str(tmp_path / "step-0000000001")
        assert m.metrics_history == {"loss": [0.5, 0.75], "acc": [0.25], "n": [3], "curve": [[1, 2]]}
    assert all(type(v) in (float, int) for v in open_checkpoint(tmp_path / "step-0000000001").metrics.values())


def test_saving_needs_a_step_and_a_step_is_saved_once(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, save_every_steps=2) as m:
        with pytest.raises(ConfigError, match="step="):
            m.save(epoch=1)
        path = m.step(2, metrics={"loss": 1.0})
        assert m.save(step=2, metrics={"loss": 1.0}) == path
        assert m.metrics_history == {"loss": [1.0]}
    assert steps_in(tmp_path) == [2]


def test_load_by_step_path_best_and_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = build()
    states = {}
    with manager(tmp_path / "run", model, optimizer, metric_mode="max", metric_name="acc") as m:
        for step, acc in ((1, 0.1), (2, 0.9), (3, 0.5)):
            train(model, optimizer)
            m.save(step=step, metrics={"acc": acc})
            states[step] = snapshot(model, optimizer)
    for which, step in (("latest", 3), ("best", 2), (1, 1), (str(tmp_path / "run" / "step-0000000002"), 2),
                        ("run/step-0000000001", 1), (tmp_path / "run", 3)):
        model, optimizer = build(seed=9)
        with manager(tmp_path / "run", model, optimizer, metric_mode="max", metric_name="acc") as m:
            assert m.load(which).step == step
            assert_same(snapshot(model, optimizer), states[step])
    with manager(tmp_path / "run", model, optimizer) as m:  # metric_name is "loss": nobody has that
        with pytest.raises(CheckpointNotFound, match="metric 'loss'"):
            m.load("best")
        with pytest.raises(CheckpointNotFound, match=r"step 8; there are \[3, 2, 1\]"):
            m.load(8)
        with pytest.raises(CheckpointNotFound):
            m.load(str(tmp_path / "nowhere"))
    assert resume_training(tmp_path / "run" / "step-0000000002", *build()).step == 2
    assert resume_training(tmp_path / "run", *build()).step == 3
    with pytest.raises(CheckpointNotFound):
        resume_training(tmp_path / "empty", *build())


def test_a_save_before_the_first_step_and_after_take_the_optimizer_back(tmp_path: Path) -> None:
    model, optimizer = build(lr=0.125)
    with manager(tmp_path, model, optimizer) as m:
        m.save(step=0)
        train(model, optimizer)
        m.save(step=1)
        stepped = snapshot(model, optimizer)
    other, fresh = build(seed=1)
    with manager(tmp_path, other, fresh) as m:
        report = m.load(1, prove=True)  # into an optimizer that has none yet
        assert_same(snapshot(other, fresh), stepped)
        report = m.load(0, prove=True)  # and back to one that had none then
        assert not fresh.state
        assert report.missing == report.unexpected == []
        assert fresh.param_groups[0]["lr"] == 0.125
        train(other, fresh)


def test_weights_unchanged_since_the_last_save_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warned() -> list[str]:
        found = [r.getMessage() for r in caplog.records if "identical" in r.getMessage()]
        caplog.clear()
        return found

    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        m.save(step=0)
        train(model, optimizer)
        m.save(step=1)
        assert warned() == []
        model(torch.randn(6, 4))  # only buffers change
        m.save(step=2)
        (text,) = warned()
        assert "step 2" in text
        assert "step 1" in text
    with manager(tmp_path, model, optimizer) as m:
        m.resume()
        m.save(step=2)  # the very step that was resumed
        assert warned() == []
    with manager(tmp_path, model, optimizer) as m:
        m.resume()
        m.save(step=5)
        assert ["step 5" in t and "step 2" in t for t in warned()] == [True]
        with torch.no_grad():
            model.down.bias += 1
        m.save(step=6)
        assert warned() == []
    frozen = build()[0].requires_grad_(False)
    with manager(tmp_path / "frozen", frozen) as m:
        m.save(step=1)
        m.save(step=2)
    assert warned() == []
    logging.getLogger("distckpt").setLevel(logging.NOTSET)


def test_a_manager_for_a_dict_of_models_and_a_module_list(tmp_path: Path) -> None:
    models = {"gen": nn.Linear(2, 2), "critic": nn.Linear(2, 1)}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models.values()]
    m = CheckpointManager(CheckpointConfig(tmp_path, preemption_signals=()), models, optimizers)
    with m:
        m.save(step=1)
    assert {"model.gen.weight", "model.critic.bias"} <= set(open_checkpoint(tmp_path).tensors)
