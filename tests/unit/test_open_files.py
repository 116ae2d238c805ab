"""Files read in many requests are opened once, never more than a fixed number at a time, and all closed again."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from distckpt.errors import StoreError
from distckpt.format import read_ahead
from distckpt.format.read_ahead import ReadAhead
from distckpt.storage import PosixStore, open_files
from distckpt.storage.open_files import OpenFiles

MIB = 1 << 20


def read(files: OpenFiles, store: PosixStore, name: str) -> bytes:
    target = bytearray(4)
    files.get(store, name).read_into(0, memoryview(target))
    return bytes(target)


def test_each_file_is_opened_once_and_closed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST", 3)
    store, again = PosixStore(tmp_path), PosixStore(tmp_path)
    for number in range(5):
        store.create(f"f{number}", b"%04d" % number)
    before = os.listdir("/proc/self/fd")
    with closing(OpenFiles()) as files:
        for _ in range(4):
            assert [read(files, store, f"f{n}") for n in range(5)] == [b"%04d" % n for n in range(5)]
        assert store.counters["opens"] == 3 + 4 * 2  # three are kept
        assert read(files, again, "f4") == b"0004"  # another store's file of that name is another file
        assert again.counters["opens"] == 1
        with pytest.raises(StoreError):
            read(files, store, "gone")
    assert os.listdir("/proc/self/fd") == before


def test_what_is_read_ahead_opens_a_file_once(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    content = os.urandom(9 * MIB)
    store.create("a", content)
    store.create("b", content[::-1])
    before = os.listdir("/proc/self/fd")
    with ReadAhead([[(store, name, at * MIB, MIB)]] for name in "ab" for at in range(9)) as ahead:
        reader, target = ahead.over(store), bytearray(9 * MIB)
        for name, wanted in (("a", content), ("b", content[::-1])):
            reader.read_into(name, 0, memoryview(target))
            assert target == wanted
    assert store.counters["opens"] == 2
    assert store.counters["bytes_read"] == 2 * 9 * MIB > 4 * read_ahead.NEAR_REQUEST
    assert os.listdir("/proc/self/fd") == before
