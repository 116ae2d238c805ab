"""The command line: what each command says, its exit codes, JSON alone on standard output, and what it never imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import builders
import pytest

from distckpt.cli.listing import mark
from distckpt.cli.main import main
from distckpt.cli.output import clean, one_line, plain
from distckpt.format import names
from distckpt.format.catalog import list_checkpoints
from distckpt.format.lineage import create_generation, ensure_root, heartbeat
from distckpt.storage import open_store
from distckpt.storage.base import Store

LONG = "validation/accuracy_top5_of_held_out_documents"
SMALL = {"model.w": builders.some_tensors()["model.embed.weight"], "optim.step": builders.some_tensors()["optim.step"]}


def build(folder: Path) -> Store:
    """Steps 100..400 of generation 1 (400 a stray), 500 and 600 of generation 2 that resumed from 300; an orphan."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None, owner="first")
    for step in (100, 200, 300, 400):
        save(store, step, 1)
    builders.prepare(store, 450, 1, tensors=SMALL, nonce="abad1dea")
    create_generation(store, resumed_from=(1, 300), owner="second")
    for step in (500, 600):
        save(store, step, 2)
    return store


def save(store: Store, step: int, generation: int) -> None:
    metrics = {"loss": abs(step - 200) / 100, LONG: step / 1000}
    more: dict[str, Any] = {"objects": {"scheduler": {"last_epoch": 3}}, "rank_objects": {"rng": {"state": (1, 2)}}}
    aliases = {"model.tied": "model.w"}
    builders.build_checkpoint(
        store,
        step,
        generation,
        tensors=SMALL,
        metrics=metrics,
        epoch=step // 200,
        aliases=aliases,
        config={"width": 8},
        **more,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build(tmp_path / "root")
    return tmp_path / "root"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error) of one command."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def shard_of(root: Path, step: int, generation: int, rank: int) -> Path:
    committed = builders.Committed(step, generation, f"{names.step_folder(step)}/{names.manifest_name(generation)}")
    return root / builders.shard_paths(open_store(root), committed)[rank]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """Flip a bit of the last byte: of a tensor's data."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def marks(document: Any) -> dict[int, list[str]]:
    return {row["step"]: row["marks"] for row in document["checkpoints"]}


# ---------------------------------------------------------------- ls


def test_ls_lists_the_lineage_with_whole_names(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, out, err = run(capsys, "ls", root)
    assert code == 0
    lines = out.splitlines()
    assert LONG in lines[0]
    assert [line.split()[0] for line in lines[1:6]] == ["600", "500", "300", "200", "100"]
    assert lines[1].endswith("newest")
    assert lines[4].endswith("best")
    assert "\x1b" not in out
    assert "1 stray not listed" in err


def test_ls_all_marks_strays_and_shows_orphans(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, document = run_json(capsys, "ls", root, "--all")
    assert code == 0
    assert marks(document) == {600: ["newest"], 500: [], 300: [], 200: ["best"], 100: [], 400: ["stray"]}
    assert [attempt["folder"] for attempt in document["uncommitted"]] == ["step-0000000450/g000001-abad1dea"]
    assert "step-0000000450/g000001-abad1dea" in run(capsys, "ls", "-a", root)[1]


def test_ls_best_by_any_metric(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    _, document = run_json(capsys, "ls", root, "--metric", LONG, "--mode", "max")
    assert marks(document)[600] == ["newest", "best"]
    code, out, err = run(capsys, "ls", root, "--metric", "nonsense")
    assert (code, "best" in out) == (0, False)
    assert "nonsense" in err
    assert LONG in err


def test_ls_newest_is_what_a_job_would_resume_from(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    truncate(shard_of(root, 600, 2, 1))
    truncate(shard_of(root, 100, 1, 0))
    code, document = run_json(capsys, "ls", root)
    assert code == 1
    assert marks(document) == {600: ["damaged"], 500: ["newest"], 300: [], 200: ["best"], 100: []}
    _, document = run_json(capsys, "ls", root, "--check")
    assert marks(document)[100] == ["damaged"]
    code, out, _ = run(capsys, "ls", root)
    assert code == 1
    assert shard_of(root, 600, 2, 1).name in out


def test_ls_shows_unreadable_manifests(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    (root / names.step_folder(500) / names.manifest_name(2)).write_bytes(b"{}")
    code, document = run_json(capsys, "ls", root)
    assert code == 1
    row = next(row for row in document["checkpoints"] if row["step"] == 500)
    assert row["marks"] == ["damaged"]
    assert names.manifest_name(2) in row["problem"]
    assert run(capsys, "ls", root)[0] == 1


def test_ls_of_one_step_keeps_its_marks(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, document = run_json(capsys, "ls", root / names.step_folder(200))
    assert code == 0
    assert marks(document) == {200: ["best"]}


def test_best_ignores_strays_and_what_is_not_measured(tmp_path: Path) -> None:
    store = build(tmp_path)
    builders.build_checkpoint(store, 700, 2, tensors=SMALL, metrics={"loss": float("nan")})
    builders.build_checkpoint(store, 460, 1, tensors=SMALL, metrics={"loss": -1.0})
    rows = mark(store, list_checkpoints(tmp_path, all=True), "loss", "min")
    assert {row.info.step: row.marks for row in rows if row.marks} == {
        700: ("newest",), 200: ("best",), 400: ("stray",), 460: ("stray",),
    }  # fmt: skip


def test_json_stays_strict_with_nan(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    builders.build_checkpoint(
        open_store(root), 700, 2, tensors=SMALL, metrics={"loss": float("nan"), "x": float("inf")}
    )
    _, out, _ = run(capsys, "ls", root, "--json")

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    document = json.loads(out, parse_constant=refuse)
    assert document["checkpoints"][0]["metrics"] == {"loss": "nan", "x": "inf"}


# ---------------------------------------------------------------- show


def test_show_a_root_and_a_step(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, out, _ = run(capsys, "show", root)
    assert code == 0
    for expected in (
        "step-0000000600",
        LONG,
        "model.*",
        "float32",
        "scheduler",
        "rng",
        "step 300 of generation 1",
        '"width"',
    ):
        assert expected in out
    assert "S(0)" not in out
    code, out, _ = run(capsys, "show", root, "--step", 200, "--tensors")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("model.w "))
    assert row.split() == ["model.w", "float32", "37x16", "S(0)", "on", "2", "ranks", str(37 * 16 * 4)]
    assert "the same as model.w" in out


def test_show_json(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    _, document = run_json(capsys, "show", root / names.step_folder(400), "--tensors")
    assert document["stray"] is True
    assert document["tensors"]["model.w"] == {
        "dtype": "float32",
        "shape": [37, 16],
        "layout": "S(0) on 2 ranks",
        "nbytes": 2368,
    }
    assert [record["number"] for record in document["lineage"]] == [1]
    _, document = run_json(capsys, "show", root)
    assert (document["step"], document["tensors"], document["per_rank"]) == (600, 2, ["rng"])
    assert [record["number"] for record in document["lineage"]] == [2, 1]


def test_show_passes_over_a_damaged_newest_and_says_so(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    truncate(shard_of(root, 600, 2, 0))
    code, out, err = run(capsys, "show", root)
    assert code == 0
    assert "step-0000000500" in out
    assert "passing over step 600" in err


# ---------------------------------------------------------------- verify


def test_verify_whole(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    for mode in ("quick", "sample", "full"):
        code, document = run_json(capsys, "verify", root, "--mode", mode)
        assert (code, document["ok"], document["checkpoints"][0]["step"]) == (0, True, 600)
    code, document = run_json(capsys, "verify", root, "--all", "--mode", "full")
    assert [c["step"] for c in document["checkpoints"]] == [600, 500, 300, 200, 100, 400]
    assert (code, document["checkpoints"][-1]["stray"]) == (0, True)


def test_verify_names_file_tensor_and_rank(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    shard = shard_of(root, 600, 2, 0)
    flip(shard)
    assert run(capsys, "verify", root)[0] == 0  # quick reads no data
    code, out, _ = run(capsys, "verify", root, "--mode", "full")
    assert code == 1
    problem = next(line for line in out.splitlines() if shard.name in line)
    assert "rank 0" in problem
    assert "tensor " in problem
    code, document = run_json(capsys, "verify", root, "--all", "--mode", "full")
    assert (code, [c["step"] for c in document["checkpoints"] if not c["ok"]]) == (1, [600])


def test_verify_does_not_pass_over_a_damaged_newest(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    (root / names.step_folder(600) / names.manifest_name(2)).write_bytes(b"{}")
    code, document = run_json(capsys, "verify", root)
    assert (code, document["checkpoints"][0]["step"]) == (1, 600)
    assert run(capsys, "verify", root, "--step", 500)[0] == 0


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
    truncate(shard_of(root, 600, 2, 0))
    _, document = run_json(capsys, "gc", root, "--keep-last", 3)
    assert [c["step"] for c in document["removed"]] == [100]
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
        "heavy = {'torch', 'numpy', 'safetensors'} & set(sys.modules); sys.exit(f'{code} {heavy}' if code or heavy else 0)"
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
        [sys.executable, "-c", program, "ls", str(root)], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
