"""Digests: a fixed function of bytes, in blocks that cover them exactly."""

from __future__ import annotations

import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.config import CheckpointConfig
from distckpt.format.digest import BLOCK, block_count, block_digests, digest, is_digest


def test_known_values() -> None:
    """Stored digests must never move with a version of the library."""
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest(b"a") == "a96faf705af16834e6c632b61e964e1f"
    assert CheckpointConfig("x").block_bytes == BLOCK == 262144


@given(st.binary(max_size=200), st.integers(1, 64))
def test_blocks_cover_the_bytes(data: bytes, block: int) -> None:
    found = block_digests(memoryview(data), block)
    assert found == [digest(data[start : start + block]) for start in range(0, len(data), block)]
    assert len(found) == block_count(len(data), block)
    assert all(is_digest(text) for text in found)


@given(st.binary(min_size=1, max_size=200), st.integers(0), st.integers(0, 7))
def test_one_flipped_bit_changes_one_block(data: bytes, place: int, bit: int) -> None:
    place %= len(data)
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    pairs = zip(block_digests(memoryview(data), 16), block_digests(memoryview(changed), 16), strict=True)
    assert [index for index, (old, new) in enumerate(pairs) if old != new] == [place // 16]


def test_offsets_count_bytes_of_any_format() -> None:
    numbers = array.array("q", range(10))
    assert block_digests(memoryview(numbers), 12) == block_digests(memoryview(numbers.tobytes()), 12)
    grid = memoryview(bytes(24)).cast("I", (2, 3))
    assert block_digests(grid, 5) == block_digests(memoryview(bytes(24)), 5)
    assert digest(memoryview(numbers)) == digest(numbers.tobytes())


def test_no_bytes_have_no_digests() -> None:
    assert block_digests(memoryview(b"")) == []
    assert block_digests(memoryview(array.array("q"))) == []
    assert block_count(0) == 0


def test_a_block_has_bytes() -> None:
    for block in (0, -1):
        with pytest.raises(ValueError, match="block"):
            block_digests(memoryview(b"abc"), block)


@pytest.mark.parametrize(
    "text", ["", "a" * 31, "a" * 33, "A" * 32, "a" * 32 + "\n", "g" * 32, "٣" * 32, None, 3, b"a" * 32]
)
def test_what_is_no_digest(text: object) -> None:
    assert not is_digest(text)
