"""Names: makers and parsers are exact inverses, and no name becomes a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import ManifestError
from distckpt.format import names

NUMBER = st.integers(0, names.MAX_NUMBER)
NONCE = st.text("0123456789abcdef", min_size=8, max_size=8)

PARSERS: list[tuple[Callable[..., str], Callable[[str], Any]]] = [
    (names.step_folder, names.parse_step_folder),
    (names.attempt_name, names.parse_attempt_name),
    (names.shard_name, names.parse_shard_name),
    (names.manifest_name, names.parse_manifest_name),
    (names.generation_file, names.parse_generation_file),
    (names.metrics_file, names.parse_metrics_file),
]


def test_documented_examples() -> None:
    assert names.step_folder(1200) == "step-0000001200"
    assert names.attempt_name(3, "1a2b3c4d") == "g000003-1a2b3c4d"
    assert names.shard_name(2, 8) == "00002-of-00008.safetensors"
    assert names.manifest_name(3) == "manifest-g000003.json"
    assert names.generation_file(3) == "generations/000003.json"
    assert names.metrics_file(3, 12) == "metrics/g000003-000012.json"


@given(NUMBER, NUMBER, NONCE)
def test_parsers_undo_makers(first: int, second: int, nonce: str) -> None:
    assert names.parse_step_folder(names.step_folder(first)) == first
    assert names.parse_manifest_name(names.manifest_name(first)) == first
    assert names.parse_generation_file(names.generation_file(first)) == first
    assert names.parse_metrics_file(names.metrics_file(first, second)) == (first, second)
    assert names.parse_attempt_name(names.attempt_name(first, nonce)) == (first, nonce)
    rank, world = sorted((first, second))
    if rank < world:
        assert names.parse_shard_name(names.shard_name(rank, world)) == (rank, world)


@given(NUMBER, NUMBER)
def test_all_names_pass_the_path_check(first: int, second: int) -> None:
    rank, world = min(first, second), max(first, second) + 1
    if world <= names.MAX_NUMBER:
        step, attempt = names.step_folder(first), names.attempt_name(second, "00000000")
        names.check_relative_path(f"{step}/{attempt}/{names.shard_name(rank, world)}", "here")
    names.check_relative_path(names.metrics_file(first, second), "here")


EXAMPLES = [
    "step-0000001200",
    "g000003-1a2b3c4d",
    "00002-of-00008.safetensors",
    "manifest-g000003.json",
    "generations/000003.json",
    "metrics/g000003-000012.json",
]


@given(st.sampled_from(EXAMPLES), st.integers(0, 30), st.sampled_from("0٣a A-/.\n\0²"), st.integers(0, 1))
def test_a_name_has_one_spelling(example: str, place: int, character: str, cut: int) -> None:
    """Whatever a parser accepts is exactly what the maker gives for the numbers it found."""
    place = min(place, len(example))
    changed = example[:place] + character + example[place + cut :]
    for make, parse in PARSERS:
        found = parse(changed)
        if found is not None:
            assert make(*(found if isinstance(found, tuple) else (found,))) == changed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "step-1200",
        "step-00000001200",
        "step-0000001200\n",
        "step--000001200",
        "step-٠٠٠٠٠٠١٢٠٠",
        "step-+000001200",
        "Step-0000001200",
        "step-9999999999999999999",
        "g000003-1A2B3C4D",
        "00008-of-00008.safetensors",
        "00002-of-00008.safetensors.tmp",
        "manifest-g0000003.json",
        "metrics/g000003-12.json",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert [parse(name) for _, parse in PARSERS] == [None] * len(PARSERS)


def test_makers_refuse_what_could_not_be_parsed() -> None:
    bad: list[tuple[Callable[..., str], tuple[Any, ...]]] = [
        (names.step_folder, (-1,)),
        (names.step_folder, (True,)),
        (names.step_folder, (1.0,)),
        (names.step_folder, (2**63,)),
        (names.attempt_name, (1, "../../..")),
        (names.attempt_name, (1, "1a2b3c4d\n")),
        (names.shard_name, (8, 8)),
        (names.shard_name, (-1, 8)),
    ]
    for make, arguments in bad:
        with pytest.raises(ValueError):
            make(*arguments)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "a\n",
        "a b",
        "é",
        "a/" + "b" * 256,
        "/".join(["a"] * 3000),
        "~",
        "nul",
        "CON.json",
        "a.",
        "...",
        None,
        3,
        b"a",
    ],
)
def test_paths_that_could_escape_are_refused_by_field(path: object) -> None:
    with pytest.raises(ManifestError, match=r"manifest-g000001\.json: shards\[3\]\.path"):
        names.check_relative_path(path, "manifest-g000001.json: shards[3].path")


@pytest.mark.parametrize("path", ["a", "..a", ".hidden", "g000003-1a2b3c4d/00000-of-00001.safetensors", "b" * 255])
def test_ordinary_paths_pass(path: str) -> None:
    names.check_relative_path(path, "here")
