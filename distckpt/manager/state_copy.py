"""One copy of a rank's state into host memory, cut into chunks that several threads take: copiers, and who waits for them.

A background copy runs at its leisure, with pauses. Where training has to wait for it (``settle``), the waiting thread takes
chunks itself, so that it never waits for more than the chunks in hand, however low the copier's priority is.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from distckpt import clock, failpoints
from distckpt.dcp.buffers import is_plain_memory, move
from distckpt.dcp.writer import Staged
from distckpt.errors import SnapshotFailed, first_names

CHUNK = 8 << 20
"""Bytes that a thread copies at a time."""
SAMPLES = 64
WORD = 8

Task: TypeAlias = tuple[str, torch.Tensor, int, int]
"""FQN, the tensor to copy, and where in the image: first byte, number of bytes."""
Streams: TypeAlias = Mapping[torch.device, torch.cuda.Stream]
_Move: TypeAlias = tuple[str, torch.Tensor, int | None, int, int]
"""FQN, tensor, address of its bytes (None: torch has to put them in order), first byte in the image, number of bytes."""


class Watch:
    """Tells which tensors were changed since it was made: by their version counters, and by a sample of their bytes.

    In-place operations raise a tensor's version; fused optimizers, ``.data`` and foreign code do not. For these one word
    of up to ``SAMPLES`` host tensors is kept, which finds what changes them all. What changes a few tensors behind
    torch's back is not found.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._versions = [(fqn, tensor, tensor._version) for fqn, tensor, *_ in tasks]
        step = max(1, len(tasks) // SAMPLES)
        self._words = [
            (fqn, tensor, _middle_word(tensor)) for fqn, tensor, *_ in tasks[::step] if is_plain_memory(tensor)
        ]

    def changed(self) -> list[str]:
        """Return the FQNs of what was changed; each once, in order."""
        found = [fqn for fqn, tensor, version in self._versions if tensor._version != version]
        found += [fqn for fqn, tensor, word in self._words if _middle_word(tensor) != word]
        return list(dict.fromkeys(found))


class StateCopy:
    """A copy in progress. ``start`` and ``run``, or ``complete`` and ``settle`` of different threads, see to it.

    ``staged`` is its result, of which nothing may be used before ``run`` or ``check`` has returned.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        image: torch.Tensor,
        streams: Streams,
        staged: Staged,
        watch: Watch | None = None,
    ) -> None:
        self.staged = staged
        self.changed: tuple[str, ...] = ()
        """FQNs of what was found changed while it should not have been."""
        self._chunks = _chunks(tasks)
        self._image = image
        self._streams = streams
        self._watch = watch
        self._lock = threading.Condition()
        self._in_hand: list[str] = []
        self._over = False
        self._hurry = threading.Event()
        self._settled = False
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether it is known by now that the copy is no good."""
        return self._error is not None

    def start(self, threads: int) -> None:
        """Begin to copy, on so many threads beside the caller's: ``run`` or ``stop`` has to follow."""
        for _ in range(threads):
            threading.Thread(target=self._work, args=(0.0,), name="distckpt-stage", daemon=True).start()

    def run(self) -> None:
        """Copy what is left on this thread too, and return when all is copied; raises ``SnapshotFailed``.

        Device copies are then under way: ``synchronize`` waits for them, after ``order_streams`` the device does.
        """
        try:
            self._work(0.0)  # two new threads may start on one processor, and stay there for ticks
        finally:
            self._wait(None)
        self._raise()

    def stop(self) -> None:
        """Copy nothing more, and return when nothing is being copied: the copy is no good, its memory may be used again."""
        self._fail(RuntimeError("stopped"))
        self._wait(None)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for device copies."""
        for stream in self._streams.values():
            stream.synchronize()

    def order_streams(self) -> None:
        """Have whatever the caller queues from now on run after the device copies so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def complete(self, pause: float, timeout_s: float) -> None:
        """Copy what nobody else does, resting ``pause`` times as long after each chunk; errors are kept for ``check``."""
        self._work(pause)
        try:
            self._wait(timeout_s)
            self.synchronize()
        except BaseException as error:
            self._fail(error)

    def hurry(self) -> None:
        """Let ``complete`` rest no more."""
        self._hurry.set()

    def settle(self, timeout_s: float) -> None:
        """Return when the originals may be changed: all is copied, or the copy has failed and nobody will use it.

        Device copies may still run then: the current streams wait for them. ``SnapshotFailed`` if the copy has failed.
        """
        if not self._settled:
            self._hurry.set()
            self._work(0.0)
            try:
                self._wait(timeout_s)
                self.order_streams()
            except BaseException as error:
                self._fail(error)
        with self._lock:
            self._examine()
            self._settled = True
        self._raise()

    def check(self) -> None:
        """Raise ``SnapshotFailed`` if the copy is not that of one moment."""
        with self._lock:
            self._examine()
        self._raise()

    def _work(self, pause: float) -> None:
        while True:
            started = clock.monotonic()
            try:
                chunk = self._take()
            except BaseException as error:
                self._fail(error)
                return
            if chunk is None:
                return
            try:
                if self._watch is not None:
                    failpoints.hit("staging.copy", chunk[0][0])
                for part in chunk:
                    self._move(part)
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise  # this thread was interrupted; for all others the copy has failed
            finally:
                self._put_down(chunk)
            if pause:
                self._hurry.wait(pause * (clock.monotonic() - started))

    def _take(self) -> list[_Move] | None:
        with self._lock:
            chunk = None if self._over else next(self._chunks, None)
            if chunk is None:
                self._over = True
            else:
                self._in_hand.append(chunk[0][0])
            return chunk

    def _put_down(self, chunk: list[_Move]) -> None:
        with self._lock:
            self._in_hand.remove(chunk[0][0])
            self._lock.notify_all()

    def _move(self, part: _Move) -> None:
        _, tensor, source, start, nbytes = part
        if source is not None:
            move(self._image.data_ptr() + start, source, nbytes)
            return
        room = self._image[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
        stream = self._streams.get(tensor.device)
        if stream is None:
            room.copy_(tensor)
        else:
            with torch.cuda.stream(stream):
                room.copy_(tensor, non_blocking=True)

    def _wait(self, timeout_s: float | None) -> None:
        with self._lock:
            if not self._lock.wait_for(lambda: not self._in_hand, timeout_s):
                raise TimeoutError(f"not copied within {timeout_s:g} s: {first_names(self._in_hand, 8)}")

    def _examine(self) -> None:
        """Look for changes, unless they are allowed by now; the lock is held."""
        if self._watch is None or self._settled or self.changed:
            return
        self.changed = tuple(self._watch.changed())
        if self.changed and self._error is None:
            self._over = True
            self._error = RuntimeError(
                f"{first_names(self.changed, 8)} changed while a lazy save was under way; call manager.fence() before changing "
                "weights or optimizer state by other means than optimizer.step()"
            )

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._over = True
            self._error = self._error or error

    def _raise(self) -> None:
        if self._error is not None:
            raise SnapshotFailed(
                f"the state was not copied: {type(self._error).__name__}: {self._error}"
            ) from self._error


def _chunks(tasks: Sequence[Task]) -> Iterator[list[_Move]]:
    """Yield moves of about ``CHUNK`` bytes in all: many small tensors, or a part of a large one.

    Only tensors much larger than that are cut: libc copies short pieces at half the speed of long ones.
    """
    chunk: list[_Move] = []
    filled = 0
    for fqn, tensor, start, nbytes in tasks:
        source = tensor.data_ptr() if is_plain_memory(tensor) else None
        done = 0
        while source is not None and nbytes - done > CHUNK + CHUNK // 2:
            yield [(fqn, tensor, source + done, start + done, CHUNK)]
            done += CHUNK
        rest = None if source is None else source + done
        chunk.append((fqn, tensor, rest, start + done, nbytes - done))
        filled += nbytes - done
        if filled >= CHUNK:
            yield chunk
            chunk, filled = [], 0
    if chunk:
        yield chunk


def _middle_word(tensor: torch.Tensor) -> bytes:
    nbytes = tensor.numel() * tensor.element_size()
    return ctypes.string_at(
        tensor.data_ptr() + nbytes // 2 // WORD * WORD, min(WORD, nbytes - nbytes // 2 // WORD * WORD)
    )
