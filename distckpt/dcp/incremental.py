"""What a rank knows of the checkpoint before, so that the next save can refer to it: kept in memory from save to save.

After a resume it is read once, from this rank's own shard, when the first save needs it. A base counts only as long as
its manifest is there: what a removal may be about to free is never referred to.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from distckpt.dcp.planner import runs
from distckpt.dcp.writer import WrittenShard
from distckpt.errors import CorruptCheckpoint, NotFound, SaveFailed, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.manifest import Manifest, Reference
from distckpt.format.reuse import Base, base_of
from distckpt.format.runs import FileRef
from distckpt.format.shard import stored_boxes
from distckpt.format.shard_index import ShardIndex
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")


class Chain:
    """The last committed checkpoint of this job's line, as far as one rank needs it; used by one thread at a time."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._base: Base | None = None
        self._loaded: Manifest | None = None
        self._written: Base | None = None

    def go_on_from(self, manifest: Manifest) -> None:
        """Take a checkpoint that was loaded as the one before; its header is read when it is needed."""
        self._base = self._written = None
        self._loaded = manifest

    def base(self, step: int, generation: int) -> Base | None:
        """Return what a save of this step may refer to, None where it has to write everything.

        Files that are gone, or no longer what they were, are left out.
        """
        self._written = None
        if self._loaded is not None:
            self._base, self._loaded = self._read(self._loaded), None
        base = self._base
        if base is None or base.step > step or base.generation > generation:
            return None
        try:
            self._store.size(base.manifest_path)
            return base.limited_to([file for file in base.files if self._store.size(file.path) == file.size])
        except StoreError as error:
            log.warning("step %d is saved whole: what it could refer to is not there: %s", step, error)
            return None

    def written(self, shard: WrittenShard, path: str, *, step: int, generation: int) -> None:
        """Remember this rank's new shard, ``path`` its name on the store, until the verdict comes."""
        self._written = base_of(
            stored_boxes(shard.plan, shard.digests),
            FileRef(path, shard.size, shard.header),
            shard.plan.files,
            block=shard.plan.block,
            step=step,
            generation=generation,
            manifest_path=_manifest_path(step, generation),
        )

    def committed(self) -> None:
        """Go on from what was written: it is durable, and other ranks' parts are too."""
        if self._written is not None:
            self._base, self._written = self._written, None

    def forget(self) -> None:
        """Know no checkpoint before: whether the last one was committed is in doubt, so the next save is whole."""
        self._base = self._written = self._loaded = None

    def _read(self, manifest: Manifest) -> Base | None:
        if self._rank >= len(manifest.shards):
            return None
        folder = names.step_folder(manifest.step)
        entry = manifest.shards[self._rank]
        try:
            header = ShardIndex(self._store, manifest, folder).header(self._rank)
        except (CorruptCheckpoint, UnsupportedVersion, StoreError) as error:
            log.warning("the next save writes everything: %s", error)
            return None
        return base_of(
            header.boxes,
            FileRef(f"{folder}/{entry.path}", entry.size, entry.header),
            header.files,
            block=header.block,
            step=manifest.step,
            generation=manifest.generation,
            manifest_path=_manifest_path(manifest.step, manifest.generation),
        )


def _manifest_path(step: int, generation: int) -> str:
    return f"{names.step_folder(step)}/{names.manifest_name(generation)}"


def check_bases(store: Store, paths: Iterable[str], *, committed: bool = False) -> None:
    """Make sure that the checkpoints that ranks referred to still exist (leader only); ``SaveFailed`` if one does not.

    Once before the commit, so that nothing is committed in vain, and once after it (``committed``), which is what counts: a
    removal deletes a manifest first and looks at all others after that. If the manifest is there once ours is, then a
    removal that begins now sees ours and leaves the data that ours needs.
    """
    for path in sorted({path for path in paths if path}):
        try:
            store.read(path, 0, 1)  # opened: a file system's attributes may be remembered ones
        except NotFound as error:
            what = "the manifest is there, but what it needs may go: it does not count as saved" if committed else ""
            raise SaveFailed(
                f"{path} was removed while a save referred to it: by hand, or by another job's gc; the next save writes "
                f"everything{what and '; '}{what}"
            ) from error


def merged(by_rank: Iterable[Sequence[tuple[FileRef, int]]]) -> list[Reference]:
    """Return all ranks' references (files, and bytes used of each) as the manifest has them: one for each attempt."""
    used: Counter[str] = Counter()
    files: dict[str, dict[FileRef, int]] = {}
    for file, nbytes in (pair for references in by_rank for pair in references):
        attempt, _, leaf = file.path.rpartition("/")
        parsed = names.parse_shard_name(leaf)
        assert parsed is not None
        files.setdefault(attempt, {})[file] = parsed[0]
        used[attempt] += nbytes
    return [
        Reference(
            attempt=attempt,
            shards=_count(found),
            ranks=runs(sorted(found.values())),
            size=sum(file.size for file in found),
            used=used[attempt],
        )
        for attempt, found in sorted(files.items())
    ]


def _count(files: Iterable[FileRef]) -> int:
    """Return how many shards the attempt has whose files these are."""
    return max(parsed[1] for file in files if (parsed := names.parse_shard_name(file.path.rpartition("/")[2])))
