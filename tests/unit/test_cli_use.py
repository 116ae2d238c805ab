"""gc, pin and doctor from the command line; wrong use and errors; output for terminals; what is never imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import builders
import pytest
from cli_support import LONG, SMALL, build, marks, run, run_json, save, shard_of, truncate

from distckpt.cli.main import main
from distckpt.cli.output import clean, one_line, plain
from distckpt.format import names
from distckpt.format.catalog import list_checkpoints
from distckpt.format.lineage import heartbeat
from distckpt.storage import open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build(tmp_path / "root")
    return tmp_path / "root"


# ---------------------------------------------------------------- gc, pin


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def steps(root: Path) -> set[int]:
    return {info.step for info in list_checkpoints(root, all=True)}


def test_gc_is_a_dry_run_unless_told(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    before = tree(root)
    code, out, _ = run(capsys, "gc", root, "--keep-last", 2, "--grace", 0)
    assert code == 0
    assert "would be removed" in out
    assert "step-0000000100" in out
    assert tree(root) == before
    code, document = run_json(capsys, "gc", root, "--keep-last", 2, "--grace", 0, "--yes")
    assert code == 0
    # 300 is what the last job resumed from, 200 the best, 400 a stray: no rule speaks of those.
    assert [c["step"] for c in document["removed"]] == [100]
    assert document["orphans_removed"] == ["step-0000000450/g000001-abad1dea"]
    assert steps(root) == {200, 300, 400, 500, 600}


def test_gc_rules_combine(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    def gone(*rules: object) -> list[int]:
        return [c["step"] for c in run_json(capsys, "gc", root, *rules)[1]["removed"]]

    assert gone() == []
    assert gone("--keep-last", 2, "--keep-every", 100) == []
    assert gone("--keep-best", LONG, "--mode", "min") == []  # 100 by the rule, 200 by the run's own metric
    assert gone("--keep-best", LONG, "--mode", "max") == [100]
    assert gone("--keep-last", 2, "--strays") == [100, 400]
    assert run(capsys, "gc", root, "--mode", "max")[0] == 2


def test_gc_leaves_what_a_running_job_wrote(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    store = open_store(root)
    for step in (700, 800, 900):
        save(store, step, 2)
    heartbeat(store, 2)
    _, document = run_json(capsys, "gc", root, "--keep-last", 2)
    assert [c["step"] for c in document["removed"]] == [100]
    assert "running job" in document["reasons"][f"{names.step_folder(600)}/{names.manifest_name(2)}"]


def test_gc_damaged_ones_take_no_place_of_whole_ones(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    save(open_store(root), 50, 1)
    truncate(shard_of(root, 600, 2, 0))
    _, document = run_json(capsys, "gc", root, "--keep-last", 4)
    assert [c["step"] for c in document["removed"]] == [50]
    assert "damaged" in document["reasons"][f"{names.step_folder(600)}/{names.manifest_name(2)}"]


def test_pin_and_unpin(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert run(capsys, "pin", root, "--step", 100)[0] == 0
    assert marks(run_json(capsys, "ls", root)[1])[100] == ["pinned"]
    assert run_json(capsys, "gc", root, "--keep-last", 2)[1]["removed"] == []
    assert run_json(capsys, "unpin", root / names.step_folder(100))[1]["pinned"] is False
    assert marks(run_json(capsys, "ls", root)[1])[100] == []
    assert run(capsys, "pin", root)[0] == 2
    assert run(capsys, "pin", root, "--step", 101)[0] == 1


# ---------------------------------------------------------------- doctor


def test_doctor_exit_codes(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, out, _ = run(capsys, "doctor", root)
    assert code == 0
    assert "0 problems" in out
    truncate(shard_of(root, 600, 2, 0))
    code, document = run_json(capsys, "doctor", root)
    assert (code, document["ok"]) == (1, False)
    assert any(f["check"] == "damage" for f in document["findings"])


# ---------------------------------------------------------------- errors and wrong use


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "{root}/nowhere"], 1),
        (["show", "{root}", "--step", "7"], 1),
        (["verify", "{root}", "--step", "7"], 1),
        (["gc", "{root}/step-0000000100"], 2),
        (["ls", "ftp://host/x"], 2),
        (["ls", "{root}", "--mode", "up"], 2),
        (["verify", "{root}", "--mode", "deep"], 2),
        (["show", "{root}/step-0000000100", "--step", "200"], 2),
    ],
)
def test_errors_are_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str], code: int
) -> None:
    found, out, err = run(capsys, *(argument.format(root=root) for argument in arguments))
    assert found == code
    assert out == ""
    assert err.startswith("distckpt: error: ")
    assert err.count("\n") == 1


def test_empty_folders_and_foreign_folders_are_not_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["ls"], ["show"], ["verify"], ["gc", "--yes"]):
        assert run(capsys, *command, tmp_path)[0] == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["nonsense"], ["ls"], ["ls", "a", "b"], ["gc", "x", "--keep-last", "0"], []])
def test_wrong_use(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_debug_shows_where_an_error_came_from(root: Path) -> None:
    with pytest.raises(Exception, match="no such folder"):
        main(["ls", str(root / "nowhere"), "--debug"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("ls", "show", "verify", "gc", "doctor", "pin", "unpin"))
    assert run(capsys, "ls", "--help")[0] == 0
    assert run(capsys, "--version")[1].startswith("distckpt ")


# ---------------------------------------------------------------- output


def test_hostile_names_reach_the_terminal_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = open_store(tmp_path)
    builders.build_checkpoint(
        store, 1, tensors={"model.\x1b[31m[bold]": SMALL["model.w"]}, metrics={"a\x1b]0;x\x07": 1.0}
    )
    for command in (["ls"], ["show", "--tensors"], ["verify"]):
        _, out, _ = run(capsys, *command, tmp_path)
        assert "\x1b" not in out
        assert "\x07" not in out
    assert "model.\\x1b[31m[bold]" in run(capsys, "show", "--tensors", tmp_path)[1]


def test_text_helpers() -> None:
    assert clean("a\tb\x1b\u202e") == "a\\tb\\x1b\\u202e"
    assert one_line("a\n  b\r\nc") == "a b c"
    assert plain({1: (float("-inf"), b"x")}) == {"1": ["-inf", "b'x'"]}


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["ls", "--all", "--metric", "loss"],
        ["show", "--tensors"],
        ["verify", "--mode", "full"],
        ["gc"],
        ["doctor"],
    ],
)
def test_nothing_heavy_is_imported(root: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from distckpt.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'safetensors', 'obstore'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    command = [sys.executable, "-c", program, *arguments, str(root)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_ls_does_not_wait_for_typer(root: Path) -> None:
    program = "import sys; from distckpt.cli.main import main; main(sys.argv[1:]); sys.exit('typer' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, "ls", str(root)], capture_output=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_traceback(root: Path) -> None:
    program = "import sys; from distckpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program, "ls", str(root)],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
