"""Replicated loads: ranks that want the same bytes read each of them once, and pass them on to each other.

DCP's load reads replicated data once per rank (torchtitan issue 4035); the way out is ByteCheckpoint's (arXiv 2407.20143):
every rank of a group reads its share, then they exchange. Ranks of one host have the bytes in common memory, to which
who read them copies what is verified. Elsewhere bytes travel as they are stored and each rank verifies all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distckpt import clock
from distckpt.dcp.buffers import copy_bytes
from distckpt.dcp.common_memory import Buffers, common_memory
from distckpt.dcp.read_plan import Request
from distckpt.format.digest import digest
from distckpt.storage.direct import ALIGNMENT, POOL, anonymous

LEAST_BYTES = 32 << 20
"""Loads of fewer bytes are not shared: forming a group costs more."""
TURN = 4 << 20
MEMORY = 64 << 20
"""Most bytes of all ranks' turns that one rank holds; a turn is what each rank reads between two exchanges."""
AHEAD = 4
"""Turns that are read while one is handed out: with fewer the disk waits wherever verifying takes as long as reading."""
BUFFERS = AHEAD + 2
"""Of each rank, where others look into them: one is looked at, and slower ranks still look at the one before."""
PROBE = 2
"""Turns before ``auto`` decides; the last of them is measured."""

Work = Callable[[Request, memoryview], None]
"""What is done to a request and the buffer of its span."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second: of storage to all ranks of a group together, and into one rank from the others."""

    store: float
    link: float


def fingerprint(requests: Sequence[Request]) -> str:
    """Return a digest of what is to be read: equal on ranks that want the same blocks, wherever they put them."""
    runs = [(r.path, run.start, run.nbytes) for r in requests for run in r.runs]
    return digest(repr(runs).encode())


def groups_of(offers: Sequence[tuple[str, int]], least: int) -> list[list[int]]:
    """Return the groups of two or more ranks that want the same ``least`` bytes or more.

    ``offers[rank]`` is (fingerprint, bytes).
    """
    members: dict[str, list[int]] = {}
    for rank, (wanted, nbytes) in enumerate(offers):
        if nbytes >= max(1, least):
            members.setdefault(wanted, []).append(rank)
    return [ranks for ranks in members.values() if len(ranks) > 1]


def size_of(requests: Sequence[Request]) -> int:
    """Return the bytes of some requests."""
    return sum(r.stop - r.start for r in requests)


def deal(requests: Sequence[Request], members: int) -> list[list[Request]]:
    """Cut requests, in order, into one stretch a member, of about equal bytes."""
    total = size_of(requests)
    shares: list[list[Request]] = [[] for _ in range(members)]
    before = 0
    for request in requests:
        shares[min(members - 1, before * members // max(1, total))].append(request)
        before += request.stop - request.start
    return shares


def sharing_pays(members: int, rates: Rates) -> bool:
    """Whether reading each byte once and passing it on is faster than all members reading all of it."""
    shared = 1 / rates.store + (members - 1) / members / rates.link
    return shared < members / rates.store


def span(request: Request) -> tuple[int, int]:
    """Return (start, stop) of a request, out to the file's alignment; the stop may lie past the file's end."""
    return request.start // ALIGNMENT * ALIGNMENT, -(-request.stop // ALIGNMENT) * ALIGNMENT


class SharedRead:
    """One shared read of one rank. ``fetch`` fills a buffer with a request's span, ``deliver`` hands it out.

    ``verify`` raises for damage. ``group``: a gloo process group of the ranks that planned the same, with a timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        requests: Sequence[Request],
        *,
        fetch: Work,
        verify: Work,
        deliver: Work,
        threads: int,
    ) -> None:
        self._group, self._fetch, self._verify, self._deliver = group, fetch, verify, deliver
        self._members, self._me = group.size(), group.rank()
        longest = max((span(r)[1] - span(r)[0] for r in requests), default=0)
        self._turn = max(longest, min(TURN, MEMORY // self._members // ALIGNMENT * ALIGNMENT))
        self._turns = list(_turns(deal(requests, self._members), self._turn))
        # Two pools: what was read is not to wait for threads that wait for the disk.
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="distckpt-share-read")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="distckpt-share")
        common = common_memory(group, self._turn, BUFFERS) if self._turns else None
        self._in_common = common is not None
        self._all: Buffers = common or [[anonymous(self._turn)] for _ in range(self._members)]
        """Where this rank looks at what each member has read; ``_own``: where it reads to."""
        self._own = self._all[self._me] if common else [anonymous(self._turn) for _ in range(BUFFERS - 1)]
        self.error: Exception | None = None

    def run(self, decide: Callable[[Rates], bool]) -> list[Request]:
        """Read and exchange, turn by turn; returns the requests that are left, if ``decide`` was against going on.

        Errors do not leave the others waiting: a rank takes part to the end and raises then.
        """
        with self._readers, self._pool:
            read = link = 0.0
            for number in range(min(PROBE, len(self._turns))):  # one thing after the other, to be measured
                started = clock.monotonic()
                self._wait(self._start(number))
                read = clock.monotonic() - started
                self._group.barrier().wait()  # what slower readers take is no cost of the link
                started = clock.monotonic()
                self._exchange(number)
                link = clock.monotonic() - started
                self._hand_out(number)
            rest = self._turns[PROBE:]
            if rest and not decide(self._rates(read, link)):
                self._raise()
                return [request for turn in rest for share in turn for request in share]
            self._go_on(PROBE)
        self._raise()
        return []

    def _go_on(self, first: int) -> None:
        """Run the turns from the ``first`` on, reading ahead."""
        reading = deque(self._start(number) for number in range(first, first + AHEAD))
        for number in range(first, len(self._turns)):
            self._wait(reading.popleft())
            reading.append(self._start(number + AHEAD))
            self._exchange(number)
            self._hand_out(number)

    def _start(self, number: int) -> list[Future[None]]:
        """Begin to read this rank's part of a turn."""
        jobs, at, buffer = [], 0, _of_turn(self._own, number)
        for request in self._turns[number][self._me] if number < len(self._turns) else ():
            start, stop = span(request)
            jobs.append(self._readers.submit(self._read, request, buffer[at : at + stop - start]))
            at += stop - start
        return jobs

    def _read(self, request: Request, buffer: memoryview) -> None:
        if not self._in_common:
            self._fetch(request, buffer)
            return
        # Common memory lies in small pages, into which direct reads took 2.5 times as long as into the pool's huge ones.
        with POOL.lend(len(buffer)) as own:
            data = own[: len(buffer)]
            self._fetch(request, data)
            self._verify(request, data)  # others will not look again
            copy_bytes(buffer, data)

    def _take(self, request: Request, buffer: memoryview) -> None:
        if not self._in_common:
            self._verify(request, buffer)
        self._deliver(request, buffer)

    def _wait(self, jobs: Sequence[Future[None]]) -> None:
        """Wait for jobs; the first error is kept, for the end: no rank takes what was read if one has an error."""
        for job in jobs:
            error = job.exception()
            if isinstance(error, Exception):
                self.error = self.error or error

    def _exchange(self, number: int) -> None:
        """Return when this rank can see what all have read; what it read two turns ago is not looked at any more then."""
        if self._in_common:
            self._group.barrier().wait()
            return
        longest = max(_nbytes(share) for share in self._turns[number])
        mine = torch.frombuffer(_of_turn(self._own, number), dtype=torch.uint8)[:longest]
        theirs = [torch.frombuffer(_of_turn(views, number), dtype=torch.uint8)[:longest] for views in self._all]
        self._group.allgather([theirs], [mine]).wait()

    def _hand_out(self, number: int) -> None:
        jobs = []
        for share, views in zip(self._turns[number], self._all, strict=True):
            at, buffer = 0, _of_turn(views, number)
            for request in share:
                start, stop = span(request)
                jobs.append(self._pool.submit(self._take, request, buffer[at : at + stop - start]))
                at += stop - start
        self._wait(jobs)

    def _rates(self, read_s: float, link_s: float) -> Rates:
        """Return the group's rates from one turn: the same on every member."""
        worst = torch.tensor([read_s, link_s], dtype=torch.float64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._group.allreduce([worst], options).wait()
        turn = sum(_nbytes(share) for share in self._turns[PROBE - 1])
        read, link = (max(1e-9, float(value)) for value in worst)
        return Rates(turn / read, turn * (self._members - 1) / self._members / link)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def _of_turn(views: Sequence[memoryview], number: int) -> memoryview:
    """Return the buffer whose turn it is."""
    return views[number % len(views)]


def _nbytes(share: Sequence[Request]) -> int:
    return sum(span(r)[1] - span(r)[0] for r in share)


def _turns(shares: Sequence[list[Request]], turn: int) -> Iterator[list[list[Request]]]:
    """Yield, turn by turn, the requests of each member, as many as fit into ``turn`` bytes."""
    rest = [list(reversed(share)) for share in shares]
    while any(rest):
        parts: list[list[Request]] = []
        for waiting in rest:
            part: list[Request] = []
            while waiting and _nbytes(part) + _nbytes(waiting[-1:]) <= turn:
                part.append(waiting.pop())
            parts.append(part)
        yield parts
