"""Keeping Python's cyclic collector out of work that makes very many objects at once."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_enabled = False


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Put off cyclic garbage collection inside ``with``, in the whole process; nests, and threads may overlap in it.

    A plan has tens of objects for each tensor, and all of them are in use: collections walk over them, and over all of
    the model's, again and again and find nothing. For 18,867 tensors that was two fifths of a save and of a load. On the
    training thread, wrap all of a save or load that it waits for: when what was made is gone again, there is nothing to
    look at. On other threads wrap planning only: training goes on beside them. A collector that the user has turned off
    stays off.
    """
    global _inside, _enabled
    with _lock:
        if _inside == 0:
            _enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside = max(0, _inside - 1)  # a child that was forked inside leaves without having come in
            if _inside == 0 and _enabled:
                gc.enable()


def _forked() -> None:
    """Begin anew in a child that was forked while another thread was inside."""
    global _inside, _lock
    _lock = threading.Lock()
    if _inside and _enabled:
        gc.enable()
    _inside = 0


os.register_at_fork(after_in_child=_forked)
