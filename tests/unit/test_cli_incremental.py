"""The commands on incremental checkpoints: what they refer to, what is missing, and copies that need nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_support import run, run_json

from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 3: the weight stands still, the bias changes."""
    model = torch.nn.Linear(300, 300)
    config = CheckpointConfig(tmp_path / "run", incremental=True, preemption_signals=(), control_file=None)
    with CheckpointManager(config, model) as manager:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.bias += 1
            assert manager.save(step=step, metrics={"loss": 1 / step}) is not None
    return tmp_path / "run"


def test_show_and_doctor_say_what_is_its_own_and_what_is_not(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    _, out, _ = run(capsys, "show", root)
    assert "refers to" in out
    assert "in 1 file of step 1" in out
    _, document = run_json(capsys, "show", root, "--step", 3)
    (reference,) = document["references"]
    assert reference["attempt"].startswith("step-0000000001/g000001-")
    assert (reference["shards"], reference["ranks"], reference["used"]) == (1, [[0, 1]], 360_000)
    assert document["nbytes"] < reference["used"] < reference["size"]
    assert run_json(capsys, "show", root, "--step", 1)[1]["references"] == []
    assert "refers to" not in run(capsys, "show", root, "--step", 1)[1]
    code, document = run_json(capsys, "doctor", root)
    assert code == 0
    texts = [finding["text"] for finding in document["findings"] if finding["check"] == "incremental"]
    assert [text.partition(":")[0] for text in texts] == ["step 3", "step 2"]
    assert document["facts"]["orphans"] == document["facts"]["uncommitted"] == []


def test_ls_and_gc_go_by_own_bytes_and_keep_what_is_needed(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    sizes = [row["nbytes"] for row in run_json(capsys, "ls", root)[1]["checkpoints"]]
    assert sizes[0] < 30_000 < 300_000 < sizes[2]
    code, document = run_json(capsys, "gc", root, "--keep-last", 2, "--yes")
    assert code == 0
    assert document["freed_bytes"] < 10_000  # a manifest: the data is needed
    assert (root / "step-0000000001").exists()
    assert run(capsys, "verify", root, "--all", "--mode", "full")[0] == 0
    assert run_json(capsys, "ls", root, "--all")[1]["uncommitted"] == []


def test_materialize(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    whole, weights = root.parent / "whole", open_checkpoint(root).state_dict()
    code, out, _ = run(capsys, "convert", "--materialize", root / "step-0000000002", whole)
    assert (code, "every byte read back" in out) == (0, True)
    code, document = run_json(capsys, "convert", "--materialize", root, root.parent / "newest", "--step", 3)
    assert (code, document["step"], document["notes"]) == (0, 3, [])
    shutil.rmtree(root)
    for place, step in ((whole, 2), (root.parent / "newest", 3)):
        assert run(capsys, "verify", place, "--mode", "full")[0] == 0
        assert run_json(capsys, "show", place)[1]["references"] == []
        assert open_checkpoint(place).metrics == {"loss": 1 / step}
    assert torch.equal(open_checkpoint(root.parent / "newest").read("model.bias"), weights["bias"])
    assert run_json(capsys, "convert", "--materialize", whole, root.parent / "again")[1]["notes"]  # nothing to do, said
    for wrong in (("--prefix", "x."), ("--to", "dcp"), ("--no-optimizer",)):
        assert run(capsys, "convert", "--materialize", whole, root.parent / "other", *wrong)[0] == 2
    assert run(capsys, "convert", "--materialize", whole, whole)[0] == 2
    assert run(capsys, "convert", "--materialize", whole / "step-0000000002", root.parent / "other", "--step", 2)[0] == 2


def test_a_step_copied_alone(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    alone = root.parent / "alone"
    shutil.copytree(root / "step-0000000003", alone / "step-0000000003")
    code, _, err = run(capsys, "show", alone / "step-0000000003")
    assert code != 0
    assert "step-0000000001/" in err
    assert "--materialize" in err
    code, document = run_json(capsys, "verify", alone)
    assert code == 1
    (problem,) = document["checkpoints"][0]["problems"]
    assert problem["file"].startswith("step-0000000001/")
    assert "step 3 refers to it, but it is missing" in problem["what"]
    assert run(capsys, "convert", "--materialize", alone, root.parent / "no")[0] == 1
    assert run(capsys, "doctor", alone)[0] == 1
