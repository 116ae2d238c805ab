"""Names on a store, and the one mapping from operating system errors to ``StoreError``."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from distckpt.errors import AlreadyExists, NotFound, StoreError

TEMP_PREFIX = ".tmp-"
"""Files of our own that are not published yet; no name may have such a component, and listings skip them."""

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO})
_ADVICE = {
    errno.EEXIST: "names on a store are never replaced",
    errno.ENOSPC: "free some space or choose another root",
    errno.EDQUOT: "the quota is used up: free some space or choose another root",
    errno.EFBIG: "the file size limit is reached (ulimit -f, or the file system's own)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "check the owner and the mode of the folders on the way",
    errno.ENOTDIR: "a part of the path is no folder (a link inside a root is never followed)",
    errno.ELOOP: "a link inside a root is never followed",
    errno.EIO: "the device or the server lost data: see the kernel log",
    errno.ESTALE: "the file server no longer knows the file",
}


def split_name(name: str) -> tuple[str, ...]:
    """Return the components of a file's name.

    Raises ``StoreError`` (EINVAL, or ENAMETOOLONG over 255 bytes) for a name not strictly relative and
    below the root: empty, absolute, with ``.``, ``..``, an empty component, NUL, or a temporary name.
    """
    parts = tuple(name.split("/"))
    for part in parts:
        if part in ("", ".", "..") or "\0" in part or part.startswith(TEMP_PREFIX):
            raise StoreError(errno.EINVAL, "not a name below the root of a store", name)
        try:
            encoded = os.fsencode(part)
        except UnicodeEncodeError:
            raise StoreError(errno.EINVAL, "the name has no encoding on this system", repr(name)) from None
        if len(encoded) > 255:
            raise StoreError(errno.ENAMETOOLONG, "a component of the name is longer than 255 bytes", name)
    return parts


def split_folder(name: str) -> tuple[str, ...]:
    """Return the components of a folder's name; ``""`` is the root, and one slash at the end is allowed."""
    return split_name(name.removesuffix("/")) if name else ()


def flat_bytes(data: memoryview, *, writable: bool = False) -> memoryview:
    """Return ``data`` as a flat view of bytes; ``StoreError`` (EINVAL) where that would take a copy."""
    if not data.c_contiguous or (writable and data.readonly):
        raise StoreError(errno.EINVAL, f"a {'writable ' if writable else ''}contiguous buffer is needed")
    # A view with a zero in its shape cannot be cast, and has no bytes anyway.
    return data.cast("B") if data.nbytes else memoryview(bytearray())


def check_range(name: str, offset: int, size: int | None, available: int) -> int:
    """Return how many bytes a read of ``size`` (``None``: the rest) gives; ``StoreError`` past the end."""
    wanted = available - offset if size is None else size
    if offset < 0 or wanted < 0 or offset + wanted > available:
        end = "end" if size is None else offset + size
        what = f"read: [{offset}, {end}) reaches outside a file of {available} bytes"
        raise StoreError(errno.ENODATA, what, name)
    return wanted


def store_error(error: OSError, operation: str, path: str, *, reading: bool = False) -> StoreError:
    """Return the ``StoreError`` for an operating system error; errno is kept, the path becomes its filename.

    ``reading``: a name that lies below a file or a link does not exist on the store, so it is ``NotFound``.
    """
    if isinstance(error, StoreError):
        return error
    code = error.errno or errno.EIO
    kind: type[StoreError] = StoreError
    if code == errno.ENOENT or (reading and code in _ABSENT):
        kind = NotFound
    elif code == errno.EEXIST:
        kind = AlreadyExists
    advice = _ADVICE.get(code)
    reason = error.strerror or os.strerror(code)
    return kind(code, f"{operation}: {reason}" + (f" ({advice})" if advice else ""), path)


@contextmanager
def mapped(operation: str, path: str, *, reading: bool = False) -> Iterator[None]:
    """Turn every ``OSError`` of the block into the ``StoreError`` for this operation on this path."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise store_error(error, operation, path, reading=reading) from error
