"""The scripts about averages run: replicas that train apart and meet, and the recipes, on a handful of rows."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import run_ranks

from distckpt import open_checkpoint

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOP / "launch"))


def script(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(name)


def replicas(rank: int, folder: Path, steps: int) -> str:
    sys.argv = ["train_replicas.py", "--dir", str(folder), "--steps", str(steps), "--every", "4", "--batch", "2",
                "--dim", "32", "--layers", "1", "--outer", "diloco"]  # fmt: skip
    script("train_replicas").main()
    return ""


def test_replicas_train_on_their_own_and_meet(tmp_path: Path, launch: None) -> None:
    script("train_replicas")  # before the ranks are forked
    rendezvous = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    outcomes = run_ranks(2, replicas, tmp_path, 4, backend=None, env=rendezvous, check=False)
    outcomes += run_ranks(2, replicas, tmp_path, 8, backend=None, env=rendezvous, check=False)
    assert all(outcome.ok for outcome in outcomes), outcomes[0].traceback + outcomes[0].output
    found = re.findall(r"step (\d)/\d  loss ([\d.]+)  val_loss_alone ([\d.]+)  val_loss ([\d.]+)",
                       outcomes[0].output + outcomes[2].output)  # fmt: skip
    assert [row[0] for row in found] == ["4", "8"]
    assert all(row[2] != row[3] for row in found)  # the outer step moves further than the mean
    last = open_checkpoint(tmp_path)
    assert (last.step, last.objects["outer"]["steps"]) == (8, 2)
    anchor = last.state_dict("outer.anchor.")
    assert all(torch.equal(value, anchor[name]) for name, value in last.state_dict("model.").items())


@pytest.mark.parametrize(("name", "rows"), [("swa", 5), ("lawa", 8), ("ema", 10), ("top5", 8), ("ensemble", 5)])
def test_a_recipe(
    name: str, rows: int, tmp_path: Path, launch: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As the page says to call it, on a few images."""
    pytest.importorskip("sklearn")
    recipes = script("recipes")
    whole = recipes.data

    def few(seed: int, noise: float) -> Any:
        return tuple((x[:n], y[:n]) for (x, y), n in zip(whole(seed, noise), (50, 40, 60), strict=True))

    monkeypatch.setattr(recipes, "data", few)
    memory = Path("/dev/shm")
    monkeypatch.setenv("TMPDIR", str(memory if os.access(memory, os.W_OK) else tmp_path))
    monkeypatch.setattr(recipes.tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "argv", ["recipes.py", name, "--seeds", "1", "--noise", "0"])
    recipes.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + rows, lines
    for line in lines[2:]:
        assert 0 <= float(re.findall(r"\d\.\d{4}", line)[0]) <= 1


def test_the_page_names_tests_that_exist() -> None:
    page = (TOP / "docs" / "averaging.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 11
    for file, name in named:
        assert f"def {name}(" in (TOP / file).read_text(), (file, name)
