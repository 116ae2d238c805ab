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
