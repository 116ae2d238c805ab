"""Shards whose bytes are made on demand: few threads make them while others write, and the file is the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from builders import Together

from distckpt.boxes import Box
from distckpt.format.placing import Piece
from distckpt.format.shard import plan_shard
from distckpt.importers.stream_shard import write_pieces
from distckpt.storage import MemoryStore

REQUEST = 1 << 20
NAME = "step-0000000001/g0001-a0/00000-of-00001.safetensors"


@pytest.mark.parametrize("making", [1, 2])
def test_few_threads_make_bytes_while_others_write(making: int) -> None:
    content = np.random.default_rng(0).bytes(8 * REQUEST)
    inside, most, lock = 0, 0, threading.Lock()

    def fill(piece: int, start: int, stop: int, view: memoryview) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        view[:] = content[piece * REQUEST + start : piece * REQUEST + stop]
        threading.Event().wait(0.02)
        with lock:
            inside -= 1

    pieces = [Piece(f"t{i}", "uint8", (REQUEST,), Box.whole((REQUEST,))) for i in range(8)]
    plan = plan_shard(pieces, rank=0, world_size=1, save_id="s", objects={})
    store = Together(4)
    write_pieces(store, NAME, plan, fill, threads=4, making=making, request=REQUEST)
    assert most == making
    data = bytes(store.read(NAME))
    assert data[plan.data_start :] == content


@pytest.mark.parametrize(
    ("sizes", "requests"),
    [
        ([700_000] * 3, [700_000] * 3),
        ([3 * REQUEST + 1, 300_000, 400_000], [REQUEST] * 3 + [700_001]),
        ([100, 2 * REQUEST, 5, 7, REQUEST - 12], [100, REQUEST, REQUEST, REQUEST]),
    ],
)
def test_what_does_not_fit_into_a_request_begins_one(sizes: list[int], requests: list[int]) -> None:
    """So that a request uses up what was fetched ahead for it; they begin in the file's order, whichever thread is free."""
    made: list[tuple[int, int]] = []
    written: list[int] = []

    def fill(piece: int, start: int, stop: int, view: memoryview) -> None:
        made.append((piece, start))
        view[:] = bytes(len(view))

    pieces = [Piece(f"t{i}", "uint8", (size,), Box.whole((size,))) for i, size in enumerate(sizes)]
    plan = plan_shard(pieces, rank=0, world_size=1, save_id="s", objects={})
    assert list(plan.order) == list(range(len(sizes)))
    write_pieces(MemoryStore(), NAME, plan, fill, threads=4, making=1, request=REQUEST, progress=written.append)
    assert made == [(i, at) for i in plan.order for at in range(0, sizes[i], REQUEST)]
    assert sorted(written) == sorted(requests)
