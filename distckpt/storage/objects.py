"""A store in a bucket of S3 (and what speaks its protocol), Google Cloud Storage or Azure.

Objects appear whole or not at all, and nothing is renamed: a shard by a multipart upload under its unique name, a commit
by one conditional put. There are no folders: one that was made on purpose is an object ``.tmp-folder`` in it.
"""

from __future__ import annotations

import copy
import errno
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from distckpt import failpoints
from distckpt.config import ObjectStoreConfig
from distckpt.errors import AlreadyExists, ConfigError, StoreError
from distckpt.storage.base import Capabilities, Entry, Writer
from distckpt.storage.objects_bucket import Bucket
from distckpt.storage.objects_client import SERVICES
from distckpt.storage.objects_writer import ObjectWriter
from distckpt.storage.paths import TEMP_PREFIX, flat_bytes, split_folder, split_name

_FOLDER = f"{TEMP_PREFIX}folder"
_PROBE = f"{TEMP_PREFIX}probe-"
_Entries = list[Entry]


class ObjectStore:
    """Implements ``storage.base.Store`` below a prefix of a bucket. Nothing is sent before the first call.

    Every method raises ``StoreError`` or one of its kinds with the operation, the URL and what to do. A request and its
    repetitions end within ``settings.deadline_s`` seconds.
    """

    capabilities = Capabilities(random_write=False, folders=False, shared=True, latency=True)

    def __init__(self, scheme: str, bucket: str, prefix: str = "", settings: ObjectStoreConfig | None = None) -> None:
        """``ConfigError`` for a prefix that is no sequence of names."""
        self.bucket = Bucket(scheme, bucket, ObjectStoreConfig.from_env() if settings is None else settings)
        self.url = self.bucket.where(prefix)
        try:
            self._top = "".join(f"{part}/" for part in split_folder(prefix))
        except StoreError as error:
            raise ConfigError(f"storage location {self.url!r}: the prefix must be names joined by '/'") from error
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    # -- writing

    def create(self, name: str, data: bytes) -> None:
        """See ``Store.create``. ``StoreError`` (EOPNOTSUPP) where the store ignores if-none-match."""
        key = self._key(name)
        failpoints.hit("create.before_temp", name)
        self.check_conditional()
        self.bucket.put_new(key, bytes(data))
        self._count("creates", 1)
        self._count("bytes_written", len(data))
        failpoints.hit("create.linked", name)
        failpoints.hit("create.synced", name)

    def open_writer(self, name: str, size: int) -> Writer:
        """See ``Store.open_writer``. The name should be unique: of two writers at once the later commit stays."""
        key = self._key(name)
        if size < 0:
            what = f"open for writing: an object cannot have {size} bytes"
            raise StoreError(errno.EINVAL, what, self.bucket.where(key))
        if self.bucket.head(key) is not None:
            raise AlreadyExists(errno.EEXIST, "open for writing: the name is taken", self.bucket.where(key))
        writer = ObjectWriter(self.bucket, key, size, name=name, count=self._count)
        failpoints.hit("writer.opened", name)
        return writer

    def replace(self, name: str, data: bytes) -> None:
        """See ``Store.replace``."""
        self.bucket.put(self._key(name), bytes(data))
        self._count("creates", 1)
        self._count("bytes_written", len(data))

    # -- reading

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See ``Store.read``."""
        content = bytes(self.bucket.get(self._key(name), offset, size))
        self._count("opens", 1)
        self._count("bytes_read", len(content))
        return content

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``. A large destination is filled by several requests at once."""
        view = flat_bytes(memoryview(destination), writable=True)
        self.bucket.fill(self._key(name), offset, view)
        self._count("opens", 1)
        self._count("bytes_read", len(view))

    def size(self, name: str) -> int:
        """See ``Store.size``."""
        return self.bucket.size(self._key(name))

    def list(self, prefix: str = "") -> Iterable[Entry]:
        """See ``Store.list``; sorted by name."""
        self._count("lists", 1)
        return [entry for entry in self._walk(prefix) if not _is_temporary(entry.name)]

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """See ``Store.list_folders``: last components only, sorted."""
        self._count("lists", 1)
        return [name for name in self.bucket.folders(self._folder_key(prefix)) if not name.startswith(TEMP_PREFIX)]

    # -- removing

    def delete(self, name: str) -> None:
        """See ``Store.delete``. Services do not say whether there was anything, so each call counts."""
        key = self._key(name)
        failpoints.hit("delete.before", name)
        self.bucket.delete(key)
        self._count("deletes", 1)

    def remove_folder(self, name: str) -> None:
        """See ``Store.remove_folder``: a folder without objects exists only if ``make_folder`` made it."""
        parts = split_folder(name)
        if parts:
            marker = "/".join((*parts, _FOLDER))
            if [entry.name for entry in self._walk(name, at_most=2)] == [marker]:
                self.bucket.delete(self._top + marker)

    def sweep_temporaries(self, folder: str, older_than_s: float) -> int:
        """Remove the probes that killed processes left in the root; returns how many. Age by the store's clock."""
        if split_folder(folder):
            return 0
        found = [entry for entry in self._walk("", flat=True) if entry.name.startswith(_PROBE)]
        if not found:
            return 0
        clock_probe = self._probe()
        self.bucket.put(clock_probe, b"")
        facts = self.bucket.head(clock_probe)
        self.bucket.delete(clock_probe)
        present = facts["last_modified"].timestamp() if facts is not None else 0.0
        old = [entry for entry in found if present - entry.modified >= older_than_s]
        for entry in old:
            self.bucket.delete(self._top + entry.name)
        return len(old)

    # -- folders

    def make_folder(self, name: str, *, exclusive: bool = False) -> None:
        """See ``Store.make_folder``: an object ``.tmp-folder``, which no listing shows, stands for it."""
        folder = self._folder_key(name)
        if exclusive:
            if not split_folder(name) or self._walk(name, at_most=1):
                raise AlreadyExists(errno.EEXIST, "make folder: the name is taken", self.bucket.where(folder))
            self.check_conditional()
            self.bucket.put_new(f"{folder}/{_FOLDER}", secrets.token_bytes(16))  # whose bytes it has tells who won
        elif split_folder(name):
            self.bucket.put(f"{folder}/{_FOLDER}", b"")

    def sync_folder(self, name: str) -> None:
        """See ``Store.sync_folder``: nothing to do, an object that was acknowledged is durable."""
        split_folder(name)
        self._count("folder_syncs", 1)

    # -- trying out

    def tuned(self, settings: ObjectStoreConfig) -> ObjectStore:
        """Return the same store with other parts, over the connections of this one."""
        made = copy.copy(self)
        made.bucket = self.bucket.tuned(settings)
        return made

    def clear(self) -> None:
        """Remove every object below the prefix, temporary ones too; ``StoreError`` (EPERM) where that is a whole bucket."""
        if not self._top:
            raise StoreError(errno.EPERM, "clear: this would empty the whole bucket", self.url)
        for entry in self._walk(""):
            self.bucket.delete(self._top + entry.name)

    # -- inside

    def check_conditional(self) -> None:
        """Find out, once per bucket and process, whether a commit can be safe there; ``StoreError`` if it cannot."""
        self.bucket.check_conditional(self._probe())

    def _probe(self) -> str:
        return f"{self._top}{_PROBE}{secrets.token_hex(8)}"

    def _key(self, name: str) -> str:
        return self._top + "/".join(split_name(name))

    def _folder_key(self, name: str) -> str:
        return (self._top + "/".join(split_folder(name))).removesuffix("/")

    def _walk(self, folder: str, *, at_most: int | None = None, flat: bool = False) -> _Entries:
        """Return all objects below a folder, temporary ones too; stops early after ``at_most``."""
        found = self.bucket.walk(self._folder_key(folder), at_most=at_most, flat=flat)
        return [Entry(m["path"][len(self._top) :], int(m["size"]), m["last_modified"].timestamp()) for m in found]

    def _count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counters[what] += amount


def _is_temporary(name: str) -> bool:
    return any(part.startswith(TEMP_PREFIX) for part in name.split("/"))


def parse_object_url(text: str, scheme: str, rest: str) -> ObjectStore:
    """Return the store at ``scheme://bucket/prefix``; ``ConfigError`` says what is wrong with another form."""
    what = f"storage location {text!r}"
    if "?" in rest or "#" in rest:
        variables = SERVICES[scheme][1]
        raise ConfigError(f"{what}: options and credentials come from the environment ({variables}), not the URL")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:  # never shown: it may hold a password
        raise ConfigError(f"storage location {scheme}://…@…: credentials come from the environment, not the URL")
    if not bucket:
        raise ConfigError(f"{what}: want {scheme}://bucket or {scheme}://bucket/prefix")
    return ObjectStore(scheme, bucket, prefix.strip("/"))
