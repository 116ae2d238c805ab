"""Which checkpoint a job goes on from: fallbacks, fresh starts, going back, and the metrics history that follows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from manager_support import assert_same, build, manager, snapshot, steps_in, train
from ranks import run_ranks
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint


def damage(root: Path, step: int) -> None:
    (shard,) = (root / f"step-{step:010d}").glob("g*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_resume_falls_back_load_does_not_and_nothing_starts_over_in_silence(tmp_path: Path) -> None:
    model, optimizer = build()
    states = {}
    with manager(tmp_path, model, optimizer) as m:
        for step in (1, 2, 3):
            train(model, optimizer)
            m.save(step=step)
            states[step] = snapshot(model, optimizer)
    damage(tmp_path, 3)
    with manager(tmp_path, model, optimizer) as m:
        with pytest.raises(CorruptCheckpoint, match=r"step-0000000003"):
            m.load("latest")
        report = m.resume()
        assert report is not None
        assert report.step == 2
        assert len(report.fallbacks) == 1
        assert "step-0000000003" in report.fallbacks[0]
        assert_same(snapshot(model, optimizer), states[2])
        assert m.save(step=3) is not None  # the damaged step can be reached again
    assert [c.step for c in m.root.line()] == [3, 2, 1]
    for step in (1, 2, 3):
        for shard in (tmp_path / f"step-{step:010d}").glob("g*/*.safetensors"):
            shard.write_bytes(b"")
    with manager(tmp_path, model, optimizer) as m:
        with pytest.raises(CheckpointNotFound, match=r"3 checkpoints and none can be loaded(.|\n)*fresh=True") as caught:
            m.resume()
        assert all(f"step-000000000{s}" in str(caught.value) for s in (1, 2, 3))
        with pytest.raises(ConfigError, match="holds checkpoints"):
            m.save(step=9)
        assert m.resume(fresh=True) is None
        assert m.save(step=9) is not None
    with manager(tmp_path, model, optimizer) as m:
        assert [c.step for c in m.root.line()] == [9]
        assert m.resume().step == 9  # type: ignore[union-attr]


def test_starting_fresh_needs_a_word_and_leaves_the_config_alone(tmp_path: Path) -> None:
    model, optimizer = build()
    config = CheckpointConfig(tmp_path, preemption_signals=(), verbose=False)
    with CheckpointManager(config, model, optimizer) as m:
        m.save(step=5)
    with CheckpointManager(config, model, optimizer) as m:
        with pytest.raises(ConfigError, match=r"step 5.*start_fresh=True"):
            m.save(step=6)
        m.resume(fresh=True)
        m.save(step=1)
    assert not config.start_fresh
    with CheckpointManager(config, model, optimizer) as m, pytest.raises(ConfigError):
        m.save(step=7)
    with manager(tmp_path, model, optimizer, start_fresh=True) as m:
        m.save(step=2)
        assert [c.step for c in m.root.line()] == [2]
    with manager(tmp_path / "other", model, optimizer) as m:  # fine-tuning: weights from elsewhere, a root of its own
        m.load(tmp_path, include=("model.*",))
        m.save(step=1)
        assert m.resumed_from is None


def test_metrics_history_follows_the_lineage(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer, save_every_steps=3) as m:
        for step in range(1, 8):
            train(model, optimizer)
            m.step(step, metrics={"loss": 10.0 - step} | ({"acc": step / 10} if step % 2 else {}))
    with manager(tmp_path, model, optimizer, save_every_steps=3) as m:
        assert m.load(3).step == 3  # steps 4 to 7 are abandoned
        assert m.metrics_history == {"loss": [9.0, 8.0, 7.0], "acc": [0.1, 0.3]}
        for step in range(4, 7):
            m.step(step, epoch=1, metrics={"loss": 100.0 + step})
    with manager(tmp_path, model, optimizer) as m:
        assert m.metrics_history == {}
        m.resume()
        assert m.metrics_history["loss"] == [9.0, 8.0, 7.0, 104.0, 105.0, 106.0]
        epochs = [(row["step"], row["epoch"]) for row in m.metrics_rows]
        assert epochs == [(1, None), (2, None), (3, None), (4, 1), (5, 1), (6, 1)]


def test_metrics_are_on_storage_before_the_checkpoint_that_needs_them(tmp_path: Path) -> None:
    model, optimizer = build()
    m = manager(tmp_path, model, optimizer, save_every_steps=2)
    for step in (1, 2, 3):
        m.step(step, metrics={"loss": float(step)})
    m.schedule.close()  # as if the process died here: nothing is written after the commit of step 2
    with manager(tmp_path, model, optimizer) as other:
        other.resume()
        assert other.metrics_history == {"loss": [1.0, 2.0]}


def test_going_back_within_a_job_begins_a_new_line(tmp_path: Path) -> None:
    model, optimizer = build()
    with manager(tmp_path, model, optimizer) as m:
        for step in (1, 2, 3):
            train(model, optimizer)
            m.save(step=step, metrics={"loss": [5.0, 1.0, 7.0][step - 1]})
        good = m.load("best")  # the loss went up: back to step 2, and on from there
        assert good.step == 2
        assert m.metrics_history == {"loss": [5.0, 1.0]}
        train(model, optimizer)
        assert m.save(step=3, metrics={"loss": 0.5}) is not None
        wanted = snapshot(model, optimizer)
    with manager(tmp_path, model, optimizer) as m:
        report = m.resume()
        assert report is not None
        assert (report.step, report.generation) == (3, 2)
        assert m.metrics_history == {"loss": [5.0, 1.0, 0.5]}
        assert_same(snapshot(model, optimizer), wanted)
    assert steps_in(tmp_path) == [1, 2, 3, 3]


def twice(rank: int, root: Path) -> None:
    """Two managers in a row, of which rank 0 is slow to leave the first: neither may mistake the other's words."""
    for _ in range(2):
        m = manager(root, nn.Linear(2, 2))
        with pytest.raises(CheckpointNotFound):
            m.load("latest")
        if rank == 0:
            time.sleep(0.3)
        m.close()


def test_managers_in_a_row_do_not_share_agreement_keys(tmp_path: Path) -> None:
    run_ranks(2, twice, tmp_path)
