"""A root of its own below a place that is to be tried out, and its removal with everything in it."""

from __future__ import annotations

import errno
import os
import secrets
from typing import Any

from distckpt.errors import ConfigError, StoreError
from distckpt.storage import MemoryStore, ObjectStore, PosixStore, open_store
from distckpt.storage.base import Store
from distckpt.storage.facts import object_facts, posix_facts
from distckpt.storage.memory import forget
from distckpt.storage.paths import mapped

PREFIX = "distckpt-bench-"


def scratch_name() -> str:
    """Return a name that nobody else uses."""
    return f"{PREFIX}{secrets.token_hex(6)}"


def scratch_url(target: str, name: str) -> str:
    """Return the location ``name`` below a target: a folder or a URL, as ``open_store`` takes it."""
    return f"{target.rstrip('/')}/{name}"


def target_facts(target: str) -> dict[str, Any]:
    """Look at a place that is to be tried out; return what is known of it (``posix_facts``, ``object_facts``).

    ``ConfigError`` for what cannot be used: no such scheme, folder or bucket, no right to write, no safe commits. A
    folder must be there already: made here, it might lie on another file system than the one that is meant.
    """
    store = open_store(target)
    if isinstance(store, PosixStore):
        if not os.path.isdir(store.root):
            raise ConfigError(f"{target}: no such folder; name one that is on the file system in question")
        facts = posix_facts(store.root)
        if not facts["writable"]:
            raise ConfigError(f"{target}: cannot be written (owner, mode, read-only or full)")
        return facts
    if isinstance(store, ObjectStore):
        facts = object_facts(store)
        if facts["problem"] is not None:
            raise ConfigError(f"{target}: {facts['problem']}")
        return facts
    return {"path": store.url, "free_bytes": None}


def remove_scratch(store: Store) -> list[str]:
    """Remove a scratch root and everything in it, also what killed writers left; return what could not be removed.

    Every process that has written to it calls this once it has stopped: whoever is last leaves nothing. Refuses, with
    ``ConfigError``, a root that is not named by ``scratch_name``.
    """
    _check_scratch(store)
    if isinstance(store, PosixStore):
        return _remove_tree(store.root)
    try:
        if isinstance(store, ObjectStore):
            store.clear()
        else:
            remove_names(store)
        left = [entry.name for entry in store.list("")]
    except StoreError as error:
        return [f"{store.url}: {error}"]
    if isinstance(store, MemoryStore):
        forget(store.url.removeprefix("memory://"))
    return [f"{store.url}/{name}" for name in left]


def remove_file(store: Store, name: str) -> None:
    """Remove one file of a scratch root; absent is fine. Raises ``StoreError``, ``ConfigError``."""
    _check_scratch(store)
    store.delete(name)


def remove_names(store: Store, top: str = "") -> None:
    """Remove what lies below a folder of a scratch root, and the folder. Raises ``StoreError``, ``ConfigError``."""
    _check_scratch(store)
    for entry in store.list(top):
        store.delete(entry.name)
    folders, found = [top], [top] if top else []
    while folders:
        here = folders.pop()
        below = [f"{here}/{name}" if here else name for name in store.list_folders(here)]
        found += below
        folders += below
    for folder in sorted(found, key=len, reverse=True):
        store.remove_folder(folder)


def _check_scratch(store: Store) -> None:
    if not store.url.rstrip("/").rpartition("/")[2].startswith(PREFIX):
        raise ConfigError(f"{store.url}: not a scratch root; nothing was removed")


def _remove_tree(root: str) -> list[str]:
    """Unlink what is below a folder, and the folder: links themselves, never what they point to."""
    left = []
    for here, folders, files in os.walk(root, topdown=False):
        for names, remove in ((files, os.unlink), (folders, _remove_folder)):
            for name in names:
                path = os.path.join(here, name)
                try:
                    remove(path)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        left.append(f"{path}: {error.strerror}")
    try:
        with mapped("remove", root):
            os.rmdir(root)
    except StoreError as error:
        if error.errno != errno.ENOENT:
            left.append(str(error))
    return left


def _remove_folder(path: str) -> None:
    (os.unlink if os.path.islink(path) else os.rmdir)(path)
