"""The README is true: its example runs and keeps its word, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.cli.app import COMMANDS

TOP = Path(__file__).resolve().parents[2]
README = (TOP / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
AFTER_STEP = "            manager.step(step, "


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """Run code as a script in a folder, from the same random streams as any other run; return its names."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "__main__", **names}
    exec(compile(code, "README.md", "exec"), space)
    return space


def losses_of(space: dict[str, Any]) -> list[float]:
    found: list[float] = space["manager"].metrics_history["loss"]
    return found


def test_there_is_one_example_and_it_is_short() -> None:
    assert len(BLOCKS) == 1
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 30


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    space = run(BLOCKS[0], tmp_path, monkeypatch)
    assert capsys.readouterr().out.startswith("40 {'loss': ")
    assert [c.step for c in distckpt.list_checkpoints("runs/line")] == [40, 30, 20, 10]
    assert space["checkpoint"].verify("full").ok
    again = run(BLOCKS[0], tmp_path, monkeypatch)
    assert again["report"].step == 40
    assert losses_of(again) == losses_of(space)


def test_killed_and_started_again_it_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCKS[0].count(AFTER_STEP) == 1
    # Leaving the context waits for a save in flight; kills that do not wait are in tests/faults.
    dying = BLOCKS[0].replace(AFTER_STEP, f"            if step == 27:\n                raise Killed\n{AFTER_STEP}")
    whole = run(BLOCKS[0], tmp_path / "whole", monkeypatch)
    with pytest.raises(Killed):
        run(dying, tmp_path / "killed", monkeypatch, Killed=Killed)
    resumed = run(BLOCKS[0], tmp_path / "killed", monkeypatch)
    assert resumed["report"].step == 20
    assert losses_of(resumed) == losses_of(whole)
    for name, tensor in whole["checkpoint"].state_dict("").items():
        assert torch.equal(tensor, resumed["checkpoint"].read(name)), name


def test_it_opens_with_the_two_commands() -> None:
    commands = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")][:2]
    assert commands == ["bash launch/demo.sh", "bash tests/run.sh"]
    assert README.index(commands[0]) < 40


def rows(title: str) -> list[str]:
    section = README.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line.strip("|").split("|")[0] for line in section.splitlines() if line.startswith("| `")]


def test_the_table_of_names_is_complete() -> None:
    named = {name for row in rows("Names") for name in re.findall(r"`(\w+)`", row)}
    assert {*distckpt.__all__} - {"__version__"} <= named
    assert all(hasattr(distckpt, name) for name in named if not name.startswith("Distckpt"))


def test_the_table_of_commands_is_complete() -> None:
    assert {command for row in rows("Command line") for command in re.findall(r"distckpt (\w+)", row)} == set(COMMANDS)


def test_the_table_of_layers_is_complete() -> None:
    named = {layer for row in rows("Layers") for layer in re.findall(r"`(\w+)`", row)}
    present = {
        path.stem for path in (TOP / "distckpt").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named == present - {"__init__"}


def test_files_and_links_exist() -> None:
    mentioned = re.findall(r"(?<![\w/.])(?:distckpt|tests|launch|docs)/[\w./-]*\w", README)
    mentioned += re.findall(r"\]\(([^)#]+)\)", README)
    assert [path for path in mentioned if not (TOP / path).exists()] == []
