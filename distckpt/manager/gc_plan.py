"""What removal takes and what it leaves: a pure function of what is on the store. Doubt keeps data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.format import names
from distckpt.format.lineage import Committed, Generation, lineage
from distckpt.format.manifest import Manifest
from distckpt.storage.base import Entry


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is on a store at one moment, as far as removal is concerned. Times are by the store's clock.

    ``attempts`` are all attempt folders. ``manifests`` has every commit: its manifest, or the reason why it
    can't be read. ``foreign``: at least one was written by a newer format or could not be asked for, so what
    it references is unknown.
    """

    entries: tuple[Entry, ...]
    attempts: tuple[str, ...]
    manifests: Mapping[Committed, Manifest | str]
    generations: tuple[Generation, ...]
    highest: int
    now: float
    foreign: str | None = None


@dataclass(frozen=True, slots=True)
class Removal:
    """A checkpoint that goes: the data files that it was the last to need and their folders, all names on the store."""

    committed: Committed
    files: tuple[str, ...]
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Orphan:
    """Shards of an attempt that was never committed, or whose manifest is gone, which no manifest refers to."""

    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What goes, and what stays although it was to go or looks odd: name on the store to the reason."""

    removals: tuple[Removal, ...]
    orphans: tuple[Orphan, ...]
    reasons: Mapping[str, str]


def references(committed: Committed, manifest: Manifest) -> frozenset[str]:
    """Return the names on the store of every data file that a manifest needs: its own shards and those it refers to."""
    return own_files(committed, manifest).union(*(reference.paths for reference in manifest.references))


def own_files(committed: Committed, manifest: Manifest) -> frozenset[str]:
    """Return the names on the store of a checkpoint's own shards."""
    return frozenset(f"{committed.folder}/{shard.path}" for shard in manifest.shards)


def plan_gc(
    snapshot: Snapshot,
    remove: Collection[Committed],
    *,
    grace_s: float,
    current_generation: int,
    minimum_kept: int = 2,
) -> GcPlan:
    """Decide what goes; every reason to keep something wins over every wish to remove it."""
    blocked = _blocked(snapshot, current_generation)
    if blocked is not None:
        return GcPlan((), (), {c.manifest_path: blocked for c in remove if c in snapshot.manifests} or {"*": blocked})
    reasons: dict[str, str] = {}
    goes = [c for c in sorted(set(remove)) if c in snapshot.manifests]
    protected = _protected(snapshot, goes, minimum_kept)
    reasons |= {c.manifest_path: protected[c] for c in goes if c in protected}
    goes = [c for c in goes if c not in protected]
    marked: set[str] = set()
    for committed, manifest in snapshot.manifests.items():
        if isinstance(manifest, str):
            reasons.setdefault(committed.manifest_path, f"its manifest cannot be read: {manifest}")
        elif committed not in goes:
            marked |= references(committed, manifest)
    removals = _removals(snapshot, goes, marked)
    orphans = _orphans(snapshot, goes, marked, grace_s, current_generation, reasons)
    reasons |= _unknown(snapshot)
    return GcPlan(removals, orphans, reasons)


def _blocked(snapshot: Snapshot, current_generation: int) -> str | None:
    if snapshot.foreign is not None:
        return f"nothing is removed while what a manifest references is unknown: {snapshot.foreign}"
    if snapshot.highest > current_generation:
        return f"generation {snapshot.highest} is newer than {current_generation}: only the newest job removes"
    return None


def _protected(snapshot: Snapshot, goes: Iterable[Committed], minimum_kept: int) -> dict[Committed, str]:
    """Return why commits that were to go stay: pinned, in doubt, or among the last of the lineage."""
    pins = {entry.name for entry in snapshot.entries}
    unreadable = {c.step for c, manifest in snapshot.manifests.items() if isinstance(manifest, str)}
    doubt = _doubt(snapshot)
    line = lineage(snapshot.manifests, snapshot.generations)
    last = [c for c in line if not isinstance(snapshot.manifests[c], str)][: max(0, minimum_kept)]
    found: dict[Committed, str] = {}
    for committed in goes:
        if f"{committed.folder}/{names.PINNED}" in pins:
            found[committed] = "it is pinned"
        elif committed.step in unreadable:
            found[committed] = "a manifest of this step cannot be read, so nothing of the step is removed"
        elif committed.step <= doubt:
            found[committed] = f"a manifest of step {doubt} cannot be read, and may refer to its data"
        elif committed in last:
            found[committed] = f"it is one of the last {len(last)} that can be resumed from"
    return found


def _doubt(snapshot: Snapshot) -> int:
    """Return the last step whose data an unreadable manifest may need: steps refer to earlier ones; -1 for none.

    Only in a root where incremental saves were made.
    """
    readable = [manifest for manifest in snapshot.manifests.values() if not isinstance(manifest, str)]
    if not any(manifest.references for manifest in readable):
        return -1
    return max((c.step for c, manifest in snapshot.manifests.items() if isinstance(manifest, str)), default=-1)


def _removals(snapshot: Snapshot, goes: Sequence[Committed], marked: set[str]) -> tuple[Removal, ...]:
    """Return the removals in order; a file that several of them need goes with the last.

    Each is complete once it is done, so stopping between two leaves no manifest without its data.
    """
    found: list[Removal] = []
    later = set(marked)
    for committed in reversed(goes):
        manifest = snapshot.manifests[committed]
        assert not isinstance(manifest, str)
        needed = references(committed, manifest)
        files = sorted(needed - later)
        found.append(Removal(committed, tuple(files), tuple(sorted({name.rpartition("/")[0] for name in files}))))
        later |= needed
    return tuple(reversed(found))


def _orphans(
    snapshot: Snapshot,
    goes: Sequence[Committed],
    marked: set[str],
    grace_s: float,
    current_generation: int,
    reasons: dict[str, str],
) -> tuple[Orphan, ...]:
    """Return attempts without a manifest that are old enough and of an older generation, less what others refer to."""
    used, going = set[str](), set[str]()
    for committed, manifest in snapshot.manifests.items():
        if not isinstance(manifest, str):
            used |= {name.rpartition("/")[0] for name in own_files(committed, manifest)}
            going |= references(committed, manifest) if committed in goes else set()
    unreadable = {c.folder for c, manifest in snapshot.manifests.items() if isinstance(manifest, str)}
    doubt = _doubt(snapshot)
    inside: dict[str, list[Entry]] = {folder: [] for folder in snapshot.attempts}
    for entry in snapshot.entries:
        folder = entry.name.rpartition("/")[0]
        if folder in inside:
            inside[folder].append(entry)
    found = []
    for folder, files in sorted(inside.items()):
        shards = [e.name for e in files if names.parse_shard_name(e.name.rpartition("/")[2]) is not None]
        free = tuple(name for name in shards if name not in marked and name not in going)
        if folder in used or (shards and not free):
            continue
        step, _, attempt = folder.partition("/")
        parsed = names.parse_attempt_name(attempt)
        assert parsed is not None
        age = snapshot.now - max((entry.modified for entry in files), default=float("-inf"))
        if step in unreadable:
            reasons[folder] = "not committed, but a manifest of this step cannot be read"
        elif (names.parse_step_folder(step) or 0) <= doubt:
            reasons[folder] = f"not committed, but a manifest of step {doubt} cannot be read, and may refer to it"
        elif parsed[0] >= current_generation:
            reasons[folder] = "not committed, but of the running job: it may be in flight"
        elif age <= grace_s:
            reasons[folder] = f"not committed, but only {max(0.0, age):.0f} s old (grace {grace_s:.0f} s)"
        else:
            found.append(Orphan(folder, free))
    return tuple(found)


def _unknown(snapshot: Snapshot) -> dict[str, str]:
    """Name the files in step folders that are none of ours; they are never touched."""
    attempts, found = set(snapshot.attempts), {}
    for entry in snapshot.entries:
        folder, _, leaf = entry.name.rpartition("/")
        if folder in attempts:
            known = names.parse_shard_name(leaf) is not None
        elif "/" in folder:
            known = folder.endswith(f"/{names.EVALUATIONS}")
        else:
            known = leaf == names.PINNED or names.parse_manifest_name(leaf) is not None
        if not known:
            found[entry.name] = "not a file that distckpt makes"
    return found
