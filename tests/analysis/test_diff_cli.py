"""``distckpt diff`` as it is typed, and its page: by its structure, and in a browser where there is one."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cli_support import run, run_json
from diff_support import saved, weights, written

from distckpt import diff_checkpoints
from distckpt.analysis import diff_html
from distckpt.analysis.diff import Diff
from distckpt.analysis.diff_html import Scale, diff_page, heat_maps, place_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "model.<script>alert(1)</script>.w\x1b[31m"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Twelve layers, of which the third did not change, a tensor on one side only, NaN, and another learning rate."""
    rng = np.random.default_rng(0)
    x = {
        f"model.layers.{i}.{k}.weight": rng.standard_normal((6, 5)).astype(np.float32) for i in range(12) for k in "qv"
    }
    x |= {"model.embed.weight": rng.standard_normal((9, 5)), "optim.state.embed.weight.exp_avg": np.ones((9, 5))}
    x["model.layers.0.q.weight"][0, 0] = 1.0
    y = {name: value + 10.0 ** -(1 + index % 4) for index, (name, value) in enumerate(x.items())}
    y["model.layers.3.q.weight"] = x["model.layers.3.q.weight"]
    y["model.layers.0.q.weight"] = np.full((6, 5), np.nan, np.float32)
    y = {name: value.astype(x[name].dtype) for name, value in y.items()}
    y[NASTY] = np.ones(2, np.float32)
    groups = [{"lr": 0.1}], [{"lr": 0.2}]
    return tuple(  # type: ignore[return-value]
        saved(tmp_path / n, t, step=s, world=w, cut=c, objects={"optim.param_groups": g})
        for n, t, s, w, c, g in (("a", x, 1, 2, "rows", groups[0]), ("b", y, 2, 3, "columns", groups[1]))
    )


# ---------------------------------------------------------------- the command


def test_text(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "diff", *pair, "--top", 5)
    assert (code, err) == (1, "")
    assert "different: 25 of 26 tensors differ; 1 only in B; 2 other values differ" in out
    assert "(distckpt, step 2, 27 tensors," in out
    assert re.search(r"problem +NaN or infinite where it was not before +model.layers.0.q.weight", out)
    assert re.search(r"warning +changed, though the optimizer holds no state .* and 20 more", out)
    assert re.search(r"optimizer +param_groups\[0\]\.lr +0\.1 +0\.2", out)
    assert re.search(r"S\(0\) on 2 ranks +S\(1\) on 3 ranks +26", out)
    assert "... and 20 more (--top 0)" in out
    assert "\x1b" not in out
    assert "\\x1b[31m" in out
    assert len(run(capsys, "diff", *pair, "--top", 0)[1].splitlines()) > len(out.splitlines()) + 15


def test_json_and_exit_codes(tmp_path: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run_json(capsys, "diff", *pair)
    assert (code, document["equal"]) == (1, False)
    assert document["only_b"] == [NASTY]
    rows = {row["name"]: row for row in document["tensors"]}
    assert rows["model.layers.1.q.weight"]["change"]["histogram"]
    assert rows["model.layers.0.q.weight"]["relative_update"] == "nan"
    assert document["values"][0]["section"] == "checkpoint"
    assert run(capsys, "diff", pair[0], pair[0])[0] == 0
    exported = written(tmp_path / "hf", "huggingface", weights())
    other = saved(tmp_path / "c", weights())
    code, out, _ = run(capsys, "diff", tmp_path / "c", exported)
    assert (code, "equal: 5 tensors" in out, "not compared" in out) == (0, True, True)
    assert run(capsys, "diff", other, exported, "--step-a", 1, "--weights")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--only", "x*"], 2, "neither checkpoint has a tensor"),
        (["--frozen", "nothing"], 2, "is the name of no tensor"),
        (["--rtol", "-1"], 2, "not negative"),
        (["--html", "page.txt"], 2, "ends in .html"),
        (["--html", "no/such/folder/x.html"], 2, "in a folder that is there"),
        (["--prefix-b", "ema."], 1, "no tensor's name starts with 'ema.'"),
        (["--step-a", "77"], 1, "77"),
    ],
)
def test_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    saved(tmp_path / "a", weights())
    found, _, err = run(capsys, "diff", tmp_path / "a", tmp_path / "a", *arguments)
    assert (found, text in err) == (code, True), err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (code, "no such file or folder" in err) == (1, True), err


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """A page's tags, and of each table with the class ``heat`` its rows: (text, attributes) of each cell."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.heat: list[list[list[tuple[str, dict[str, str | None]]]]] = []
        self._inside = False
        self._cell = False
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self._inside = ("class", "heat") in attrs
            if self._inside:
                self.heat.append([])
        elif self._inside and tag == "tr":
            self.heat[-1].append([])
        elif self._inside and tag in ("td", "th"):
            self.heat[-1][-1].append(("", dict(attrs)))
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._inside and self._cell:
            text, attributes = self.heat[-1][-1][-1]
            self.heat[-1][-1][-1] = (text + data, attributes)


def test_the_heat_map_has_a_row_for_each_layer(pair: tuple[str, str]) -> None:
    found = diff_checkpoints(*pair)
    document = diff_page(found).decode()
    page = Page(document)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not re.search(r"(?:src|href)=\"(?!#)", document)
    first, second = page.heat
    assert [text for text, _ in first[0]] == ["", "q.weight", "v.weight", "w\\x1b[31m", "weight"]
    rows = {row[0][0]: row[1:] for row in first[1:]}
    layers = [f"layers.{i}" for i in range(12)]
    assert list(rows) == ["<script>alert(1)</script>", "embed", *layers]
    assert rows["layers.0"][0][0] == "NaN/Inf"
    assert rows["layers.3"][0][0] == "0"
    assert rows["layers.3"][0][1]["data-share"] == "0"
    assert rows["<script>alert(1)</script>"][2][0] == "only B"
    shares = {layer: int(rows[layer][1][1]["data-share"] or 0) for layer in layers}
    updates = {t.name: t.relative_update for t in found.tensors}
    order = sorted(layers, key=lambda layer: updates[f"model.{layer}.v.weight"] or 0)
    assert sorted(shares.values()) == [shares[layer] for layer in order]
    assert shares[order[0]] < 50 < shares[order[-1]]
    assert [row[0][0] for row in second[1:]] == ["embed"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_and_asks_for_nothing(
    tmp_path: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "x.html"
    assert run(capsys, "diff", *pair, "--html", page)[0] == 1
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0
    assert not re.search(r"CONSOLE|Refused to|ERR_", done.stderr), done.stderr
    shown = Page(done.stdout)
    assert len(shown.heat) == 2
    assert "script" not in shown.tags
    assert [row[0][0] for row in shown.heat[0][1:]][-1] == "layers.11"
    assert "<h2>Suspicious</h2>" in done.stdout


def test_an_equal_pair_and_a_long_one_have_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_html, "ROWS", 20)
    x = {f"model.layers.{i}.w": np.zeros(2, np.float32) for i in range(25)}
    y = {name: value + 1 for name, value in x.items()}
    a, b = saved(tmp_path / "a", x, world=1), saved(tmp_path / "b", y, world=1)
    same = diff_page(diff_checkpoints(a, a)).decode()
    assert "equal: 25 tensors, 25 of them by their digests alone" in same
    assert {cell[0] for row in Page(same).heat[0][1:] for cell in row[1:]} == {"0"}
    long = diff_page(diff_checkpoints(a, b)).decode()
    assert "… and 5 more" in html.unescape(long)
    assert {cell[0] for row in Page(long).heat[0][1:] for cell in row[1:]} == {"∞"}
    nothing = diff_page(diff_checkpoints(saved(tmp_path / "c", {"model.s": np.array(1.0)}), b)).decode()
    assert "only in A" in nothing


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up.weight", ("weights", "layers.3", "mlp.up.weight")),
        ("model.bert.layer.11.attention.query.bias", ("weights", "bert.layer.11", "attention.query.bias")),
        ("model.layers.2.experts.7.w1", ("weights", "layers.2", "experts.7.w1")),
        ("model.embed.weight", ("weights", "embed", "weight")),
        ("model.scale", ("weights", "", "scale")),
        ("model.0.weight", ("weights", "0", "weight")),
        ("optim.state.layers.3.w.exp_avg", ("exp_avg", "layers.3", "w")),
        ("ema.head.bias", ("ema", "head", "bias")),
    ],
)  # fmt: skip
def test_places_in_the_heat_map(name: str, place: tuple[str, str, str]) -> None:
    assert place_of(name) == place


def test_shades() -> None:
    scale = Scale.of([1e-6, 1e-2, 0.0, float("inf")])
    assert [scale.share(v) for v in (0.0, 1e-6, 1e-4, 1e-2, float("inf"))] == [0, 12, 56, 100, 100]
    assert Scale.of([]).share(0.0) == 0
    assert Scale.of([0.5]).share(0.5) == 100


def test_no_cell_is_lost(pair: tuple[str, str]) -> None:
    found: Diff = diff_checkpoints(*pair)
    cells = sum(len(part.cells) for part in heat_maps(found))
    assert cells == len(found.tensors) + len(found.only_a) + len(found.only_b)
