"""The commands that look: what ls, show and verify say, their exit codes and their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import builders
import msgspec
import pytest
from cli_support import LONG, SMALL, build, flip, marks, run, run_json, shard_of, truncate

from distckpt.cli.listing import mark
from distckpt.format import names
from distckpt.format.catalog import list_checkpoints
from distckpt.format.commit import commit
from distckpt.storage import open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build(tmp_path / "root")
    return tmp_path / "root"


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
    truncate(shard_of(root, 200, 1, 0))
    truncate(shard_of(root, 100, 1, 0))
    code, document = run_json(capsys, "ls", root)
    assert code == 1
    assert marks(document) == {600: ["damaged"], 500: ["newest"], 300: [], 200: ["best", "damaged"], 100: []}
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


def test_best_is_by_default_what_the_run_calls_best(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    store = open_store(root)
    manifest = builders.prepare(store, 700, 2, tensors=SMALL, metrics={"accuracy": 0.5})
    settings = {"metric_name": LONG, "metric_mode": "max"}
    commit(store, msgspec.structs.replace(manifest, provenance={"resumed_from": None, "settings": settings}))
    _, document = run_json(capsys, "ls", root)
    assert (document["metric"], document["mode"], marks(document)[600]) == (LONG, "max", ["best"])
    assert LONG in run(capsys, "show", root)[1]


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
