"""``distckpt average``, as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from averaging_support import contents, root, step_of
from cli_support import run, run_json

from distckpt.averaging.blend import Blend


def loss(blend: Blend) -> float:
    return abs(float(blend.read("model.w")[0]) - 1.6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = [{"w": torch.full((4,), float(i)), "n": torch.tensor(i)} for i in range(1, 5)]
    return root(tmp_path / "run", values, metrics=[{"loss": 5.0 - i} for i in range(1, 5)])


def test_text_and_json(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "average", folder, "--out", tmp_path / "a", "--method", "last", "-k", 2)
    assert code == 0
    assert "step 4, 1 tensors averaged, 1 copied from the newest" in out
    assert out.count("0.5") == 2
    assert torch.equal(contents(tmp_path / "a")["w"], torch.full((4,), 3.5))
    code, document = run_json(capsys, "average", folder, "-o", tmp_path / "b", "--window", ":2", "--dtype", "float64")
    assert code == 0
    assert [row["step"] for row in document["members"]] == [1, 2]
    assert contents(tmp_path / "b")["w"].dtype == torch.float64


def test_weights_best_and_greedy(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [step_of(folder, 1), step_of(folder, 3)]
    assert run(capsys, "average", *steps, "-o", tmp_path / "a", "--method", "weighted", "--weights", "3,1")[0] == 0
    assert torch.equal(contents(tmp_path / "a")["w"], torch.full((4,), 1.5))
    best = ["--method", "best", "-k", 3, "--metric", "loss", "--mode", "min"]
    assert run(capsys, "average", folder, "-o", tmp_path / "b", *best)[0] == 0
    assert torch.equal(contents(tmp_path / "b")["w"], torch.full((4,), 3.0))
    greedy = [
        "--method",
        "greedy",
        "--evaluate",
        "test_average_cli:loss",
        "--mode",
        "min",
        "--cache",
        tmp_path / "c.json",
    ]
    code, out, _ = run(capsys, "average", folder, "-o", tmp_path / "c", *greedy)
    assert code == 0
    assert "held-out score 0.1, best single 0.4, after 7 looks" in out
    assert torch.equal(contents(tmp_path / "c")["w"], torch.full((4,), 1.5))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--method", "median"], 2, "choose one of"),
        (["--method", "every"], 2, "needs every"),
        (["--window", "3"], 2, "FIRST:LAST"),
        (["--method", "weighted", "--weights", "1,x"], 2, "numbers with commas"),
        (["--prefix", "ema.0."], 1, "no tensor's name starts with 'ema.0.'"),
        (["--integers", "equal"], 1, "model.n"),
    ],
)
def test_wrong_use(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    found, _, err = run(capsys, "average", folder, "-o", tmp_path / "out", *arguments)
    assert (found, text in err) == (code, True), err
