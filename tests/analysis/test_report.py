"""The report of a run: what it says, of whom, and that nothing stored can break it or lead out of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import report_support as runs
from cli_support import run as command
from test_page import Tags

from distckpt import write_report
from distckpt.analysis import norms, scores
from distckpt.analysis.history import starts, timings
from distckpt.analysis.reading import RunReader
from distckpt.errors import CheckpointNotFound, ConfigError, MissingExtra
from distckpt.format import names
from distckpt.storage import open_store


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("runs")
    made = {name: getattr(runs, name)(top / name) for name in ("tiny", "rich", "broken")}
    return {**made, "average": runs.averaged(top / "average", made["rich"])}


def read(root: Path, out: Path, **options: object) -> Tags:
    write_report(root, out, **options)  # type: ignore[arg-type]
    return Tags(out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the page as such


@pytest.mark.parametrize("name", ["tiny", "rich", "broken"])
def test_nothing_leads_out_of_the_page(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    page = read(roots[name], tmp_path / "page.html")
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form", "image", "use")
        assert not {"src", "srcset", "action", "xlink:href", "background"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert all("url(" not in (value or "") and "//" not in (value or "") for value in attributes.values())
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "page.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|//", style[1])
    assert "prefers-color-scheme:dark" in style[1]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"] for tag, a in page.tags if tag == "a"} == {f"#{id}" for id in ids}


def test_names_with_markup_in_them_are_text(roots: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    page = read(roots["broken"], tmp_path / "page.html", png=tmp_path / "page.png")
    assert page.words.count(runs.NASTY) >= 5  # the metric's chart, trouble, host and owner
    assert "script" not in {tag for tag, _ in page.tags}
    assert (tmp_path / "page.png").stat().st_size > 10_000


# ---------------------------------------------------------------- what it says


def test_a_single_checkpoint_without_metrics(roots: dict[str, Path], tmp_path: Path) -> None:
    report = write_report(roots["tiny"], tmp_path / "page.html")
    assert report.ok
    assert report.troubles == ()
    assert report.sections == ("troubles", "saves", "lineage", "norms", "storage", "settings")
    words = Tags((tmp_path / "page.html").read_text(encoding="utf-8")).words
    for said in (
        "Nothing: every manifest is whole",
        "was not recorded",
        "cannot be told",
        "1 whole",
        "step 10",
        "fresh",
    ):
        assert said in words


def test_curves_carry_saved_best_averaged_and_chosen_checkpoints(roots: dict[str, Path], tmp_path: Path) -> None:
    page = read(
        roots["rich"],
        tmp_path / "page.html",
        compare=[roots["average"]],
        by="max recall_negative, then earliest",
        data="validation",
    )
    words = page.words
    for name in ("val_loss", "accuracy", "train_loss", "lr", "grad_norm"):
        assert name in words
    assert words.count("saved: step 100, epoch 1") == 5
    assert words.count("member of an average: step 500, epoch 5") == 5
    assert words.count("member of an average: step 300") == 0
    assert words.count("best (lowest val_loss): step 600") == 5
    assert words.count("chosen by the rule: step 600") == 5
    assert "job start 2 goes on from step 300" in words
    assert "20 logged rows of steps that were done again" in words


def test_candidates_are_side_by_side_with_counts_and_intervals(roots: dict[str, Path], tmp_path: Path) -> None:
    rule = "max recall_negative, then earliest"
    words = read(roots["rich"], tmp_path / "page.html", compare=[roots["average"]], by=rule, data="validation").words
    assert "Chosen: step 600." in words
    assert "average of 3 (average, step 600)" in words
    assert "0.9250" in words  # 74 of 80
    assert "74/80" in words
    assert "0.846 to 0.965" in words  # Wilson's, as any table of it says
    assert words.index("On validation (400 rows)") < words.index(
        "On test (400 rows)"
    )  # the one that was chosen on first
    for chart in ("recall of each class", "precision of each class", "f1 of each class", "macro_f1"):
        assert words.count(chart) >= 2
    assert "Bands: Wilson" in words
    assert "74" in words
    assert "92.5%" in words  # the confusion matrix' share of the class


def test_a_mean_of_one_checkpoint_is_no_candidate_of_its_own(roots: dict[str, Path], tmp_path: Path) -> None:
    alone = runs.averaged(tmp_path / "soup", roots["rich"], (500,))
    rule = "max accuracy, then earliest"  # by which the step would be as good, and the mean of it earlier in the list
    words = read(
        roots["rich"], tmp_path / "page.html", compare=[alone, roots["average"]], by=rule, data="validation"
    ).words
    assert "average of 3 (average, step 600)" in words
    assert "average of 1" not in words
    assert "(soup, step 500)" not in words


def test_without_the_library_for_intervals_that_is_said(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "statsmodels.stats.proportion", None)
    words = read(roots["rich"], tmp_path / "page.html").words
    assert "No intervals: statsmodels.stats.proportion cannot be imported" in words
    assert "Bands: Wilson" not in words
    assert "74/80" in words


def test_everything_that_is_broken_is_told(roots: dict[str, Path], tmp_path: Path) -> None:
    report = write_report(roots["broken"], tmp_path / "page.html")
    assert not report.ok
    told = [f"{trouble.kind}: {trouble.text}" for trouble in report.troubles]
    for said in (
        "bad: metrics are lost: metrics/g000002-000001.json",
        "bad: step 500 of job start 2 is damaged: step-0000000500/g",
        "bad: step 700 of job start 3 is damaged: step-0000000700/manifest-g000003.json",
        "bad: job start 3 has no record",
        "warning: a save of step 450 by job start 1 was never committed: 2 files",
        "warning: a save of step 700 by job start 3 may be committed",
        "warning: step 500 was committed by attempt 3: 2 tries before it failed",
        "warning: job start 2 on b went on from step 200 although newer saves were there, steps 300, 400",
        "warning: val_loss is not finite (NaN or infinite) at step 200",
        "note: committed outside the lineage, never resumed from (strays): steps 300, 400",
    ):
        assert any(line.startswith(said) for line in told), said
    assert any("never said that it ended" in line for line in told)
    words = Tags((tmp_path / "page.html").read_text(encoding="utf-8")).words
    assert all(trouble.text in words for trouble in report.troubles)
    assert "3 whole, 2 stray, 2 damaged" in words


def test_a_damaged_block_is_found_where_norms_read_it(tmp_path: Path) -> None:
    root = runs.tiny(tmp_path / "run")
    shard = next(root.glob("step-*/g*/00000-of-00002.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4000] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    assert write_report(root, tmp_path / "page.html", compute_norms=False).ok
    report = write_report(root, tmp_path / "page.html", compute_norms=True)
    assert [trouble.kind for trouble in report.troubles] == ["bad"]
    assert "weights cannot be read" in report.troubles[0].text


def test_ten_thousand_points_make_a_small_page(tmp_path: Path) -> None:
    root = runs.tiny(tmp_path / "run")
    rows = [(step, 1e9 + step, {"loss": 99.0 if step == 6789 else math.exp(-step / 5000)}) for step in range(1, 10_001)]
    for part in range(10):
        runs.log_metrics(open_store(root), 1, part, rows[part * 1000 : (part + 1) * 1000])
    report = write_report(root, tmp_path / "page.html")
    page = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    line = max((str(a["points"]) for tag, a in page.tags if tag == "polyline"), key=len)
    assert 300 < len(line.split()) <= 400
    assert "highest 99.00 at 6789" in page.words or "lowest" in page.words
    top = min(float(point.split(",")[1]) for point in line.split())
    assert top < 30  # the spike of one step is still there
    assert report.nbytes < 60_000


# ---------------------------------------------------------------- what records imply


def test_timings_follow_from_what_is_stored(tmp_path: Path) -> None:
    root = tmp_path / "run"
    store = open_store(runs.tiny(root))
    now = runs.clock.now()
    rows = [(step, now - 40 + step + (2.5 if step > 20 else 0), {"loss": 1.0}) for step in range(1, 31)]
    runs.log_metrics(store, 1, 1, rows)
    runs.commit(store, 20)
    found = {timing.step: timing for timing in timings(RunReader(root).read())}
    assert found[20].held_up_s == pytest.approx(2.5, abs=0.01)
    assert found[20].usual_s == pytest.approx(1.0, abs=0.01)
    assert found[20].seconds == pytest.approx(20, abs=3)
    assert found[10].held_up_s == pytest.approx(0.0, abs=0.01)
    assert not found[20].coarse


def test_a_copied_folder_is_not_trusted_for_times(roots: dict[str, Path], tmp_path: Path) -> None:
    import os
    import shutil

    shutil.copytree(roots["tiny"], tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("manifest-*"):
        os.utime(path, (1, 1))
    assert [timing.coarse for timing in timings(RunReader(tmp_path / "copy").read())] == [True]


def test_job_starts_say_what_was_lost(roots: dict[str, Path]) -> None:
    first, second = starts(RunReader(roots["rich"]).read())
    assert (first.last_step, first.redone, first.saves) == (320, 20, 3)
    assert (second.resumed_from, second.last_step, second.redone) == ((1, 300), 600, 0)
    assert second.passed_over == ()
    fallback = starts(RunReader(roots["broken"]).read())[1]
    assert [save.step for save in fallback.passed_over] == [300, 400]


def test_a_reader_reads_again_only_what_is_new(roots: dict[str, Path]) -> None:
    reader = RunReader(roots["rich"])
    first = reader.read()
    before = reader.store.counters["bytes_read"]
    second = reader.read()
    assert reader.store.counters["bytes_read"] - before < 2000  # the two records of job starts, the root's file
    assert (first.saves, first.rows, first.storage) == (second.saves, second.rows, second.storage)


# ---------------------------------------------------------------- norms


def test_norms_are_those_of_numpy_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(norms, "PIECE", 1000)  # several pieces of each tensor, the last one short
    root = runs.rich(tmp_path / "run", epochs=3)
    reader = RunReader(root)
    found, problems = norms.weight_norms(reader.read())
    assert problems == []
    flat = {
        step: np.concatenate(
            [a.astype(np.float64).ravel() for n, a in runs.weights(step).items() if n.startswith("model.")]
        )
        for step in (100, 200, 300)
    }
    assert [one.step for one in found] == [100, 200, 300]
    for one in found:
        assert one.weight == pytest.approx(float(np.linalg.norm(flat[one.step])), rel=1e-12)
        if one.since is not None:
            assert one.update == pytest.approx(float(np.linalg.norm(flat[one.step] - flat[one.since])), rel=1e-12)
    assert math.isnan(found[0].update)
    assert set(found[0].layers) == {"embed", "layers.0", "layers.1"}
    again = RunReader(root)
    run = again.read()
    before = again.store.counters["bytes_read"]
    kept, _ = norms.weight_norms(run, compute=True)
    assert [(one.step, one.weight) for one in kept] == [(one.step, one.weight) for one in found]
    assert again.store.counters["bytes_read"] - before < 2000  # what was kept, no tensor
    runs.commit(open_store(root), 400)
    more, _ = norms.weight_norms(RunReader(root).read(), compute=False)
    assert [one.step for one in more] == [100, 200, 300]


def test_norms_of_tensors_that_changed_their_shape_are_not_made_up(tmp_path: Path) -> None:
    import numpy as np

    store = open_store(runs.tiny(tmp_path / "run"))
    runs.commit(store, 20, tensors={"model.w": np.ones((4, 4), np.float32)})
    runs.commit(store, 30, tensors={"model.w": np.ones((2, 4), np.float32)})
    found, _ = norms.weight_norms(RunReader(tmp_path / "run").read())
    assert [math.isnan(one.update) for one in found] == [True, True, True]
    assert [one.weight for one in found[1:]] == [4.0, pytest.approx(math.sqrt(8))]


def test_a_report_changes_nothing_but_remembers_norms(roots: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(roots["tiny"], root)
    for path in root.rglob("*.norms"):
        path.unlink()
    before = {path for path in root.rglob("*") if path.is_file()}
    write_report(root, tmp_path / "page.html", compute_norms=False)
    assert {path for path in root.rglob("*") if path.is_file()} == before
    write_report(root, tmp_path / "page.html")
    (new,) = {path for path in root.rglob("*") if path.is_file()} - before
    assert new.parent.name == names.EVALUATIONS
    assert new.suffix == ".norms"


# ---------------------------------------------------------------- the picture


def test_the_charts_as_a_picture(roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    monkeypatch.setattr(scores, "all_charts", lambda candidates: [])  # a dozen more of the same
    report = write_report(roots["rich"], tmp_path / "page.html", png=tmp_path / "page.png")
    assert report.png == str(tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > 1200
    assert height > 1200


def test_without_matplotlib_the_page_is_written_and_the_picture_names_the_extra(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"distckpt\[plots\]"):
        write_report(roots["rich"], tmp_path / "page.html", png=tmp_path / "page.png")
    assert (tmp_path / "page.html").exists()


# ---------------------------------------------------------------- the command


def test_the_command(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "report", roots["rich"])
    assert (code, out) == (0, "rich-report.html\n")
    assert (tmp_path / "rich-report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    code, out, _ = command(capsys, "report", roots["broken"], "-o", "b.html", "--json", "--no-norms")
    assert code == 1
    assert json.loads(out)["page"] == "b.html"
    assert {trouble["kind"] for trouble in json.loads(out)["troubles"]} == {"bad", "warning", "note"}
    code, out, _ = command(capsys, "report", roots["broken"], "-o", "b.html")
    assert code == 1
    assert "damaged: step 500" in out
    assert command(capsys, "report", tmp_path / "nothing")[0] == 1
    assert command(capsys, "report", roots["rich"] / names.step_folder(100))[0] == 2
    assert command(capsys, "report", roots["rich"], "--data", "validation")[0] == 2


def test_what_cannot_be_compared_is_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match="neither checkpoints nor results"):
        write_report(roots["rich"], tmp_path / "page.html", compare=[tmp_path / "empty"])
    with pytest.raises(ConfigError, match="this is a step"):
        write_report(roots["rich"], tmp_path / "page.html", compare=[roots["rich"] / names.step_folder(100)])
    with pytest.raises(ConfigError):
        write_report(roots["rich"], tmp_path / "page.html", by="best of all")
