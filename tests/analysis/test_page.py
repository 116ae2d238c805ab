"""The page that reports share: what it is given is escaped, and nothing in it leads out."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from distckpt.analysis.page import Head, Html, Section, details, element, encoded, page, paragraph, table, text


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


NASTY = "<img src=http://x/y onerror='alert(1)'>\"&\x00\u202e"


def test_what_is_given_is_text_wherever_it_stands() -> None:
    heads = [Head(NASTY, hint=NASTY), Head("n", number=True)]
    body = details(NASTY, paragraph(NASTY, kind="warning"), table(heads, [[NASTY, 1.5]], caption=NASTY))
    found = Tags(page(NASTY, [Section("a", NASTY, body)], lead=element("p", NASTY, title=NASTY)))
    assert found.open == []
    assert [tag for tag, _ in found.tags if tag in ("img", "script", "link", "iframe")] == []
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.words.count("<img src=http://x/y onerror='alert(1)'>\"&\\x00\\u202e") >= 6


def test_markup_is_markup() -> None:
    assert element("b", "<", Html("<i>x</i>"), class_="k", data_x=2.0, hidden=True, id=None) == (
        '<b class="k" data-x="2" hidden>&lt;<i>x</i></b>'
    )
    assert element("circle", cx=1.23456789) == '<circle cx="1.23457"/>'
    with pytest.raises(ValueError, match="attribute"):
        element("b", **{"a onclick": "x"})


def test_a_page_forbids_what_it_does_not_need() -> None:
    document = page("t", [Section("a", "A", Html("")), Section("b", "B", Html(""))])
    policy = next(a["content"] for tag, a in Tags(document).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert [a["href"] for tag, a in Tags(document).tags if tag == "a"] == ["#a", "#b"]


def test_names_that_are_no_unicode_can_be_written() -> None:
    assert encoded(page("a\udc80b", [])).count(b"\\udc80") == 2
    assert text("a\nb") == "a\nb"
