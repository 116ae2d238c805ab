"""Background saves: they own their snapshot, fail loudly, lose nothing, and leave the training group alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from manager_support import Part, assert_same, build, manager, mutate, snapshot, steps_in, train, wait_for

from distckpt import failpoints, open_checkpoint
from distckpt.errors import SaveFailed

SLOW = "writer.chunk:0:sleep=0.3"


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints for this test only."""
    yield failpoints.arm
    failpoints.arm("")


@pytest.mark.parametrize("root", ["folder", "memory://three-in-a-row"])
def test_three_saves_in_a_row_hold_the_values_at_save_time(tmp_path: Path, root: str, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    model.register_buffer("strided", torch.randn(5, 6).t())
    model.register_buffer("large", torch.randn(3 << 20))  # more than one request of the writer
    train(model, optimizer)
    part = Part({"t": torch.zeros(4), "n": [0]})
    wanted, url = {}, tmp_path if root == "folder" else root
    with manager(url, model, optimizer, stateful={"part": part}, async_save=True) as m:
        for step in (1, 2, 3):
            arm(SLOW)
            wanted[step] = snapshot(model, optimizer) | {"part.t": part.state["t"].clone()}
            assert m.save(step=step, extra_state={"at": part.state["n"]}) is not None
            assert m._saver.busy
            mutate(model, optimizer)
            part.state["t"] += 1
            part.state["n"].append(step)
        arm("")
        m.wait()
        assert m.pipeline.arena.allocations == 1
    for step, values in wanted.items():
        checkpoint = open_checkpoint(f"{url}/step-{step:010d}")
        assert checkpoint.verify(mode="full").ok
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}
        assert_same(found, values)
        assert checkpoint.objects["extra_state"]["at"] == list(range(step))


def test_the_staging_buffer_is_allocated_once_over_many_saves(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, async_save=True, save_total_limit=2) as m:
        m.save(step=0)
        grown = 0
        for step in range(1, 8):
            train(model, optimizer)
            m.save(step=step)
            grown = m.pipeline.arena.allocations if step == 1 else grown  # once more when the optimizer got its state
        assert m.pipeline.arena.allocations == grown <= 2
        held = m.pipeline.arena.nbytes
        assert held >= sum(info.nbytes for info in open_checkpoint(tmp_path / "step-0000000006").tensors.values())
    assert m.pipeline.arena.nbytes == 0


def test_a_second_save_waits_or_is_refused(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    expected = {"wait": [1, 2, 3], "skip": [1, 3], "raise": [1, 3]}
    for policy, steps in expected.items():
        with manager(tmp_path / policy, model, optimizer, async_save=True, on_busy=policy) as m:
            arm(SLOW)
            assert m.save(step=1) is not None
            if policy == "raise":
                with pytest.raises(SaveFailed, match="step 2: a save is in flight"):
                    m.save(step=2)
            else:
                assert (m.save(step=2) is None) == (policy == "skip")
            m.wait()
            arm("")
            assert m.save(step=3) is not None
        assert steps_in(tmp_path / policy) == steps


def test_failures_surface_at_the_next_call_and_at_wait(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, async_save=True, retries=0) as m:
        arm("writer.chunk:1:raise=ENOSPC")
        assert m.save(step=1) is not None
        with pytest.raises(SaveFailed, match=r"step 1 was not committed(.|\n)*rank 0(.|\n)*No space left"):
            m.wait()
        m.wait()  # said once
        arm("writer.chunk:1:raise=EIO")
        assert m.save(step=2) is not None
        wait_for(lambda: not m._saver.busy)
        with pytest.raises(SaveFailed, match="step 2"):
            m.save(step=3)
        assert m.save(step=2) is not None  # the step that failed may be tried again
    with pytest.raises(SaveFailed, match="step 9"), manager(tmp_path / "end", model, optimizer, async_save=True, retries=0) as m:  # noqa: PT012
        arm("writer.chunk:1:raise=EIO")
        m.save(step=9)
    assert steps_in(tmp_path) == [2]


def test_failures_in_a_row_are_counted_and_retries_use_the_same_copy(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, async_save=True, retries=0, max_consecutive_failures=2) as m:
        arm("writer.chunk:0:raise=ENOSPC")
        for step in (1, 2):
            m.save(step=step)
            m.wait()
            assert m.failures == step
        m.save(step=3)
        with pytest.raises(SaveFailed, match="step 3"):
            m.wait()
        arm("")
        m.save(step=4)
        m.wait()
        assert m.failures == 0
    with manager(tmp_path / "again", model, optimizer, async_save=True, retries=2) as m:
        arm("writer.chunk:1:raise=EIO;writer.before_fsync:1:raise=EIO")
        wanted = snapshot(model)
        m.save(step=1)
        mutate(model, optimizer)
    checkpoint = open_checkpoint(tmp_path / "again")
    assert_same({f"model.{n}": v for n, v in checkpoint.state_dict("model.").items()}, wanted)


def test_an_exception_in_the_body_does_not_lose_the_save_nor_get_lost(tmp_path: Path, arm: Callable[[str], None]) -> None:
    model, optimizer = build()
    arm(SLOW)
    with pytest.raises(ZeroDivisionError), manager(tmp_path, model, optimizer, async_save=True) as m:  # noqa: PT012
        m.save(step=1)
        1 / 0  # noqa: B018
    assert steps_in(tmp_path) == [1]
    arm("writer.chunk:0:raise=ENOSPC")
    with pytest.raises(ZeroDivisionError), manager(tmp_path / "both", model, optimizer, async_save=True) as m:  # noqa: PT012
        m.save(step=1)
        1 / 0  # noqa: B018
