"""One rank of a pool: a process that is started once, keeps its memory, and runs what the driver sends.

    python -m benchmarks.worker FD      (started by benchmarks.pool, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set)

A command is a module-level function, called as ``fn(worker, *args)``; its result or its error goes back.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.payload import Live
    from benchmarks.peers.base import Peer

TIMEOUT_S = 600


class Worker:
    """What a rank keeps from command to command."""

    def __init__(self, rank: int, world: int) -> None:
        from benchmarks.payload import Arena, Noise

        self.rank, self.world = rank, world
        self.arena, self.scratch, self.idle, self.noise = Arena(), Arena(), Arena(), Noise()
        self.odd = False
        """Which half of ``idle`` was used last."""
        self.live: Live | None = None
        self.peers: dict[str, Peer] = {}
        self.kept: dict[str, Any] = {}
        """Whatever a job's own commands want to find again."""

    def peer(self, name: str) -> Peer:
        """Return the adapter, made at its first use for the current state."""
        from benchmarks.peers import make

        if name not in self.peers:
            self.peers[name] = make(name)
        return self.peers[name]

    def close_peers(self) -> None:
        """End what adapters run in the background, and forget them."""
        peers, self.peers = self.peers, {}
        for peer in peers.values():
            peer.close()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


def serve(connection: Connection) -> None:
    """Run commands until the driver closes the connection."""
    import torch
    import torch.distributed as dist

    logging.getLogger("distckpt").setLevel(logging.ERROR)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    worker = Worker(rank, world)
    connection.send(("value", os.getpid()))
    while True:
        try:
            command: tuple[Callable[..., Any], tuple[Any, ...]] | None = connection.recv()
        except EOFError:
            command = None
        if command is None:
            break
        fn, args = command
        started = time.perf_counter()
        try:
            reply: tuple[str, Any] = ("value", fn(worker, *args))
        except Exception as error:
            traceback.print_exc()
            reply = ("error", f"{type(error).__name__}: {error}".strip())
        print(f"{fn.__name__}: {time.perf_counter() - started:.3f} s", flush=True)
        connection.send(reply)
    with contextlib.suppress(Exception):
        worker.close_peers()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the driver
    if os.getppid() != parent:
        os._exit(1)
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # adapters' threads and children are not waited for


if __name__ == "__main__":
    main()
