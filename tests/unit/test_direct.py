"""Direct I/O: whatever the alignment, the size and the file system, the bytes are the same; counters say how they went."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage import direct, posix_reader
from distckpt.storage.base import open_reader
from distckpt.storage.posix import PosixStore

MIB = 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no writable /dev/shm here")
    folder = shared / f"distckpt-test-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("cold", [True, False])
def test_reads_of_any_range_are_right(root: Path, cold: bool) -> None:
    content = random.Random(1).randbytes(21 * MIB + 12_345)
    (root / "file").write_bytes(content)
    store = PosixStore(root)
    ranges = [(0, len(content)), (1, 9 * MIB), (4096, 8 * MIB), (len(content) - 2 * MIB - 7, 2 * MIB + 7), (5, MIB)]
    ranges += [(random.Random(i).randrange(8 * MIB), MIB + random.Random(-i).randrange(10 * MIB)) for i in range(1, 9)]
    for offset, size in ranges:
        if cold:
            evict(root / "file")
        target = bytearray(size)
        store.read_into("file", offset, memoryview(target))
        assert target == content[offset : offset + size], (offset, size)


def test_a_file_that_shrinks_is_an_error_not_a_short_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * MIB))
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    view = memoryview(bytearray(5 * MIB))
    assert direct.read_direct(fd, view, 0) <= 3 * MIB
    os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * MIB, 9 * MIB + 777])
def test_writes_of_any_size_are_right(root: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    store = PosixStore(root)
    writer = store.open_writer(f"file-{size}", size)
    with direct.POOL.lend() as buffer:
        for at in range(0, size, direct.REQUEST):
            part = content[at : at + direct.REQUEST]
            buffer[: len(part)] = part
            writer.write_at(at, buffer[: len(part)])
    writer.commit()
    assert (root / f"file-{size}").read_bytes() == content
    assert store.counters["direct_bytes"] in (0, size // 4096 * 4096)


def test_only_aligned_fronts_go_directly(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    writer = store.open_writer("file", 16384)
    with direct.POOL.lend() as buffer:
        buffer[:16384] = bytes(range(256)) * 64
        writer.write_at(0, buffer[:5000])
        writer.write_at(5000, buffer[5000:16384])  # neither offset nor address is aligned
    writer.commit()
    assert (tmp_path / "file").read_bytes() == bytes(range(256)) * 64
    assert store.counters["direct_bytes"] in (0, 4096)


def test_buffers_are_used_again() -> None:
    pool = direct.BufferPool(limit=2)
    for _ in range(5):
        with pool.lend() as first, pool.lend() as second:
            assert direct.address(first) != direct.address(second)
            assert direct.address(first) % direct.ALIGNMENT == 0
    assert pool.allocations == 2


def test_a_cold_read_leaves_the_page_cache_cold(tmp_path: Path) -> None:
    """An attempt to read what is not in memory would start a readahead of megabytes beside the direct read."""
    (tmp_path / "file").write_bytes(random.Random(1).randbytes(12 * MIB))
    evict(tmp_path / "file")
    store = PosixStore(tmp_path)
    with contextlib.closing(open_reader(store, "file")) as reader, open(tmp_path / "file", "rb") as file:
        cached = direct.Residency(file.fileno(), 12 * MIB)
        if cached.holds(0, 4096):
            pytest.skip("this file system keeps no file out of memory")
        target = bytearray(4 * MIB)
        assert not reader.read_cached(MIB, 4 * MIB, lambda: pytest.fail("asked for where to, though nothing is there"))
        reader.read_into(MIB, memoryview(target))
        assert not any(cached.holds(page, 4096) for page in range(0, 12 * MIB, 4096))
        file.seek(2 * MIB)
        assert file.read(2 * MIB) == target[MIB : 3 * MIB]
        assert cached.holds(2 * MIB + 5, 2 * MIB - 9)
        assert reader.read_cached(2 * MIB, 2 * MIB, lambda: [memoryview(target)[: 2 * MIB]])
        for wrong in range(direct.WRONG + 1):
            assert cached.holds(2 * MIB, 4096), wrong
            cached.distrust()
        assert not cached.holds(2 * MIB, 4096)
        cached.close()


def test_residency_of_odd_ranges(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    (tmp_path / "empty").touch()
    with open(tmp_path / "file", "rb") as file, open(tmp_path / "empty", "rb") as empty:
        cached, nothing = direct.Residency(file.fileno(), 10_000), direct.Residency(empty.fileno(), 0)
        assert cached.holds(0, 10_000)
        assert cached.holds(9_999, 1)
        assert not any(cached.holds(*odd) for odd in [(0, 0), (-1, 5), (9_999, 2), (10_000, 1)])
        assert not nothing.holds(0, 1)
        cached.close()
        nothing.close()
        assert not cached.holds(0, 1)


def test_faults_are_taken_before_the_first_touch() -> None:
    nbytes = 6 * MIB + 8192
    memory, other = direct.anonymous(nbytes), direct.anonymous(nbytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    direct.prefault(direct.address(memory), nbytes)
    if resource.getrusage(resource.RUSAGE_SELF).ru_minflt == before:
        pytest.skip("this kernel does not populate memory on request")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory[::4096] = b"x" * len(memory[::4096])
    filled = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    other[::4096] = b"x" * len(other[::4096])
    assert filled - before < resource.getrusage(resource.RUSAGE_SELF).ru_minflt - filled
    assert bytes(memory[1:4096]) == bytes(4095)


def test_a_cached_file_is_read_from_memory_though_one_request_of_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page may be locked for a moment: that request goes another way, those after it do not."""
    content = random.Random(2).randbytes(8 * MIB)
    (tmp_path / "file").write_bytes(content)
    real, answers = posix_reader.read_resident, []

    def refusing(*args: Any) -> bool:
        answers.append(False if len(answers) == 2 else real(*args))
        return answers[-1]

    monkeypatch.setattr(posix_reader, "read_resident", refusing)
    with contextlib.closing(open_reader(PosixStore(tmp_path), "file")) as reader:
        target = bytearray(8 * MIB)
        for start in range(0, 8 * MIB, MIB):
            reader.read_into(start, memoryview(target)[start : start + MIB])
    assert target == content
    assert len(answers) == 8
    assert answers.count(True) == 7
