"""Lazy staging on one process: what is committed is the state of the save call, or nothing is, and the fence holds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import same_bits
from manager_support import Net, Part, assert_same, build, manager, snapshot, steps_in, train, wait_for
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from distckpt import CheckpointConfig, EMAModel, failpoints, open_checkpoint
from distckpt.dcp import writer
from distckpt.engines.step_hook import before_steps
from distckpt.errors import ConfigError, SaveFailed, SnapshotFailed
from distckpt.manager import state_copy
from distckpt.manager.manager import CheckpointManager
from distckpt.manager.preempt import Preempted

LATE = "staging.copy:0:sleep=0.2"
"""The copy does not begin before training has come to the fence."""


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints for this test only."""
    yield failpoints.arm
    failpoints.arm("")


def lazy(root: Path, model: nn.Module, optimizer: Any = None, **options: Any) -> CheckpointManager:
    return manager(root, model, optimizer, async_save=True, lazy_staging=True, **options)


def assert_saved(root: Path, step: int, wanted: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(root / f"step-{step:010d}")
    assert checkpoint.verify(mode="full").ok
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, wanted)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_a_save_before_a_step_holds_the_state_before_the_step(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    model.register_parameter("strided", nn.Parameter(torch.randn(5, 6).t()))
    train(model, optimizer)
    model.strided.grad = torch.ones_like(model.strided)
    optimizer.add_param_group({"params": [model.strided]})
    optimizer.step()
    blocking = manager(tmp_path / "blocking", model, optimizer)
    part = Part({"t": torch.zeros(4), "n": [0]})
    wanted, streams = {}, {}
    with lazy(tmp_path / "lazy", model, optimizer, stateful={"part": part}) as m, blocking:
        for step in (1, 2, 3):
            wanted[step] = snapshot(model, optimizer) | {"part.t": part.state["t"].clone()}
            streams[step] = torch.get_rng_state()
            blocking.save(step=step)
            arm(LATE)
            m.save(step=step, extra_state={"at": part.state["n"]})
            part.state["t"] += 1
            part.state["n"].append(step)
            train(model, optimizer)  # forward changes the batch norm's statistics, the step all the rest
            arm("")
            assert m.pipeline.arena.copied_at_once == nbytes(model.buffers()) + nbytes([part.state["t"]])
        m.wait()
        assert m.pipeline.arena.allocations == 1
    for step, values in wanted.items():
        assert_saved(tmp_path / "lazy", step, values)
        own, other = (open_checkpoint(tmp_path / kind / f"step-{step:010d}") for kind in ("lazy", "blocking"))
        assert own.objects["extra_state"]["at"] == list(range(step))
        assert own.objects["optim.param_groups"] == other.objects["optim.param_groups"]
    with manager(tmp_path / "lazy", model, optimizer, stateful={"part": part}) as m:
        for step, state in streams.items():
            m.load(step, prove=True)
            assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["AdamW", "fused", "data"])
def test_without_the_fence_a_change_is_found_and_nothing_is_committed(
    tmp_path: Path, arm: Callable[[str], None], how: str
) -> None:
    model = Net()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    if how == "fused":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    train(model, optimizer)

    def change() -> None:
        if how != "data":
            train(model, optimizer)
            return
        for parameter in model.parameters():
            parameter.data.mul_(2)

    with lazy(tmp_path, model, optimizer, retries=3) as m:
        m._fence.close()
        arm(LATE)
        m.save(step=1)
        change()
        with pytest.raises(SnapshotFailed, match=r"model.up.weight.* changed while a lazy save .*; call manager.fence"):
            m.wait()
        assert steps_in(tmp_path) == []
        wanted = snapshot(model, optimizer)
        m.save(step=2)
        assert m.pipeline.arena.copied_at_once >= nbytes(model.buffers()) + nbytes(model.parameters())  # once bitten
        change()
        m.wait()
        assert_saved(tmp_path, 2, wanted)
    assert steps_in(tmp_path) == [2]


def test_a_change_during_the_write_is_found_too(tmp_path: Path, arm: Callable[[str], None]) -> None:
    """After the copy no harm is done, but nothing tells that from a change that was half done at its end."""
    model, optimizer = build()
    with lazy(tmp_path, model, optimizer) as m:
        arm("writer.chunk:0:sleep=0.3")
        hits = failpoints.record()
        m.save(step=1)
        wait_for(lambda: any(hit.startswith("writer.chunk") for hit in hits))
        with torch.no_grad():
            model.up.bias.add_(1)
        with pytest.raises(SnapshotFailed, match=r"model.up.bias changed"):
            m.wait()
        arm("")
        wanted = snapshot(model)
        m.save(step=2)
        m.fence()
        with torch.no_grad():
            model.up.bias.add_(1)
    assert_saved(tmp_path, 2, wanted)
    assert steps_in(tmp_path) == [2]


def test_every_optimizer_is_held_up_also_unknown_ones(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model = Net()
    halves = [torch.optim.AdamW(part.parameters()) for part in (model.up, model.down)]
    rest = torch.optim.SGD(model.norm.parameters(), lr=0.1)  # the manager never hears of this one
    train(model, *halves, rest)
    with lazy(tmp_path, model, halves) as m:
        for step, optimizer in enumerate((*halves, rest, *halves[::-1])):
            wanted = snapshot(model, *halves)
            arm(LATE)
            m.save(step=step)
            train(model, optimizer)
            m.wait()
            assert_saved(tmp_path, step, wanted)


def test_what_forward_may_change_is_copied_at_once(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = nn.Embedding(7, 4, max_norm=0.5)
            self.momentum = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for parameter in self.momentum.parameters():
                parameter.data.mul_(0.9)
            return self.head(self.momentum(self.scaled(x)))

    class Shadow(Part):
        def settled(self, name: str) -> list[str]:
            return [f"{name}.w"]

    model = Model()
    shadow = Shadow({"w": torch.randn(33)})
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(7)).sum().backward()
    optimizer.step()
    wanted = snapshot(model, optimizer) | {"shadow.w": shadow.state["w"].clone()}
    with lazy(tmp_path, model, optimizer, stateful={"shadow": shadow}) as m:
        failpoints.arm(LATE)
        m.save(step=1)
        assert m.pipeline.arena.copied_at_once == nbytes([model.scaled.weight, *model.momentum.parameters()])
        model(torch.arange(7)).sum().backward()
        optimizer.step()
        shadow.state["w"].lerp_(torch.ones(33), 0.1)
        failpoints.arm("")
    assert_saved(tmp_path, 1, wanted)


def test_a_dead_copy_is_told_at_the_fence_and_fails_the_save(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    train(model, optimizer)
    with lazy(tmp_path, model, optimizer) as m:
        arm("staging.copy:1:raise=EIO")
        m.save(step=1)
        wait_for(lambda: not m._saver.busy)
        before = snapshot(model, optimizer)
        with pytest.raises(SnapshotFailed, match=r"not copied: OSError: .*failpoint staging.copy") as caught:
            train(model, optimizer)
        assert isinstance(caught.value.__cause__, OSError)
        assert_same({n: t for n, t in snapshot(model, optimizer).items() if "norm" not in n},
                    {n: t for n, t in before.items() if "norm" not in n})  # fmt: skip
        with pytest.raises(SaveFailed, match=r"step 1 was not committed(.|\n)*rank 0(.|\n)*failpoint staging.copy"):
            m.wait()
        train(model, optimizer)  # said once
        m.save(step=2)
    with lazy(tmp_path, model, optimizer, max_consecutive_failures=1) as m:
        m.resume()
        arm("staging.copy:1:raise=EIO")
        m.save(step=3)
        train(model, optimizer)  # a failure that is tolerated does not end training
        m.wait()
        assert m.failures == 1
        m.save(step=4)
    assert steps_in(tmp_path) == [2, 4]


def test_the_fence_has_a_deadline_and_names_what_is_missing(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    with lazy(tmp_path, model, optimizer, timeout_s=0.3) as m:
        arm("staging.copy:1:sleep=1.5")
        m.save(step=1)
        with pytest.raises(SnapshotFailed, match=r"not copied within 0.3 s: model.down.bias|not copied within 0.3 s: model"):
            m.fence()
        with pytest.raises(SaveFailed, match="not copied within"):
            m.wait()
    assert steps_in(tmp_path) == []


def test_who_waits_takes_the_chunks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Callable[[str], None]) -> None:
    monkeypatch.setattr(state_copy, "CHUNK", 4096)
    model = nn.Linear(100, 100)
    takers: list[str] = []

    class Trace(list[str]):
        def append(self, hit: str) -> None:
            if hit.startswith("staging.copy"):
                takers.append(threading.current_thread().name)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lazy(tmp_path, model, optimizer) as m:
        failpoints.record(Trace())
        arm("staging.copy:1:sleep=0.5")
        wanted = snapshot(model)
        m.save(step=1)
        wait_for(lambda: bool(takers))
        m.fence()
        assert takers == ["distckpt-save-1", *["MainThread"] * 9]
        with torch.no_grad():
            model.weight.zero_()
        failpoints.record([])
    assert_saved(tmp_path, 1, wanted)


def test_background_threads_are_few_and_of_low_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Callable[[str], None]
) -> None:
    monkeypatch.setattr(writer, "REQUEST", 4096)
    arm("writer.chunk:0:sleep=0.3")  # one thread rests, so that the other has to write too
    found: list[tuple[str, int]] = []

    class Trace(list[str]):
        def append(self, hit: str) -> None:
            if hit.startswith(("writer.chunk", "staging.copy")):
                found.append((threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    own = os.getpriority(os.PRIO_PROCESS, 0)
    model = nn.Linear(200, 200)
    with lazy(tmp_path, model, threads=6, background_threads=2, background_nice=3) as m:
        failpoints.record(Trace())
        m.save(step=1)
        m.wait()
        failpoints.record([])
    assert {nice for _, nice in found} == {min(19, own + 3)}
    assert len({name for name, _ in found if "write" in name}) == 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_saves_one_after_the_other_and_a_retry_from_the_copy(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    train(model, optimizer)
    wanted = {}
    with lazy(tmp_path, model, optimizer, retries=2) as m:
        arm(f"{LATE};writer.chunk:1:raise=EIO;writer.before_fsync:1:raise=EIO")
        for step in (1, 2):
            wanted[step] = snapshot(model, optimizer)
            m.save(step=step)
            if step == 1:  # the second follows without a step
                train(model, optimizer)
        m.load(1)  # passes the fence before it changes anything
        assert_same(snapshot(model, optimizer), wanted[1])
        m.wait()
        for step, values in wanted.items():
            assert_saved(tmp_path, step, values)
    with lazy(tmp_path / "skip", model, optimizer, on_busy="skip") as m:
        m.save(step=1)
        assert m.save(step=2) is None
        train(model, optimizer)
    assert steps_in(tmp_path / "skip") == [1]


def test_a_preemption_during_a_lazy_save(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    train(model, optimizer)
    wanted = {1: snapshot(model, optimizer)}
    arm(LATE)
    with pytest.raises(Preempted) as left, lazy(  # noqa: PT012
        tmp_path, model, optimizer, save_every_steps=1, preemption_signals=("SIGUSR1",), preemption_budget_s=20
    ) as m:
        m.step(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        train(model, optimizer)
        wanted[2] = snapshot(model, optimizer)
        m.step(2)
    assert left.value.path is not None
    for step, values in wanted.items():
        assert_saved(tmp_path, step, values)


def test_what_cannot_be_held_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lazy_staging=True .* needs async_save=True"):
        CheckpointConfig("x", lazy_staging=True)

    class Foreign:
        def step(self) -> None: ...

        def hook(self) -> None: ...

    with pytest.raises(ConfigError, match=r"Foreign is no torch.optim.Optimizer: set lazy_staging=False"):
        before_steps(Foreign().hook, [Foreign()])


def test_a_manager_that_is_gone_holds_nothing_up(tmp_path: Path) -> None:
    model, optimizer = build()
    with lazy(tmp_path, model, optimizer) as m:
        m.save(step=1)
    assert not _global_optimizer_pre_hooks
    lazy(tmp_path / "unclosed", model, optimizer)
    assert len(_global_optimizer_pre_hooks) == 1
    train(model, optimizer)  # its hook finds nobody
    _global_optimizer_pre_hooks.clear()


def test_inference_tensors_have_no_version_and_are_copied_at_once(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.inference_mode():
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.ones(parameter.shape)
    wanted = snapshot(model, optimizer)
    with lazy(tmp_path, model, optimizer) as m:
        m.save(step=1)
        assert m.pipeline.arena.copied_at_once == nbytes(model.parameters())
    assert_saved(tmp_path, 1, wanted)
    assert same_bits(open_checkpoint(tmp_path).read("optim.state.bias.momentum_buffer"), torch.ones(3))


def test_an_average_is_copied_later_and_its_swap_passes_the_fence(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    ema = EMAModel(model, decay=0.5)
    with lazy(tmp_path, model, optimizer, stateful={"ema": ema}) as m:
        train(model, optimizer)
        ema.update()
        wanted = snapshot(model, optimizer)
        wanted |= {f"ema.{name}": shadow.clone() for name, shadow in ema.state_dict()["shadow"].items()}
        wanted |= {f"ema.{name}": buffer.clone() for name, buffer in model.named_buffers()}  # stored once, as the model's
        arm(LATE)
        m.save(step=1)
        assert m.pipeline.arena.copied_at_once == nbytes(model.buffers())
        with ema.averaged():
            pass
        m.wait()
        arm(LATE)
        m.save(step=2)
        train(model, optimizer)
        ema.update()
    for step in (1, 2):
        assert_saved(tmp_path, step, wanted)
