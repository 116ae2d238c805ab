"""Rank processes as the driver sees them: started once, used for many measurements, killed when one of them hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 180.0
TUNABLES = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=65536"}
"""Environment of all processes, as the launchers of launch/ have it: copies of memory go past the caches."""
GRACE_S = 15.0
"""How long the other ranks may go on after one of them has failed: they may wait for it in a collective."""


class RanksFailed(RuntimeError):
    """Some rank raised, died or took too long; the text has each rank's error, in one line."""


class Pool:
    """``world`` processes in one gloo group. After a failure it is empty, and the next call starts it anew."""

    def __init__(self, world: int, name: str, logs: Path) -> None:
        self.world, self.name = world, name
        self.starts = 0
        """How often processes were started: whatever they held before is gone."""
        self._logs = logs
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection, IO[bytes]]] = []

    @property
    def alive(self) -> bool:
        """Whether the processes are there."""
        return bool(self._ranks)

    def start(self) -> None:
        """Start the processes and wait until they have joined their group."""
        if self._ranks:
            return
        self.starts += 1
        port = _free_port()
        for rank in range(self.world):
            ours, theirs = socket.socketpair()
            env = {
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.world)),
                **TUNABLES,
                "GLOO_SOCKET_IFNAME": "lo", "RES_OPTIONS": "attempts:0", "TORCH_CPP_LOG_LEVEL": "ERROR",
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            }  # fmt: skip
            log = open(self._logs / f"{self.name}-{rank}.log", "ab")  # noqa: SIM115 - closed by close
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdout=log, stderr=log, env=env, cwd=self._logs, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self._ranks.append((process, Connection(ours.detach()), log))
        self._collect(START_TIMEOUT_S)

    def call(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """Run ``fn(worker, *args)`` on every rank at once; return the results in rank order.

        Raises ``RanksFailed``. If only some ranks raised, or one died or hangs, all are killed: their collectives no
        longer match.
        """
        self.start()
        for _, connection, _ in self._ranks:
            with contextlib.suppress(OSError):  # a dead rank is found below
                connection.send((fn, args))
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        replies: dict[int, tuple[str, Any]] = {}
        end = time.monotonic() + timeout_s
        waiting = {connection: rank for rank, (_, connection, _) in enumerate(self._ranks)}
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    replies[rank] = connection.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    replies[rank] = ("died", self._died(rank))
                if replies[rank][0] != "value":
                    end = min(end, time.monotonic() + GRACE_S)
        failed = any(kind != "value" for kind, _ in replies.values())
        for rank in waiting.values():
            replies[rank] = ("hangs", "waits for it" if failed else f"no answer within {timeout_s:.0f} s")
        kinds = {kind for kind, _ in replies.values()}
        if kinds == {"value"}:
            return [replies[rank][1] for rank in range(self.world)]
        text = "; ".join(f"rank {r}: {t}" for r, (kind, t) in sorted(replies.items()) if kind != "value")
        if kinds != {"error"}:
            self.kill()
        raise RanksFailed(" ".join(text.split()))

    def _died(self, rank: int) -> str:
        process, _, log = self._ranks[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        tail = Path(log.name).read_bytes()[-300:].decode(errors="replace")
        return f"died with status {process.returncode}: …{tail}"

    def close(self) -> None:
        """Let the processes end, and kill those that do not."""
        for process, connection, _ in self._ranks:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self.kill()

    def kill(self) -> None:
        """Kill the processes and all that they have started."""
        ranks, self._ranks = self._ranks, []
        for process, connection, log in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(OSError):
                connection.close()
            log.close()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
