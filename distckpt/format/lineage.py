"""Which commits count: every job start is a generation, and readers follow the line of job starts back.

A starting job creates the next generation's record exclusively and writes in it what it resumes from. The
lineage is then: the commits of the highest generation, those of the generation it resumed from up to that
step, and so on, as in Raft's log truncation. A late commit of an older job lies beyond that step: a stray,
shown but never resumed from.
"""

from __future__ import annotations

import logging
import secrets
import socket
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from distckpt import clock
from distckpt.errors import AlreadyExists, ManifestError, NotFound, StoreError
from distckpt.format import names
from distckpt.format.limits import VERSION, check_version
from distckpt.format.manifest import Manifest, decode_manifest
from distckpt.format.plain_json import canonical, strict_loads
from distckpt.storage.base import Store

logger = logging.getLogger("distckpt")

FORMAT: Final = "distckpt"
MAX_RECORD_BYTES: Final = 1 << 20
MAX_MANIFEST_BYTES: Final = 256 << 20
_CLOCK_PROBE: Final = "generations/clock.probe"
_ALIVE: Final = ".alive"


@dataclass(frozen=True, slots=True)
class Generation:
    """One job start. ``resumed_from`` is (generation, step) of what it loaded, None for a fresh start."""

    number: int
    nonce: str
    host: str
    owner: str
    time: str
    resumed_from: tuple[int, int] | None


@dataclass(frozen=True, slots=True, order=True)
class Committed:
    """One manifest on the store, known by its name alone; nothing about its content is promised."""

    step: int
    generation: int
    manifest_path: str

    @property
    def folder(self) -> str:
        """The step folder, to which the manifest's shard paths are relative."""
        return names.step_folder(self.step)


# ---------------------------------------------------------------- pure: which commits count


def lineage(committed: Iterable[Committed], generations: Iterable[Generation]) -> list[Committed]:
    """Return the commits that a job may resume from, newest first.

    From the highest generation down: all its commits, then its parent's with step <= the step it resumed
    from, and so on; ``resumed_from=None`` ends the line. A generation that has commits but no readable record
    (damaged, or a step folder copied here without it) is taken to continue the next lower one, up to its own
    first commit, so that a lost record hides no commit that its job could have resumed from.
    """
    by_generation: dict[int, list[Committed]] = {}
    for commit in committed:
        by_generation.setdefault(commit.generation, []).append(commit)
    records = {record.number: record for record in generations}
    known = sorted({*by_generation, *records}, reverse=True)
    line: list[Committed] = []
    current, bound = (known[0] if known else None), None
    while current is not None:
        own = [c for c in by_generation.get(current, []) if bound is None or c.step <= bound]
        line += sorted(own, reverse=True)
        current, bound = _parent(current, bound, own, records.get(current), known)
    return line


def _parent(
    number: int, bound: int | None, own: list[Committed], record: Generation | None, known: list[int]
) -> tuple[int | None, int | None]:
    if record is not None:
        if record.resumed_from is None or record.resumed_from[0] >= number:
            return None, None
        return record.resumed_from
    lower = next((n for n in known if n < number), None)
    return lower, (min(c.step for c in own) - 1 if own else bound)


def strays(committed: Iterable[Committed], generations: Iterable[Generation]) -> list[Committed]:
    """Return the commits outside the lineage, newest step first: kept and shown, never resumed from."""
    everything = list(committed)
    return sorted(set(everything).difference(lineage(everything, generations)), reverse=True)


# ---------------------------------------------------------------- the root


def read_root(store: Store) -> dict[str, Any] | None:
    """Return the content of ``distckpt.json``, or None where there is none.

    Raises ``ManifestError`` if it does not parse, ``UnsupportedVersion`` if a newer major version wrote it.
    """
    where = f"{store.url}/{names.ROOT_FILE}"
    try:
        content = strict_loads(store.read(names.ROOT_FILE), where=where, max_bytes=MAX_RECORD_BYTES)
    except NotFound:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ManifestError(f"{where}: this is not the root file of a distckpt root; use another folder")
    check_version(content.get("version"), where=where, error=ManifestError)
    if not isinstance(content.get("run_id"), str):
        raise ManifestError(f"{where}: field 'run_id' must be a string")
    return content


def ensure_root(store: Store) -> dict[str, Any]:
    """Read ``distckpt.json``, creating it first where it is absent; of several creators one wins.

    Errors as in ``read_root``; ``StoreError`` where it cannot be written.
    """
    found = read_root(store)
    if found is not None:
        return found
    content = {
        "format": FORMAT,
        "version": list(VERSION),
        "run_id": uuid.uuid4().hex,
        "created": clock.utc_text(),
    }
    try:
        store.create(names.ROOT_FILE, canonical(content))
    except AlreadyExists:
        logger.debug("%s: another process created the root first", store.url)
    found = read_root(store)
    if found is None:
        raise StoreError(f"{store.url}/{names.ROOT_FILE}: was created and is not there; check the storage")
    return found


# ---------------------------------------------------------------- generations


def _numbers(store: Store) -> list[int]:
    found = (names.parse_generation_file(entry.name) for entry in store.list("generations"))
    return sorted(number for number in found if number is not None)


def highest_generation(store: Store) -> int:
    """Return the highest generation that has a record, readable or not; 0 where there is none."""
    return max(_numbers(store), default=0)


def _decode_generation(data: bytes, number: int, where: str) -> Generation:
    content = strict_loads(data, where=where, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(content, dict) or content.get("generation") != number:
        raise ManifestError(f"{where}: this is not the record of generation {number}")
    texts = [content.get(key) for key in ("nonce", "host", "owner", "time")]
    if not all(isinstance(text, str) for text in texts):
        raise ManifestError(f"{where}: nonce, host, owner and time must be strings")
    resumed = content.get("resumed_from")
    if resumed is not None:
        pair = resumed if isinstance(resumed, list) else []
        if len(pair) != 2 or not all(type(v) is int and v >= 0 for v in pair) or pair[0] >= number:
            raise ManifestError(f"{where}: resumed_from must be null or [lower generation, step], not {resumed!r}")
        resumed = (pair[0], pair[1])
    nonce, host, owner, time = map(str, texts)
    return Generation(number, nonce, host, owner, time, resumed)


def read_generations(store: Store) -> list[Generation]:
    """Return the readable generation records, lowest first; an unreadable one is skipped with a warning."""
    found = []
    for number in _numbers(store):
        name = names.generation_file(number)
        try:
            found.append(_decode_generation(store.read(name), number, f"{store.url}/{name}"))
        except (ManifestError, StoreError) as error:
            logger.warning("skipping the record of generation %d: %s", number, error)
    return found


def create_generation(
    store: Store, *, resumed_from: tuple[int, int] | None, host: str | None = None, owner: str = ""
) -> Generation:
    """Take the next generation number for this job start and record it durably.

    The number is above every record and every commit on the store; who loses a race takes the next.
    ``resumed_from`` is (generation, step) of what this job resumes from. Raises ``StoreError``.
    """
    number = max([highest_generation(store), *(c.generation for c in list_committed(store))]) + 1
    while True:
        record = Generation(
            number, secrets.token_hex(4), host or socket.gethostname(), owner, clock.utc_text(), resumed_from
        )
        content = {
            "generation": record.number,
            "nonce": record.nonce,
            "host": record.host,
            "owner": record.owner,
            "time": record.time,
            "resumed_from": None if resumed_from is None else list(resumed_from),
        }
        try:
            store.create(names.generation_file(number), canonical(content))
        except AlreadyExists:
            number = max(number, highest_generation(store)) + 1
            continue
        return record


# ---------------------------------------------------------------- commits


def as_committed(name: str) -> Committed | None:
    """Return the commit whose manifest has this name on the store, or None for any other name."""
    folder, _, leaf = name.partition("/")
    step, generation = names.parse_step_folder(folder), names.parse_manifest_name(leaf)
    return None if step is None or generation is None else Committed(step, generation, name)


def list_committed(store: Store, step: int | None = None) -> list[Committed]:
    """Return every manifest on the store (of one step) by its name, of any lineage, readable or not; lowest step first."""
    if step is None:
        folders = [f for f in store.list_folders("") if names.parse_step_folder(f) is not None]
    else:
        folders = [names.step_folder(step)]
    entries = (entry for folder in folders for entry in store.list(f"{folder}/"))
    return sorted(filter(None, (as_committed(entry.name) for entry in entries)))


def read_manifest(store: Store, committed: Committed) -> Manifest:
    """Read and check one manifest.

    Raises ``NotFound``, ``ManifestError`` (damaged, or not the step and generation that its name says),
    ``UnsupportedVersion`` or another ``StoreError`` (storage could not be asked).
    """
    return read_manifest_bytes(store, committed)[1]


def read_manifest_bytes(store: Store, committed: Committed) -> tuple[bytes, Manifest]:
    """Do the same, and return the file's bytes too."""
    where = f"{store.url}/{committed.manifest_path}"
    size = store.size(committed.manifest_path)
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{where}: {size} bytes are too many for a manifest (at most {MAX_MANIFEST_BYTES})")
    data = store.read(committed.manifest_path)
    return data, decode_manifest(data, where=where, step=committed.step, generation=committed.generation)


# ---------------------------------------------------------------- who is alive


def heartbeat(store: Store, generation: int) -> None:
    """Say that the job of this generation is alive; call it every minute or so. Raises ``StoreError``."""
    content = {"generation": generation, "host": socket.gethostname(), "time": clock.utc_text()}
    store.replace(names.generation_file(generation).removesuffix(".json") + _ALIVE, canonical(content))


def stop_heartbeat(store: Store, generation: int) -> None:
    """Say that the job of this generation is over. Raises ``StoreError``."""
    store.delete(names.generation_file(generation).removesuffix(".json") + _ALIVE)


def store_now(store: Store) -> float:
    """Return the present time by the store's own clock, in seconds since the epoch.

    It is the modification time of a probe written now: ages of files must not depend on this host's clock.
    """
    for _ in range(5):
        store.replace(_CLOCK_PROBE, secrets.token_hex(8).encode())
        times = [entry.modified for entry in store.list("generations") if entry.name == _CLOCK_PROBE]
        store.delete(_CLOCK_PROBE)
        if times:  # else another process that asks for the time removed it under us
            return times[0]
    raise StoreError(f"{store.url}/{_CLOCK_PROBE}: a file just written is not listed; the store's clock is unknown")


def live_generations(store: Store, within_s: float) -> Sequence[int]:
    """Return the generations whose last heartbeat is at most that many seconds old by the store's clock."""
    now = store_now(store)
    live = []
    for entry in store.list("generations"):
        if entry.name.endswith(_ALIVE) and now - entry.modified <= within_s:
            number = names.parse_generation_file(entry.name.removesuffix(_ALIVE) + ".json")
            if number is not None:
                live.append(number)
    return sorted(live)
