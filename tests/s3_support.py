"""An S3 server for the session, and ranks that may use it.

obstore does not survive a fork, and tests in this process use it. So ranks are forked by a process that was itself
forked before the first use (``CleanParent``), which otherwise is as warm as this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "canary-secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    "DISTCKPT_STORE_DEADLINE_S": "40",
}

PAGE = 100
"""Names that the server puts into one answer; services put 1,000."""


class CleanParent:
    """A fork of this process that runs ``run_ranks`` for it."""

    def __init__(self) -> None:
        self._here, there = Pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            self._here.close()
            with contextlib.suppress(BaseException):
                _serve(there)
            os._exit(0)
        there.close()

    def run_ranks(self, world_size: int, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Like ``ranks.run_ranks``; ``fn`` must be a module's own function, and arguments must pickle."""
        self._here.send((world_size, fn, args, options))
        if not self._here.poll(options.get("timeout_s", 60) + 60):
            raise TimeoutError("the parent of ranks does not answer")
        ok, value = self._here.recv()
        assert ok, value
        return list(value)

    def close(self) -> None:
        self._here.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _serve(pipe: Connection) -> None:
    while True:
        world_size, fn, args, options = pipe.recv()
        from ranks import run_ranks

        try:
            pipe.send((True, run_ranks(world_size, fn, *args, **options)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class S3:
    """The running server, and the process that forks ranks for it."""

    def __init__(self, port: int, ranks: CleanParent) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.ranks = ranks
        self._buckets = 0

    def ask(self, do: str, **fields: Any) -> Any:
        """Send a command to the server, see ``s3_server.Control``."""
        data = json.dumps({"do": do, **fields}).encode()
        request = urllib.request.Request(f"{self.endpoint}/_control", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    def bucket(self) -> str:
        """Make a new bucket and return its name."""
        self._buckets += 1
        name = f"bucket-{self._buckets:04}"
        self.ask("bucket", name=name)
        return name


@contextlib.contextmanager
def running() -> Iterator[S3]:
    """Run a server, and point obstore at it through the environment."""
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    )
    assert server.stdout is not None
    before = {name: os.environ.get(name) for name in (*VARIABLES, "AWS_ENDPOINT_URL")}
    port = int(server.stdout.readline())
    os.environ.update(VARIABLES, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    ranks = CleanParent()
    try:
        yield S3(port, ranks)
    finally:
        ranks.close()
        server.kill()
        server.wait()
        server.stdout.close()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
