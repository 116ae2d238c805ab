"""Is a checkpoint on storage what was saved? Reports, never raises for damage, never repairs.

``quick``: the manifest checks itself, every shard is there with its size and its header's digest. ``sample``:
also random blocks of every shard. ``full``: every block. All of them check that the boxes in the headers tile
every tensor.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final, Literal

from distckpt.boxes import Box, tiling_error
from distckpt.errors import ConfigError, CorruptCheckpoint, ShardError, StoreError, UnsupportedVersion
from distckpt.format.box_reader import (
    REQUEST,
    Block,
    blocks_of,
    missing_references,
    open_shard,
    read_run,
    run_nbytes,
    runs,
    size_problem,
)
from distckpt.format.lineage import Committed, read_manifest
from distckpt.format.manifest import Manifest
from distckpt.format.shard import ShardHeader
from distckpt.format.shard_header import read_header
from distckpt.format.verify_references import check_references
from distckpt.storage.base import Store
from distckpt.storage.open_files import OpenFiles

Mode = Literal["quick", "sample", "full"]
MODES: Final = ("quick", "sample", "full")
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads but one at a time."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the file's name on the store, the tensor and the rank where they are known."""

    file: str
    tensor: str | None
    rank: int | None
    what: str

    def __str__(self) -> str:
        at = "".join(
            [
                f" tensor {self.tensor!r}" if self.tensor else "",
                f" rank {self.rank}" if self.rank is not None else "",
            ]
        )
        return f"{self.file}:{at} {self.what}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found. ``notes`` are oddities that do no harm; sizes are bytes of tensors."""

    step: int
    generation: int
    mode: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    files: int
    tensors: int
    checked_bytes: int
    total_bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(slots=True)
class _Findings:
    """Collects what the threads find."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    checked: int = 0
    total: int = 0

    def add(self, file: str, what: str, *, tensor: str | None = None, rank: int | None = None) -> None:
        with self.lock:
            self.problems.append(Problem(file, tensor, rank, what))

    def count(self, nbytes: int, progress: Progress | None) -> None:
        with self.lock:
            self.checked += nbytes
            if progress is not None:
                progress(self.checked, self.total)


def quick_check(store: Store, committed: Committed, manifest: Manifest | None = None) -> list[Problem]:
    """Check the manifest and the size of every file that it needs, no more: what a load does before it starts.

    ``manifest`` saves reading it again. Raises nothing for damage or for storage that cannot be read.
    """
    if manifest is None:
        found = _manifest(store, committed)
        if isinstance(found, Problem):
            return [found]
        manifest = found

    def check(index: int) -> Problem | None:
        path = f"{committed.folder}/{manifest.shards[index].path}"
        wrong = size_problem(store, path, manifest.shards[index].size)
        return None if wrong is None else Problem(path, None, index, wrong)

    with ThreadPoolExecutor(min(16, len(manifest.shards)), thread_name_prefix="distckpt-check") as pool:
        own = [problem for problem in pool.map(check, range(len(manifest.shards))) if problem is not None]
    return own + [Problem(path, None, None, what) for path, what in missing_references(store, manifest).items()]


def verify(
    store: Store,
    committed: Committed,
    *,
    mode: Mode = "quick",
    fraction: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
    threads: int = 4,
) -> VerifyReport:
    """Check one checkpoint and report; memory stays within 8 MiB a thread besides the headers.

    ``fraction`` of the blocks of each shard (one at least) are read in mode ``sample``, chosen by ``seed``.
    Raises ``ConfigError`` for a wrong mode or fraction, nothing for damage.
    """
    if mode not in MODES:
        raise ConfigError(f"verify mode {mode!r}: choose one of {', '.join(MODES)}")
    if not 0 < fraction <= 1:
        raise ConfigError(f"verify fraction {fraction!r}: must be above 0 and at most 1")
    manifest = _manifest(store, committed)
    if isinstance(manifest, Problem):
        return VerifyReport(committed.step, committed.generation, mode, (manifest,), (), 0, 0, 0, 0)
    findings = _Findings()
    headers = _headers(store, committed, manifest, findings)
    if all(header is not None for header in headers):
        _check_tensors(committed, manifest, [h for h in headers if h is not None], findings)
    else:
        findings.notes.append("some headers cannot be read, so it was not checked that boxes tile the tensors")
    for file, tensor, rank, what in check_references(store, committed.folder, manifest, headers):
        findings.add(file, what, tensor=tensor, rank=rank)
    if mode != "quick":
        share = fraction if mode == "sample" else None
        _check_blocks(store, committed, manifest, headers, findings, share, seed, progress, threads)
    findings.notes += _unknown_files(store, committed, manifest)
    return VerifyReport(
        committed.step,
        committed.generation,
        mode,
        tuple(sorted(findings.problems, key=lambda p: (p.file, p.tensor or "", p.what))),
        tuple(findings.notes),
        len(manifest.shards),
        len(manifest.tensors),
        findings.checked,
        sum(box.nbytes for header in headers if header is not None for box in header.boxes),
    )


def _manifest(store: Store, committed: Committed) -> Manifest | Problem:
    try:
        return read_manifest(store, committed)
    except (CorruptCheckpoint, UnsupportedVersion, StoreError) as error:
        return Problem(committed.manifest_path, None, None, str(error))


def _headers(store: Store, committed: Committed, manifest: Manifest, findings: _Findings) -> list[ShardHeader | None]:
    """Return every shard's checked header, None where there is a problem (which is recorded)."""

    def check(index: int) -> ShardHeader | None:
        path = f"{committed.folder}/{manifest.shards[index].path}"
        try:
            return open_shard(store, manifest, committed.folder, index)
        except (ShardError, UnsupportedVersion) as error:
            what = str(error).removeprefix(f"{path}: ") + _stranger(store, manifest, path, index)
            findings.add(path, what, rank=index)
        return None

    with ThreadPoolExecutor(min(8, len(manifest.shards)), thread_name_prefix="distckpt-verify") as pool:
        return list(pool.map(check, range(len(manifest.shards))))


def _stranger(store: Store, manifest: Manifest, path: str, index: int) -> str:
    """Say whose shard a file is that is not the one that was committed, if it is a whole shard."""
    try:
        header = read_header(store, path, file_size=store.size(path), expect_digest=None)
    except (CorruptCheckpoint, UnsupportedVersion, StoreError):
        return ""
    if header.save_id != manifest.save_id:
        return f" (this is a shard of another save, {header.save_id})"
    return f" (this is the shard of rank {header.rank})" if header.rank != index else ""


def _check_tensors(
    committed: Committed, manifest: Manifest, headers: Sequence[ShardHeader], findings: _Findings
) -> None:
    """Compare the headers' boxes with the manifest, and check that they tile each tensor."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    for index, header in enumerate(headers):
        path = f"{committed.folder}/{manifest.shards[index].path}"
        for stored in header.boxes:
            entry = manifest.tensors.get(stored.fqn)
            if entry is None:
                findings.add(path, "is not in the manifest", tensor=stored.fqn, rank=index)
            elif (entry.dtype, tuple(entry.shape)) != (stored.dtype, stored.global_shape):
                what = f"is {stored.dtype} {stored.global_shape}, in the manifest {entry.dtype} {entry.shape}"
                findings.add(path, what, tensor=stored.fqn, rank=index)
            else:
                boxes[stored.fqn].append(stored.box)
        missing = sorted(set(manifest.per_rank) - header.objects.keys())
        if missing and len(headers) == manifest.world_size:
            findings.notes.append(f"{path}: rank {index} stored no object {', '.join(missing)}")
    for fqn, entry in manifest.tensors.items():
        wrong = tiling_error(entry.shape, boxes[fqn])
        if wrong is not None:
            findings.add(committed.manifest_path, wrong, tensor=fqn)


def _check_blocks(
    store: Store,
    committed: Committed,
    manifest: Manifest,
    headers: Sequence[ShardHeader | None],
    findings: _Findings,
    share: float | None,
    seed: int,
    progress: Progress | None,
    threads: int,
) -> None:
    """Read blocks and compare digests; ``share`` None means all. One run of at most 8 MiB is in memory."""
    jobs = [
        (index, _numbers(header, share, f"{seed}/{manifest.shards[index].path}"))
        for index, header in enumerate(headers)
        if header is not None
    ]
    for index, numbers in jobs:
        header = headers[index]
        assert header is not None
        findings.total += sum(block.nbytes for block in _blocks(header, "", numbers))

    def check(job: tuple[int, frozenset[int] | None]) -> None:
        index, numbers = job
        header, path = headers[index], f"{committed.folder}/{manifest.shards[index].path}"
        assert header is not None
        largest = max([header.size, *(file.size for file in header.files)])
        buffer = memoryview(bytearray(min(REQUEST, largest)))
        for run in runs(_blocks(header, path, numbers)):
            file = run[0].path
            asked = "" if file == path else f", which {path} refers to"
            try:
                damaged = read_run(reader, run, buffer)
            except StoreError as error:
                for fqn in dict.fromkeys(block.stored.fqn for block in run):
                    findings.add(file, f"cannot be read: {error}{asked}", tensor=fqn, rank=index)
                continue
            for bad in damaged:
                what = f"bytes [{bad.start}, {bad.start + bad.nbytes}){asked} do not match their digest"
                findings.add(file, what, tensor=bad.stored.fqn, rank=index)
            findings.count(run_nbytes(run), progress)

    with (
        closing(OpenFiles()) as files,
        ThreadPoolExecutor(max(1, min(threads, len(jobs))), thread_name_prefix="distckpt-verify") as pool,
    ):
        reader = files.over(store)
        list(pool.map(check, jobs))


def _numbers(header: ShardHeader, share: float | None, seed: str) -> frozenset[int] | None:
    """Choose which blocks of a shard are read, counted over the whole file; None means all."""
    count = sum(len(stored.digests) for stored in header.boxes)
    if share is None or count == 0:
        return None
    return frozenset(random.Random(seed).sample(range(count), max(1, round(share * count))))


def _blocks(header: ShardHeader, path: str, numbers: frozenset[int] | None) -> Iterator[Block]:
    """Yield a shard's (chosen) blocks, box by box; ``path`` is its name on the store."""
    at = 0
    for stored in header.boxes:
        for block in blocks_of(stored, header.block, path):
            if numbers is None or at in numbers:
                yield block
            at += 1


def _unknown_files(store: Store, committed: Committed, manifest: Manifest) -> list[str]:
    """Name the files in the attempt's folder that the manifest does not know."""
    known = {f"{committed.folder}/{shard.path}" for shard in manifest.shards}
    try:
        found = [entry.name for entry in store.list(f"{committed.folder}/{manifest.attempt}/")]
    except StoreError as error:
        return [f"the attempt folder cannot be listed: {error}"]
    return [f"{name}: not part of this checkpoint" for name in sorted(found) if name not in known]
