"""What the tests of removal share."""

from __future__ import annotations

import pytest
from builders import build_checkpoint, prepare

from distckpt.format import names
from distckpt.format.lineage import Committed, list_committed
from distckpt.format.verify import verify
from distckpt.manager import gc
from distckpt.manager.gc import collect
from distckpt.storage.base import Store

DAY = 86400.0


def steps(store: Store, *numbers: int, generation: int = 1) -> list[Committed]:
    return [build_checkpoint(store, n, generation=generation, tensors={}) for n in numbers]


def collected(store: Store, remove: list[Committed], **more: object) -> gc.GcReport:
    options = {"current_generation": 1, "dry_run": False, **more}
    return collect(store, remove=remove, **options)  # type: ignore[arg-type]


def files(store: Store) -> set[str]:
    return {entry.name for entry in store.list()}


def later(monkeypatch: pytest.MonkeyPatch, store: Store, seconds: float) -> None:
    """Let the store's clock (not this host's) show a later time."""
    now = gc.store_now(store)
    monkeypatch.setattr(gc, "store_now", lambda store: now + seconds)


def all_whole(store: Store) -> bool:
    return all(verify(store, c, mode="full").ok for c in list_committed(store))


def orphan(store: Store, step: int, generation: int) -> str:
    return f"{names.step_folder(step)}/{prepare(store, step, generation, tensors={}).attempt}"
