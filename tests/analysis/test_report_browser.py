"""The report in a headless browser: it renders in light and dark, nothing is refused, no text overlaps, nothing is cut off."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import report_support as runs

from distckpt import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or Google Chrome")

MEASURE = """
const clash = [], out = [], root = document.documentElement;
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]).filter(t => t[1].width);
  const frame = svg.getBoundingClientRect();
  for (const [word, a] of texts) {
    if (a.left < frame.left - 2 || a.right > frame.right + 2 || a.bottom > frame.bottom + 2) out.push(word);
    for (const [other, b] of texts)
      if (word !== other && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        clash.push([word, other]);
  }
}
for (const small of document.querySelectorAll("td, th, figcaption, dd"))
  if (small.scrollWidth > small.clientWidth + 2) out.push(small.textContent);
document.body.innerHTML = ""; document.body.textContent = "MEASURED" + JSON.stringify({clash, out,
  wide: root.scrollWidth > innerWidth, shapes: SHAPES, ground: GROUND, words: WORDS}) + "END";
"""


def browse(page: Path, width: int, *flags: str) -> tuple[str, str]:
    """Return the page's document after it ran, and what the browser logged."""
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900", *flags, page.as_uri()],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.decode(), done.stderr.decode(errors="replace")


def measured(page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """Return what the browser made of a page: a copy that may run a script, with every fold open."""
    text = page.read_text(encoding="utf-8").replace("<details>", "<details open>")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*/>', "", text)
    if dark:
        text = text.replace("@media (prefers-color-scheme:dark)", "@media all")
    before = (
        'const SHAPES = document.querySelectorAll("polyline, rect").length, WORDS = document.body.innerText.length,'
        "GROUND = getComputedStyle(document.body).backgroundColor;"
    )
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(text.replace("</body>", f"<script>{before}{MEASURE}</script></body>"), encoding="utf-8")
    found = re.search(r"MEASURED(.*?)END", browse(probe, width, "--dump-dom")[0], re.DOTALL)
    assert found is not None
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("rich", 1280, False), ("rich", 500, True), ("broken", 1280, True)]
)
def test_no_text_overlaps_or_is_cut_off(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    root = getattr(runs, name)(tmp_path / name)
    more = {"compare": [runs.averaged(tmp_path / "average", root)]} if name == "rich" else {}
    write_report(root, tmp_path / "page.html", **more)  # type: ignore[arg-type]
    found = measured(tmp_path / "page.html", width, dark=dark)
    assert found["clash"] == []
    assert found["out"] == []
    assert not found["wide"]
    assert found["shapes"] >= 8
    assert found["words"] > 1000
    assert found["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_the_page_renders_and_nothing_in_it_is_refused(tmp_path: Path) -> None:
    write_report(runs.broken(tmp_path / "run"), tmp_path / "page.html")
    _, log = browse(tmp_path / "page.html", 1000, f"--screenshot={tmp_path / 'page.png'}")
    assert [line for line in log.splitlines() if "CONSOLE" in line or "Refused" in line] == []
    assert (tmp_path / "page.png").stat().st_size > 40_000  # an empty page takes a few kilobytes
    (tmp_path / "evil.html").write_text(
        (tmp_path / "page.html")
        .read_text()
        .replace("</body>", '<script>1</script><img src="http://127.0.0.1:9/x"/></body>')
    )
    _, log = browse(tmp_path / "evil.html", 1000, "--dump-dom")
    assert log.count("Content Security Policy") >= 2  # what should ever slip through is stopped
