"""`distckpt watch`: one frame, what it says, and the live view that follows a run."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import report_support as runs
from cli_support import run as command
from rich.console import Console

from distckpt import clock
from distckpt.analysis.live import glance
from distckpt.analysis.reading import RunReader
from distckpt.cli import watch
from distckpt.errors import StoreError
from distckpt.storage import open_store


def drawn(root: Path, width: int = 100, height: int | None = None, only: list[str] | None = None) -> str:
    seen = glance(RunReader(root).read(), clock.now())
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, emoji=False).print(watch.frame(seen, only, width, height))
    return out.getvalue()


def test_a_frame_says_what_runs_and_what_was_saved(tmp_path: Path) -> None:
    shown = drawn(runs.rich(tmp_path / "run"))
    for said in ("running: start 2 on node-2, heartbeat", "step 600, epoch 6,", "6 whole", "lowest val_loss", "at step 600",
                 "metrics up to  step 600", "free", "train_loss", "█"):  # fmt: skip
        assert said in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_save_under_way_is_seen(tmp_path: Path) -> None:
    root = runs.rich(tmp_path / "run")
    runs.builders.prepare(open_store(root), 700, 2, tensors=runs.weights(700), nonce="abad1dea")
    assert "under way      step 700: 15.0 KiB in 2 files" in drawn(root)


def test_a_run_without_metrics_and_one_without_saves(tmp_path: Path) -> None:
    assert "no metrics are stored yet" in drawn(runs.tiny(tmp_path / "tiny"))
    store = open_store(tmp_path / "none")
    runs.ensure_root(store)
    runs.create_generation(store, resumed_from=None)
    assert "none yet" in drawn(tmp_path / "none")
    assert "not running: job start 1 was the last" in drawn(tmp_path / "none")


def test_a_low_window_and_chosen_metrics(tmp_path: Path) -> None:
    root = runs.rich(tmp_path / "run")
    low = drawn(root, height=15)
    assert "3 more metrics" in low
    assert len(low.splitlines()) <= 15
    assert "lr" not in drawn(root, only=["accuracy"]).split("metric ")[1]
    assert "no metric of that name; there are: val_loss" in drawn(root, only=["nothing"])


def test_names_on_storage_cannot_steer_the_terminal(tmp_path: Path) -> None:
    root = runs.tiny(tmp_path / "run")
    runs.log_metrics(open_store(root), 1, 1, [(1, 1.0, {"a\x1b[31m[bold]b\n": 1.0})])
    shown = drawn(root)
    assert "\x1b" not in shown
    assert "a\\x1b[31m[bold]b\\n" in shown


def test_one_frame_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rich, broken = runs.rich(tmp_path / "rich"), runs.broken(tmp_path / "broken")
    code, out, _ = command(capsys, "watch", rich, "--once")
    assert code == 0
    assert "running: start 2" in out
    code, out, _ = command(capsys, "watch", broken)  # no terminal: one frame as well
    assert code == 1
    assert "bad: step 500 of job start 2 is damaged" in out
    code, out, _ = command(capsys, "watch", broken, "--json")
    assert code == 1
    assert json.loads(out)["newest_step"] == 600
    assert command(capsys, "watch", tmp_path / "nothing", "--once")[0] == 1


def test_signs_that_the_terminal_lacks_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = runs.rich(tmp_path / "run")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert drawn(root).isascii()


def test_the_live_view_follows_the_run_and_ends_with_an_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = runs.tiny(tmp_path / "run")
    store, looks = open_store(root), []
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "environ", {**os.environ, "COLUMNS": "100", "LINES": "30"})
    real = RunReader.read

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            runs.commit(store, 777)
        elif len(looks) == 2:
            monkeypatch.setattr(RunReader, "read", refuse)
        elif len(looks) == 3:
            monkeypatch.setattr(RunReader, "read", real)
            raise KeyboardInterrupt

    def refuse(self: RunReader) -> None:
        raise StoreError("the storage is away")

    monkeypatch.setattr(clock, "sleep", sleep)
    code, out, _ = command(capsys, "watch", root, "--every", "2.5")
    logging.getLogger("distckpt").setLevel(logging.NOTSET)
    assert code == 0
    assert looks == [2.5] * 3
    assert out.index("step 10,") < out.index("step 777,") < out.index("not seen: the storage is away")
