"""Is a root in order, and is its storage fit for checkpoints? Looks and reports; repairs and removes nothing.

The only things written are probes that are removed again: by ``posix_facts`` or ``object_facts``, and by ``store_now``
where jobs have started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from distckpt import clock
from distckpt.errors import CorruptCheckpoint, ManifestError, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.lineage import (
    Committed,
    Generation,
    lineage,
    list_committed,
    live_generations,
    read_generations,
    read_manifest,
    read_root,
    store_now,
)
from distckpt.format.manifest import Manifest
from distckpt.format.uncommitted import uncommitted
from distckpt.format.verify import quick_check
from distckpt.storage import ObjectStore, PosixStore
from distckpt.storage.base import Store
from distckpt.storage.facts import object_facts, posix_facts

Level = Literal["ok", "note", "warning", "problem"]

LIVE_S: Final = 600.0
"""A job whose last heartbeat is at most this many seconds old counts as running."""
MAX_SKEW_S: Final = 5.0
"""Clocks of this host and of the storage that differ by more are worth a warning."""

_VOLATILE: Final = {
    "tmpfs": "files are in memory only and are gone after a reboot; fine for tests, not for a run",
    "ramfs": "files are in memory only and are gone after a reboot; fine for tests, not for a run",
    "overlay": "a container's own layer: files are gone with the container; mount a volume for a run",
}
_FUSE: Final = "what fsync promises here is up to the program behind FUSE; ask its manual, or use a native mount"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis. ``problem`` needs action, ``warning`` may, ``note`` is good to know."""

    level: Level
    check: str
    text: str


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What ``diagnose`` found; ``facts`` are plain values for machines."""

    url: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing needs action."""
        return all(finding.level != "problem" for finding in self.findings)


def diagnose(store: Store) -> DoctorReport:
    """Check the storage under a root, then what is on it; an absent or empty root is checked as one to be.

    Raises ``StoreError`` only where the storage cannot be looked at or listed at all.
    """
    facts: dict[str, Any] = {"exists": not isinstance(store, PosixStore) or os.path.isdir(store.root)}
    committed, generations = list_committed(store), read_generations(store)
    line = lineage(committed, generations)
    findings, newest_bytes = _check_commits(store, committed, line, facts)
    if isinstance(store, PosixStore):
        facts["storage"] = posix_facts(store.root)
        findings = [*storage_findings(facts["storage"], newest_bytes), *findings]
    if isinstance(store, ObjectStore):
        facts["storage"] = object_facts(store)
        findings = [*object_findings(facts["storage"]), *findings]
    if not facts["exists"]:
        findings.append(Finding("note", "root", "the folder does not exist yet; the first save makes it"))
    elif not committed and not generations:
        findings.append(Finding("note", "root", "no job has used this root yet"))
    findings += _check_root(store)
    findings += _check_jobs(store, generations, facts)
    findings += _check_uncommitted(store, generations, facts)
    return DoctorReport(store.url, tuple(findings), facts)


# ---------------------------------------------------------------- storage


def storage_findings(facts: Mapping[str, Any], newest_bytes: int | None) -> list[Finding]:
    """Judge what ``posix_facts`` returned; ``newest_bytes`` is the size of a checkpoint, if one is known. Pure."""
    kind, free = facts["fs_type"], facts["free_bytes"]
    where = f"{kind or 'unknown type'}, mounted at {facts['mount_point'] or 'an unknown place'}"
    findings = [Finding("ok", "file system", where)]
    if facts["volatile"]:
        findings = [Finding("warning", "file system", f"{where}: {_VOLATILE.get(kind, _FUSE)}")]
    if not facts["writable"]:
        text = f"{facts['path']} cannot be written (owner, mode, read-only or full); nothing could be saved"
        return [*findings, Finding("problem", "writable", text)]
    findings.append(Finding("ok", "writable", str(facts["path"])))
    if facts["hard_links"]:
        findings.append(Finding("ok", "link()", "works: a commit is all or nothing"))
    else:
        text = "fails: manifests are created in place instead; one torn by a crash counts as not committed"
        findings.append(Finding("warning", "link()", text))
    if facts["direct_io"]:
        findings.append(Finding("ok", "O_DIRECT", "works"))
    else:
        findings.append(Finding("note", "O_DIRECT", "refused: writes go through the page cache, which is slower"))
    if not facts["folder_sync"]:
        text = "fsync of a folder fails: a committed checkpoint may vanish in a power cut"
        findings.append(Finding("warning", "fsync", text))
    return [*findings, _space(free, facts["total_bytes"], newest_bytes)]


def object_findings(facts: Mapping[str, Any]) -> list[Finding]:
    """Judge what ``object_facts`` returned. Pure."""
    if facts["conditional_put"] is None:
        return [Finding("problem", "writable", f"nothing could be saved: {facts['problem']}")]
    findings = [Finding("ok", "writable", f"{facts['path']} ({facts['service']})")]
    if facts["conditional_put"]:
        findings.append(Finding("ok", "if-none-match", "honoured: of two jobs that commit a name one wins"))
    else:
        findings.append(Finding("problem", "if-none-match", str(facts["problem"])))
    text = (
        "what killed jobs had half uploaded is invisible and costs money: let a lifecycle rule of the bucket abort it"
    )
    return [*findings, Finding("note", "uploads", text)]


def _space(free: int, total: int, newest_bytes: int | None) -> Finding:
    text = f"{size_text(free)} of {size_text(total)} free"
    if newest_bytes is None:
        return Finding("ok" if free else "problem", "space", text)
    text += f"; the newest checkpoint has {size_text(newest_bytes)}"
    if free < newest_bytes:
        return Finding("problem", "space", f"{text}, so the next save is likely to fail; free some space")
    # A save needs room for itself before anything older is removed.
    return Finding("warning" if free < 2 * newest_bytes else "ok", "space", text)


def reference_text(manifest: Manifest) -> str:
    """Say how much of a checkpoint is its own, and what it refers to."""
    own, used = sum(shard.size for shard in manifest.shards), sum(r.used for r in manifest.references)
    files = sum(stop - start for reference in manifest.references for start, stop in reference.ranks)
    steps = sorted({int(r.attempt.partition("/")[0].removeprefix("step-")) for r in manifest.references})
    return (
        f"step {manifest.step}: {size_text(own)} of its own, {size_text(used)} in {files} file{'s' * (files > 1)} of "
        f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
    )


def size_text(nbytes: int) -> str:
    """Return a number of bytes as ``1.2 GiB``."""
    if nbytes < 1024:
        return f"{nbytes} B"
    value, units = nbytes / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1023.95 and units[1:]:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}"


# ---------------------------------------------------------------- the root's records


def _check_root(store: Store) -> list[Finding]:
    try:
        root = read_root(store)
    except (ManifestError, UnsupportedVersion, StoreError) as error:
        return [Finding("problem", "root file", str(error))]
    if root is None:
        return []
    made = f", made {root['created']}" if "created" in root else ""
    version = ".".join(map(str, root["version"]))
    return [Finding("ok", "root file", f"run {root['run_id']}, format {version}{made}")]


def _check_commits(
    store: Store, committed: Sequence[Committed], line: Sequence[Committed], facts: dict[str, Any]
) -> tuple[list[Finding], int | None]:
    """Read every manifest and look at every shard's size; also returns the newest whole checkpoint's bytes, reused ones too."""
    findings: list[Finding] = []
    sizes: dict[Committed, int] = {}
    needed: dict[Committed, int] = {}
    damaged: list[str] = []
    facts["references"] = referred = {}
    for commit in sorted(committed, reverse=True):
        try:
            manifest = read_manifest(store, commit)
            problems = [str(problem) for problem in quick_check(store, commit, manifest)]
            sizes[commit] = sum(shard.size for shard in manifest.shards)
            needed[commit] = manifest.nbytes
            if manifest.references:
                referred[commit.manifest_path] = [reference.attempt for reference in manifest.references]
                findings.append(Finding("note", "incremental", reference_text(manifest)))
        except (CorruptCheckpoint, UnsupportedVersion, StoreError) as error:
            problems = [str(error)]
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            damaged.append(commit.manifest_path)
            what = problems[0].replace(f"{store.url}/", "")
            findings.append(Finding("problem", "damage", f"step {commit.step}: {what}{more}"))
    stray = [c for c in committed if c not in line]
    facts |= {
        "checkpoints": [c.manifest_path for c in line],
        "damaged": damaged,
        "strays": [c.manifest_path for c in stray],
    }
    if line:
        whole = next((c for c in line if c.manifest_path not in damaged), None)
        found = f"{len(line)} to resume from, {size_text(sum(sizes.get(c, 0) for c in line))}"
        if whole is None:
            findings.insert(0, Finding("problem", "checkpoints", f"{found}: none of them is whole"))
        else:
            text = f"{found}; the newest whole one is step {whole.step} of generation {whole.generation}"
            findings.insert(0, Finding("ok", "checkpoints", text))
    findings += [
        Finding("note", "stray", f"step {c.step} of generation {c.generation}: committed outside the lineage, unused")
        for c in stray
    ]
    return findings, next((needed[c] for c in line if c in needed), None)  # the next save may be whole


# ---------------------------------------------------------------- jobs


def _check_jobs(store: Store, generations: Sequence[Generation], facts: dict[str, Any]) -> list[Finding]:
    """Find running jobs, records that can't be read, and clocks that disagree."""
    numbers = [names.parse_generation_file(entry.name) for entry in store.list("generations")]
    known = {record.number: record for record in generations}
    lost = sorted(number for number in numbers if number is not None and number not in known)
    findings = [
        Finding("problem", "generation", f"{store.url}/{names.generation_file(n)}: the record cannot be read")
        for n in lost
    ]
    facts |= {"generations": sorted(known), "live": [], "clock_skew_s": None}
    if not known and not lost:
        return findings
    try:
        skew = store_now(store) - clock.now()
        live = list(live_generations(store, LIVE_S))
    except StoreError as error:
        text = f"unknown which jobs run and how far clocks differ, as nothing can be written: {error}"
        return [*findings, Finding("note", "jobs", text)]
    facts |= {"live": live, "clock_skew_s": round(skew, 3)}
    return [*findings, *job_findings(known, live), clock_finding(skew)]


def job_findings(known: Mapping[int, Generation], live: Sequence[int]) -> list[Finding]:
    """Judge which jobs run on one root; ``live`` are the generations with a fresh heartbeat. Pure."""

    def who(number: int) -> str:
        record = known.get(number)
        if record is None:
            return f"generation {number}"
        return f"generation {number} ({record.owner or 'unknown owner'} on {record.host}, started {record.time})"

    newest = max(known, default=0)
    if len(live) > 1:
        text = f"{len(live)} jobs were alive in the last {LIVE_S:.0f} s: {', '.join(map(who, live))}"
        return [Finding("problem", "jobs", f"{text}; only the newest can commit: stop the others")]
    if live and live[0] < newest:
        text = f"{who(live[0])} is alive but {who(newest)} replaced it: it can no longer commit"
        return [Finding("warning", "jobs", text)]
    if live:
        return [Finding("ok", "jobs", f"running: {who(live[0])}")]
    return [Finding("ok", "jobs", f"none seems to run; the last was {who(newest)}")] if newest else []


def clock_finding(skew: float) -> Finding:
    """Judge the storage's clock minus this host's, in seconds. Pure."""
    if abs(skew) <= MAX_SKEW_S:
        return Finding("ok", "clocks", "this host's and the storage's agree")
    side = "ahead of" if skew > 0 else "behind"
    text = f"the storage's clock is {abs(skew):.0f} s {side} this host's; ages are taken by the storage's, check NTP"
    return Finding("warning", "clocks", text)


# ---------------------------------------------------------------- attempts


def _check_uncommitted(store: Store, generations: Sequence[Generation], facts: dict[str, Any]) -> list[Finding]:
    attempts = uncommitted(store)
    newest = max((record.number for record in generations), default=0)
    orphans = [a for a in attempts if a.generation < newest and not a.in_doubt]
    facts["orphans"] = [a.folder for a in orphans]
    facts["uncommitted"] = [a.folder for a in attempts if a not in orphans]
    findings = []
    if orphans:
        size = size_text(sum(a.nbytes for a in orphans))
        count = f"{len(orphans)} attempt{'s' * (len(orphans) > 1)} of earlier jobs never committed"
        text = f"{count} ({size}); `distckpt gc` removes old ones"
        findings.append(Finding("note", "orphans", text))
    for attempt in attempts:
        if attempt not in orphans:
            why = "a manifest of its step cannot be read" if attempt.in_doubt else "in flight, or its job died"
            findings.append(Finding("note", "uncommitted", f"{attempt.folder}: {why}"))
    return findings
