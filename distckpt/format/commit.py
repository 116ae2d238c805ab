"""The only place that makes a checkpoint visible: one manifest, created exclusively, is the commit point.

The whole sequence, of which this module does 1 and 4 and answers 5:

1. Rank 0 makes the attempt folder (``begin_attempt``), its parents durable.
2. Each rank creates its shard exclusively, writes, fsyncs and closes it, and fsyncs the attempt folder.
3. Receipts meet in the agreement; rank 0 checks that boxes tile every tensor exactly once.
4. Rank 0 publishes the manifest under its final name, never replacing (``commit``), durable up to the root.
5. The verdict goes to all ranks; in doubt they read storage, which is the truth (``is_committed``).

An error while publishing answers nothing: a reply may be lost after the manifest was stored. So after any
error the name is read back and its bytes compared.
"""

from __future__ import annotations

import logging

from distckpt import failpoints
from distckpt.errors import (
    AlreadyExists,
    CommitInDoubt,
    CorruptCheckpoint,
    NotFound,
    SaveFailed,
    StaleGeneration,
    StoreError,
    UnsupportedVersion,
)
from distckpt.format import names
from distckpt.format.lineage import Committed, highest_generation, read_generations, read_manifest
from distckpt.format.manifest import Manifest, decode_manifest, encode_manifest
from distckpt.storage.base import Store

logger = logging.getLogger("distckpt")


def begin_attempt(store: Store, *, step: int, generation: int, nonce: str) -> str:
    """Make the step's folder and in it a new attempt folder, durably; return the attempt's name.

    Raises ``AlreadyExists`` if the attempt is there (take another nonce), ``StoreError`` if storage refuses.
    """
    # (1) Rank 0 makes the attempt folder and fsyncs its parents. A step may have several attempts, of this
    # and of other jobs; an attempt belongs to one.
    attempt = names.attempt_name(generation, nonce)
    store.make_folder(f"{names.step_folder(step)}/{attempt}", exclusive=True)
    return attempt


def commit(store: Store, manifest: Manifest, *, check_fencing: bool = True) -> str:
    """Publish a checkpoint whose shards are all durable; returns the manifest's name on the store.

    Returning means durable. Raises ``StaleGeneration`` if a newer job has started, ``SaveFailed`` if this
    step of this generation is committed already by another save, ``CommitInDoubt`` if storage cannot say
    whether it happened, else the storage's own error: nothing was committed then.
    """
    step = names.step_folder(manifest.step)
    path = f"{step}/{names.manifest_name(manifest.generation)}"
    data = encode_manifest(manifest)
    # (2), (3) are done: every shard is durable, receipts are checked. A newer job's start ends our right to
    # commit. Safety does not rest on this check: a stale manifest that slips through is a stray.
    if check_fencing:
        _check_fencing(store, manifest)
    try:
        failpoints.hit("commit.before_manifest", path)
        # (4) All or nothing under its final name, never replacing; durable with every folder up to the root.
        store.create(path, data)
        failpoints.hit("commit.after_manifest", path)
    except Exception as error:
        _resolve(store, step, path, data, error)
    # (5) The caller tells the other ranks.
    return path


def is_committed(store: Store, step: int, generation: int, save_id: str) -> bool:
    """Whether the save with this id is committed, for ranks that did not get the verdict.

    A torn or damaged manifest is no commit (readers will not accept it). Raises ``StoreError`` where storage
    cannot be asked.
    """
    path = f"{names.step_folder(step)}/{names.manifest_name(generation)}"
    try:
        return read_manifest(store, Committed(step, generation, path)).save_id == save_id
    except NotFound:
        return False
    except (CorruptCheckpoint, UnsupportedVersion) as error:
        logger.warning("save %s of step %d does not count as committed: %s", save_id, step, error)
        return False


def _check_fencing(store: Store, manifest: Manifest) -> None:
    newest = highest_generation(store)
    if newest <= manifest.generation:
        return
    known = [record for record in read_generations(store) if record.number == newest]
    who = f" (started {known[0].time} on {known[0].host} by {known[0].owner or 'unknown'})" if known else ""
    raise StaleGeneration(
        f"{store.url}: step {manifest.step} of generation {manifest.generation} was not committed: "
        f"generation {newest}{who} now owns this root; stop this job, or give it another checkpoint folder"
    )


def _resolve(store: Store, step: str, path: str, data: bytes, error: Exception) -> None:
    """Find out what an error while publishing means; returns if the manifest is committed after all."""
    where = f"{store.url}/{path}"
    try:
        found = store.read(path)
    except NotFound:
        raise error from None
    except StoreError as unreadable:
        raise CommitInDoubt(
            f"{where}: publishing failed ({error}) and reading back failed ({unreadable}); whether the "
            "checkpoint is committed is unknown, and the next start finds out"
        ) from error
    if found != data:
        raise SaveFailed(
            f"{where}: this step is already committed by {_owner(found, where)}; a commit is never "
            "replaced: save another step, or start a new generation"
        ) from error
    if isinstance(error, AlreadyExists):
        logger.info("%s: our own earlier write of this manifest was found", where)
    try:
        # What failed may have been a folder's fsync after the link: visible is not yet durable.
        store.sync_folder(step)
        store.sync_folder("")
    except StoreError as unsynced:
        raise CommitInDoubt(
            f"{where}: the manifest is there, but its folder cannot be made durable ({unsynced}); a power "
            "cut may undo it"
        ) from error
    logger.warning("%s: committed, though storage reported an error: %s", where, error)


def _owner(data: bytes, where: str) -> str:
    try:
        winner = decode_manifest(data, where=where)
    except (CorruptCheckpoint, UnsupportedVersion) as error:
        return f"something unreadable ({error})"
    return f"save {winner.save_id} of generation {winner.generation} at {winner.time}"
