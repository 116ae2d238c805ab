"""Storage: bytes under names, durably. ``open_store`` turns a path or URL into a store."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from distckpt.errors import ConfigError
from distckpt.storage.base import Capabilities, Entry, Store, Writer
from distckpt.storage.memory import MemoryStore, shared_store
from distckpt.storage.objects import ObjectStore, parse_object_url
from distckpt.storage.objects_client import SERVICES
from distckpt.storage.posix import PosixStore

__all__ = [
    "Capabilities",
    "Entry",
    "MemoryStore",
    "ObjectStore",
    "PosixStore",
    "Store",
    "Writer",
    "check_location",
    "open_store",
]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_store(url: str | os.PathLike[str]) -> Store:
    """Return the store at a folder path, ``file:///folder`` (percent-encoded), ``s3://bucket/prefix``, ``gs://…``,
    ``az://…`` or ``memory://name``.

    Nothing is touched yet: a folder is made by the first write, a bucket must be there. Credentials and endpoints of
    object stores come from the environment (docs/storage.md). A memory store is shared by name in this process.
    Raises ``ConfigError`` for other schemes.
    """
    text = os.fspath(url)
    if not text or "\0" in text:
        raise ConfigError(f"storage location {text!r}: give a folder or a URL")
    check_location(text)
    match = _URL.fullmatch(text) if isinstance(url, str) else None
    if match is None:
        return PosixStore(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        path = rest.removeprefix("localhost")
        if not path.startswith("/"):
            raise ConfigError(f"storage location {text!r}: a file URL is file:///absolute/folder")
        return PosixStore(unquote(path, errors="surrogateescape"))
    if scheme == "memory":
        name = rest.strip("/")
        if not name:
            raise ConfigError(f"storage location {text!r}: a memory store needs a name, memory://name")
        return shared_store(name)
    if scheme in SERVICES:
        return parse_object_url(text, scheme, rest)
    raise ConfigError(
        f"storage location {text!r}: no store for {scheme}://; use a folder, file://, s3://, gs://, az:// or memory://"
    )


def check_location(text: str) -> None:
    """Refuse what was a URL before it became a ``Path``, which would be a local folder; raises ``ConfigError``."""
    if text.startswith(tuple(f"{scheme}:/" for scheme in SERVICES)) and "://" not in text:
        raise ConfigError(f"storage location {text!r}: a URL has two slashes; give it as text, a Path drops one")
