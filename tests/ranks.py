"""Run a function on several ranks: processes forked from the warm test process, so torch is imported once.

``run_ranks(2, fn, arg)`` calls ``fn(rank, arg)`` in two processes that share a gloo group (``backend=None``:
only the store, see ``store()``) and returns the two results in rank order. ``check=False`` returns
``RankOutcome``s instead, for tests in which ranks are meant to raise or die. No process outlives the call.

The parent must never hold a process group, nor a CUDA context, itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
import torch._dynamo  # the first optimizer of a process imports it, for a second: once here, not in every rank
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_store: Store | None = None
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_TAIL = 20_000  # bytes of a rank's output that are kept


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended: a value, or an exception, or a signal (``timed_out``: killed by ``run_ranks``)."""

    rank: int
    value: Any = None
    error: str | None = None  # "Kind: message" of what fn raised
    signal: int | None = None
    kind: str | None = None  # class name of the exception
    traceback: str = ""
    output: str = ""  # tail of the rank's stdout and stderr
    exit_code: int | None = None
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether fn returned."""
        return self.error is None and self.signal is None and self.exit_code == 0 and not self.timed_out


class RanksFailed(AssertionError):
    """Some rank raised, died or hung; the text has every rank's traceback. ``outcomes`` has the details."""

    def __init__(self, message: str, outcomes: list[RankOutcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


@dataclass
class _Child:
    rank: int
    pid: int
    result: int  # the parent's read end
    log: IO[bytes]
    data: bytearray = field(default_factory=bytearray)
    status: int | None = None
    hung: bool = False  # still running when the time was over


def store() -> Store:
    """Return, inside a rank, the store that all ranks of this call share."""
    assert _store is not None, "store() is only there inside run_ranks"
    return _store


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60,
    backend: str | None = "gloo",
    env: Mapping[str, str] | None = None,
    expect: Mapping[int, int] | None = None,
    check: bool = True,
    store_host: Literal["rank0", "agent"] = "rank0",
) -> list[Any]:
    """Run ``fn(rank, *args)`` on every rank and return the results in rank order.

    ``expect`` maps ranks to the signal each must die of (their result is None). ``store_host="agent"`` keeps
    the store in a process of its own, as torchrun does, so that it outlives rank 0. Results must pickle;
    fn and args need not.

    Raises:
        RanksFailed: with ``check``, when a rank raised, died unexpectedly, or still ran after ``timeout_s``.
    """
    assert not dist.is_initialized(), "the test process must not hold a process group"
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    # Ranks leave together, when the parent closes this pipe: rank 0 may host the store that others still use.
    go_read, go_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    children: list[_Child] = []
    try:
        hosts = [-1] if store_host == "agent" else []
        for rank in hosts + list(range(world_size)):
            is_host = rank == (-1 if hosts else 0)
            work = _Work(rank, world_size, listener, is_host, backend, dict(env or {}), go_read, timeout_s)
            children.append(_fork(work, fn, args, go_write, children))
        listener.close()
        os.close(go_read)
        go_read = -1
        _collect([child for child in children if child.rank >= 0], timeout_s)
    finally:
        listener.close()
        if go_read >= 0:
            os.close(go_read)
        os.close(go_write)
        _reap(children)
    outcomes = [_outcome(child) for child in children if child.rank >= 0]
    if not check:
        return outcomes
    expect = dict(expect or {})
    if any(o.signal != expect[o.rank] if o.rank in expect else not o.ok for o in outcomes):
        raise RanksFailed(_describe(outcomes, timeout_s), outcomes)
    return [o.value for o in outcomes]


@dataclass(frozen=True)
class _Work:
    rank: int
    world_size: int
    listener: socket.socket
    is_host: bool
    backend: str | None
    env: dict[str, str]
    go_read: int
    timeout_s: float


def _fork(work: _Work, fn: Callable[..., Any], args: tuple[Any, ...], go: int, others: list[_Child]) -> _Child:
    read_end, write_end = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _outcome
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Child(work.rank, pid, read_end, log)
    try:
        gc.freeze()  # what the parent made is not walked again in every rank: its pages stay shared
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.setsid()
        for fd in (read_end, go, *(child.result for child in others)):
            os.close(fd)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        _child(work, fn, args, write_end)
    finally:
        os._exit(3)


def _child(work: _Work, fn: Callable[..., Any], args: tuple[Any, ...], write_end: int) -> None:
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115
    if work.timeout_s > 2:  # show where a hanging rank hangs
        faulthandler.dump_traceback_later(work.timeout_s - 1, file=sys.stderr)
    os.environ.update(work.env)
    rank, world = str(work.rank), str(work.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    port = work.listener.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        torch.set_num_threads(1)
        _connect(work, port)
        value = None
        if work.rank >= 0:
            if work.backend is not None:
                dist.init_process_group(
                    work.backend, store=_store, rank=work.rank, world_size=work.world_size,
                    timeout=timedelta(seconds=max(work.timeout_s, 5)),
                )  # fmt: skip
            value = fn(work.rank, *args)
            faulthandler.cancel_dump_traceback_later()
        report: tuple[Any, ...] = ("value", value)
        data = pickle.dumps(report)
    except BaseException as error:  # a rank's SystemExit and KeyboardInterrupt are outcomes too
        text = traceback.format_exc()
        data = pickle.dumps(("error", type(error).__name__, f"{type(error).__name__}: {error}", text))
    view = memoryview(len(data).to_bytes(8, "little") + data)
    while view:
        view = view[os.write(write_end, view) :]
    os.close(write_end)
    with contextlib.suppress(OSError):
        os.read(work.go_read, 1)  # EOF when every rank is done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _connect(work: _Work, port: int) -> None:
    """Join the store; its host takes over the socket that the parent bound, so no port is lost to a race."""
    global _store
    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    timeout = timedelta(seconds=max(work.timeout_s, 5))
    options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False}
    if work.is_host:
        fd = os.dup(work.listener.fileno())
        _store = tcp_store("127.0.0.1", port, None, True, master_listen_fd=fd, **options)
    work.listener.close()
    if not work.is_host:
        _store = tcp_store("127.0.0.1", port, None, False, **options)


def _collect(children: list[_Child], timeout_s: float) -> None:
    """Read every rank's report until it is whole or the rank is dead; those that do neither are hung."""
    end = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for child in children:
            os.set_blocking(child.result, False)
            death = os.pidfd_open(child.pid)  # the pipe alone would not tell: a rank's own children may hold it
            stack.callback(os.close, death)
            selector.register(child.result, selectors.EVENT_READ, (child, child.result, death))
            selector.register(death, selectors.EVENT_READ, (child, child.result, death))
        while selector.get_map():
            events = selector.select(max(0.0, end - time.monotonic()))
            if not events and time.monotonic() >= end:
                break
            for key, _ in events:
                child, result, death = key.data
                if key.fd in selector.get_map() and (_drain(child) or key.fd == death):
                    selector.unregister(result)
                    selector.unregister(death)
        for key in selector.get_map().values():
            key.data[0].hung = True


def _drain(child: _Child) -> bool:
    """Read what there is; True when the report is whole or can no longer come."""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(child.result, 1 << 20):
            child.data += chunk
        return True
    return len(child.data) >= 8 and len(child.data) - 8 == int.from_bytes(child.data[:8], "little")


def _reap(children: list[_Child]) -> None:
    """Give ranks that reported a moment to leave by themselves, then kill each one's whole session."""
    end = time.monotonic() + 2.0
    for child in children:
        while child.status is None and not child.hung and time.monotonic() < end:
            _poll(child)
            if child.status is None:
                time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # also whatever the rank started
        if child.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            child.status = os.waitpid(child.pid, 0)[1]
        os.close(child.result)


def _poll(child: _Child) -> None:
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if pid:
        child.status = status


def _outcome(child: _Child) -> RankOutcome:
    size = child.log.seek(0, os.SEEK_END)
    child.log.seek(max(0, size - _TAIL))
    output = child.log.read().decode(errors="replace")
    child.log.close()
    assert child.status is not None
    number = os.WTERMSIG(child.status) if os.WIFSIGNALED(child.status) and not child.hung else None
    code = os.WEXITSTATUS(child.status) if os.WIFEXITED(child.status) else None
    base: dict[str, Any] = {"signal": number, "output": output, "exit_code": code, "timed_out": child.hung}
    if len(child.data) < 8 or child.hung:
        return RankOutcome(child.rank, **base)
    report = pickle.loads(bytes(child.data[8:]))
    if report[0] == "value":
        return RankOutcome(child.rank, report[1], **base)
    return RankOutcome(child.rank, error=report[2], kind=report[1], traceback=report[3], **base)


def _describe(outcomes: list[RankOutcome], timeout_s: float) -> str:
    parts = []
    for o in outcomes:
        if o.timed_out:
            how = f"still running after {timeout_s} s"
        elif o.signal is not None:
            how = f"died of {signal.Signals(o.signal).name}"
        elif o.error is not None:
            how = f"raised\n{o.traceback}"
        else:
            how = f"exit code {o.exit_code}" if o.exit_code else "returned"
        output = f"\n--- output ---\n{o.output}" if o.output and not o.ok else ""
        parts.append(f"rank {o.rank}: {how}{output}")
    return "\n".join(parts)
