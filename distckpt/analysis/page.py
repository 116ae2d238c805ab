"""A self-contained HTML page: markup that escapes what it is given, tables, sections, one style sheet.

Nothing is fetched and nothing runs: no link leaves the page, there is no script, and a content security policy forbids both.
Colours are CSS variables (``--c1`` … ``--c6`` tell series apart also for the colour-blind) with a light and a dark set.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from distckpt import __version__, clock

SERIES_COLOURS: Final = 6
"""How many colours tell series apart: ``var(--c1)`` to ``var(--c6)``; also use dashes or labels."""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VOID: Final = frozenset({"meta", "br", "hr", "line", "rect", "circle", "path", "polyline", "polygon", "use"})
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


class Html(str):
    """Markup that may be inserted as it is; every other value is escaped."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return a value as markup: escaped, and characters that do not print (stored names may be hostile) spelled out."""
    if isinstance(value, Html):
        return value
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )
    return Html(html.escape(shown, quote=True))


def join(parts: Iterable[object]) -> Html:
    """Return markup one after the other; what is none is escaped, None is left out."""
    return Html("".join(text(part) for part in parts if part is not None))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return ``<tag …>children</tag>``; children and values are escaped unless they are ``Html``.

    ``class_`` becomes ``class``, other underscores become hyphens (``stroke_width``). A value of None or False leaves the
    attribute out, True gives it no value; floats are written short.
    """
    given = "".join(
        _attribute(name, value) for name, value in attributes.items() if value is not None and value is not False
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"attribute {name!r}")
    if value is True:
        return f" {name}"
    return f' {name}="{text(f"{value:.6g}" if isinstance(value, float) else value)}"'


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page with a heading; ``id`` is where the page's contents point."""

    id: str
    title: str
    body: Html


@dataclass(frozen=True, slots=True)
class Head:
    """A table's column. ``number``: right-aligned, digits of one width. ``hint`` shows when the pointer rests on it."""

    title: str
    number: bool = False
    hint: str | None = None


def paragraph(*children: object, kind: str | None = None) -> Html:
    """Return a paragraph; ``kind`` is ``note`` (small), ``warning`` or ``bad`` (with a mark, not by colour alone)."""
    return element("p", *children, class_=kind)


def table(heads: Sequence[Head], rows: Iterable[Sequence[object]], *, caption: object = None) -> Html:
    """Return a table that scrolls by itself where it is wider than the page. A cell may be ``Html``."""
    title = [
        element("th", head.title, class_="n" if head.number else None, title=head.hint, scope="col") for head in heads
    ]
    body = [
        element(
            "tr",
            *(element("td", cell, class_="n" if head.number else None) for head, cell in zip(heads, row, strict=True)),
        )
        for row in rows
    ]
    above = None if caption is None else element("caption", caption)
    whole = element("table", above, element("thead", element("tr", *title)), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex=0)


def details(summary: object, *children: object, open_: bool = False) -> Html:
    """Return what is shown when the summary is clicked."""
    return element("details", element("summary", summary), *children, open=open_)


def figure(drawing: Html, caption: object = None) -> Html:
    """Return a drawing with its caption above it."""
    return element("figure", None if caption is None else element("figcaption", caption), drawing)


def grid(figures: Iterable[Html]) -> Html:
    """Return figures side by side, as many in a row as the page's width takes."""
    return element("div", *figures, class_="grid")


def badge(word: str, kind: str = "") -> Html:
    """Return a short word in a frame; ``kind`` is ``good``, ``warning``, ``bad`` or nothing."""
    return element("span", word, class_=f"badge {kind}".strip())


def tiles(facts: Iterable[tuple[str, object]]) -> Html:
    """Return (name, value) pairs as the figures at the top of a page."""
    each = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element("dl", *each, class_="tiles")


# ---------------------------------------------------------------- the page


def page(title: str, sections: Sequence[Section], *, lead: object = "") -> str:
    """Return the whole document: title, ``lead`` below it, contents, sections."""
    contents = element("nav", *(element("a", s.title, href=f"#{s.id}") for s in sections), aria_label="Contents")
    body = [element("section", element("h2", s.title), s.body, id=s.id) for s in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    end = element(
        "footer", f"Written by distckpt {__version__} at {clock.utc_text().replace('T', ' ').removesuffix('Z')} UTC."
    )
    main = element("main", element("h1", title), lead, contents if len(sections) > 1 else None, *body, end)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n"


def encoded(document: str) -> bytes:
    """Return a page's bytes; a name that is no valid Unicode is shown escaped."""
    return document.encode("utf-8", "backslashreplace")


_LIGHT: Final = (
    "--bg:#fff;--panel:#f6f7f9;--text:#1b1f24;--soft:#57606a;--line:#d5dae0;--grid:#e7eaee;--good:#1a7f37;--warn:#8a5a00;"
    "--bad:#b42318;--c1:#0067a5;--c2:#c65102;--c3:#00795a;--c4:#a33b8c;--c5:#7a6a00;--c6:#4d5b6b;--heat:#0067a5;--on-heat:#fff"
)
_DARK: Final = (
    "--bg:#14171b;--panel:#1d2127;--text:#e6e8eb;--soft:#a3abb5;--line:#3a414a;--grid:#2a3037;--good:#5fcf80;--warn:#e3b341;"
    "--bad:#ff8278;--c1:#5ab4f0;--c2:#f28e52;--c3:#3fc9a0;--c4:#e08fd0;--c5:#d6c14f;--c6:#a9b6c6;--heat:#5ab4f0;--on-heat:#0b0d10"
)
STYLE: Final = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{color-scheme:light;{_LIGHT}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
main{{max-width:1280px;margin:0 auto;padding:24px clamp(12px,3vw,40px) 48px}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}}
h2{{font-size:1.2rem;margin:0 0 10px;padding-top:18px;border-top:1px solid var(--line)}}
h3{{font-size:1rem;margin:20px 0 6px;overflow-wrap:anywhere}}
section{{margin-top:26px}}
p{{margin:6px 0;max-width:80ch;overflow-wrap:anywhere}}
.note,figcaption small,footer{{color:var(--soft);font-size:.87rem}}
.warning,.bad{{border-left:4px solid var(--warn);padding:4px 10px;background:var(--panel)}}
.warning::before{{content:"\\26A0\\FE0E  "}}
.bad{{border-color:var(--bad)}}
.bad::before{{content:"\\2715  "}}
nav{{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0;font-size:.93rem}}
a{{color:var(--c1)}}
code{{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}}
.tiles div{{background:var(--panel);border-radius:8px;padding:8px 12px}}
.tiles dt{{color:var(--soft);font-size:.84rem}}
.tiles dd{{margin:0;font-size:1.12rem;font-weight:600;overflow-wrap:anywhere}}
.scroll{{overflow-x:auto;max-width:100%;margin:8px 0}}
table{{border-collapse:collapse;font-size:.9rem}}
caption{{text-align:left;color:var(--soft);padding-bottom:4px}}
th,td{{padding:4px 12px 4px 0;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}}
th{{color:var(--soft);font-weight:600;border-bottom-color:var(--line);vertical-align:bottom}}
th:first-child,td:first-child{{position:sticky;left:0;background:var(--bg)}}
td.n,th.n{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
td .name{{display:inline-block;min-width:14ch}}
td small{{color:var(--soft)}}
.badge{{display:inline-block;border:1px solid var(--line);border-radius:9px;padding:0 7px;margin-right:4px}}
.badge{{font-size:.8rem;white-space:nowrap}}
.badge.good{{color:var(--good);border-color:var(--good)}}
.badge.warning{{color:var(--warn);border:1px solid var(--warn);background:none}}
.badge.bad{{color:var(--bad);border:1px solid var(--bad);background:none}}
.badge::before{{content:none}}
details{{margin:8px 0}}
summary{{cursor:pointer;color:var(--c1)}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:18px}}
figure{{margin:0;min-width:0;display:flex;flex-direction:column;justify-content:space-between}}
figcaption{{font-weight:600;font-size:.93rem;overflow-wrap:anywhere}}
figcaption small{{display:block;font-weight:400}}
svg{{display:block;width:100%;height:auto;overflow:visible}}
svg.wide{{min-width:680px}}
.confusion td{{padding:6px 12px;border:1px solid var(--bg);line-height:1.25}}
svg text{{fill:var(--soft);font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
.legend{{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;padding:0;margin:8px 0;font-size:.87rem;color:var(--soft)}}
.legend li{{display:flex;align-items:center;gap:6px}}
.legend svg{{width:24px;height:18px;flex:none}}
footer{{margin-top:40px}}
"""
