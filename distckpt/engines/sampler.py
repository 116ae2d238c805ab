"""A sampler whose position survives restarts and does not depend on the number of ranks.

The order of an epoch is one permutation of all samples, a function of (seed, epoch) alone. The position is
one number: how many samples of that order all ranks together have consumed. Rank r of W then takes the
entries consumed + r, consumed + r + W, ... So a run can stop on W ranks and go on, at the next sample, on
any other number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, ClassVar, Final, Literal, TypeVar, get_args

import torch
from torch.utils.data import Sampler

from distckpt.engines.tracked import TrackedLoader, seed_of
from distckpt.errors import ConfigError, IncompatibleState

logger = logging.getLogger("distckpt")

Uneven = Literal["pad", "drop", "none"]
Batch = TypeVar("Batch")

VERSION: Final = 1
_CHUNK: Final = 1 << 16  # indices turned into Python ints at a time, so that a long epoch costs no memory up front


class ResumableSampler(Sampler[int]):
    """Yield this rank's sample indices from the saved position on; give it to a DataLoader as ``sampler``.

    ``num_replicas`` and ``rank`` are those of data parallelism (ranks that read the same data, as in tensor
    parallelism, share a rank here); left out, they are those of torch.distributed, or 1 and 0. When W does
    not divide what is left of the epoch, ``uneven`` says what happens at its end: ``"pad"`` repeats samples
    from the front so that every rank gets equally many, ``"drop"`` leaves out the last few, and ``"none"``
    does neither: each sample comes exactly once, and some ranks get one less than others (the training loop
    must bear that).

    The position moves only by ``track`` or ``advance``, because a DataLoader's workers draw indices long
    before training sees the samples. At the end of an epoch the position stays there; the next loop starts
    the next epoch by itself, and so does ``set_epoch``. After resuming from a checkpoint taken exactly
    there, the first loop is empty: it is the rest of the epoch that was saved. So
    ``for epoch in range(sampler.epoch, n)`` is right wherever the save was.
    """

    distckpt_state: ClassVar[str] = "replicated"
    """The state is the same on every rank, and is checked to be."""

    def __init__(
        self,
        dataset_or_length: Sized | int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        uneven: Uneven = "pad",
    ) -> None:
        """Start at epoch 0, sample 0. Raises ConfigError for a setting that cannot be."""
        world_size, this_rank = _distributed()
        self.length = dataset_or_length if isinstance(dataset_or_length, int) else len(dataset_or_length)
        self.num_replicas = world_size if num_replicas is None else num_replicas
        self.rank = this_rank if rank is None else rank
        self.shuffle, self.seed, self.uneven = bool(shuffle), seed, uneven
        if self.length < 0:
            raise ConfigError(f"length={self.length}: want 0 or more samples")
        if self.num_replicas < 1 or not 0 <= self.rank < self.num_replicas:
            raise ConfigError(f"rank={self.rank}, num_replicas={self.num_replicas}: want 0 <= rank < num_replicas")
        if uneven not in get_args(Uneven):
            raise ConfigError(f"uneven={uneven!r}: want one of {', '.join(get_args(Uneven))}")
        self.epoch = 0
        self.consumed = 0
        self._start = 0  # position at which the current pass began
        self._pass = 0  # tells iterators of an earlier pass that they are stale
        self._resumed = False  # loaded and not moved since: an exhausted epoch then yields its rest, nothing

    @property
    def exhausted(self) -> bool:
        """Whether all of the current epoch has been consumed."""
        return self.consumed >= self.length

    def __iter__(self) -> Iterator[int]:
        """Begin a pass at the current position, or at the next epoch if this one is over."""
        # A generator on purpose: DataLoader makes sampler iterators that it never uses; those must not count.
        self.epoch, self._start = self.next_pass()
        self.consumed = self._start
        self._pass += 1
        if self._resumed and self.exhausted and self.length:
            logger.info("epoch %d was complete when it was saved; it has no samples left", self.epoch)
        self._resumed = False
        order = epoch_order(self.length, self.seed, self.epoch, shuffle=self.shuffle)
        first, count, step = self._start + self.rank, self._count(self._start), self.num_replicas
        for begin in range(0, count, _CHUNK):
            places = torch.arange(begin, min(count, begin + _CHUNK)) * step + first
            places %= self.length  # only padding reaches past the end; it goes on from the front
            yield from (places if order is None else order[places]).tolist()

    def __len__(self) -> int:
        """Return how many indices this rank gets in this pass, or in the next if this epoch is over."""
        if self.exhausted and not self._resumed:
            return self._count(0)
        return self._count(self._start)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; if it is the current one already, its position stays as it is."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"set_epoch({epoch!r}): want an int of 0 or more")
        if epoch != self.epoch:
            self._move(epoch, 0, resumed=False)

    def advance(self, n_local: int) -> None:
        """Count ``n_local`` samples of this rank, and of every other, as consumed; stops at the epoch's end.

        The manual alternative to ``track``: call it once per training step, on every rank with the same
        number.
        """
        if n_local < 0:
            raise ConfigError(f"advance({n_local}): want 0 or more; only load_state_dict goes back")
        self._resumed = self._resumed and n_local == 0
        self.consumed = min(self.length, self.consumed + n_local * self.num_replicas)

    def track(self, loader: Iterable[Batch]) -> TrackedLoader[Batch]:
        """Return ``loader``, counting each batch as consumed when it is handed to the training loop.

        Samples waiting in worker queues are not counted. Put it outermost, around any wrapper that
        prefetches to a device. Raises ConfigError for a DataLoader that does not draw from this sampler, or
        returns batches out of order (``in_order=False``).
        """
        return TrackedLoader(self, loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: ints and a bool, the same on every rank, free of the number of ranks."""
        return {
            "version": VERSION,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a saved position, whatever the number of ranks was.

        Raises IncompatibleState if the position means nothing here: another dataset length, seed or
        shuffling.
        """
        if state_dict.get("version") != VERSION:
            raise IncompatibleState(
                f"sampler state of version {state_dict.get('version')!r}, this distckpt reads {VERSION}; "
                "leave the sampler out of the load, and call set_epoch"
            )
        for name, advice in _ADVICE.items():
            if state_dict.get(name) != getattr(self, name):
                raise IncompatibleState(
                    f"sampler {name}: was {state_dict.get(name)!r}, is {getattr(self, name)!r}. {advice}; "
                    "or leave the sampler out of the load and start an epoch with set_epoch"
                )
        epoch, consumed = state_dict.get("epoch"), state_dict.get("consumed")
        for name, value, limit in (("epoch", epoch, 2**63), ("consumed", consumed, self.length)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
                raise IncompatibleState(f"sampler state: {name}={value!r}, want an int from 0 to {limit}")
        assert isinstance(epoch, int)
        assert isinstance(consumed, int)
        self._move(epoch, consumed, resumed=True)

    def _move(self, epoch: int, consumed: int, *, resumed: bool) -> None:
        self.epoch, self.consumed, self._start, self._resumed = epoch, consumed, consumed, resumed
        self._pass += 1

    @property
    def current_pass(self) -> int:
        """Number of the pass that is under way; it changes whenever the position is set from outside."""
        return self._pass

    def next_pass(self) -> tuple[int, int]:
        """Return (epoch, position) at which the next pass begins."""
        if self.exhausted and not self._resumed:
            return self.epoch + 1, 0
        return self.epoch, self.consumed

    def _count(self, start: int) -> int:
        """Return how many indices this rank gets from position ``start`` to the epoch's end."""
        left, world = self.length - start, self.num_replicas
        if self.uneven == "drop":
            return left // world
        if self.uneven == "pad":
            return -(-left // world)
        return max(0, -(-(left - self.rank) // world))

    def reach(self, token: int, n_local: int) -> None:
        """Set the position ``n_local`` samples of this rank past the start of pass ``token``."""
        if token != self._pass:
            raise IncompatibleState(
                "the sampler was moved (load_state_dict, set_epoch, another loop) during a loop over its "
                "loader; resume first, then start the loop"
            )
        self.consumed = min(self.length, self._start + n_local * self.num_replicas)


_ADVICE: Final = {
    "length": "The dataset has changed and the saved position points at other samples: restore the dataset",
    "seed": "The order of samples would be another one: build the sampler with the saved seed",
    "shuffle": "The order of samples would be another one: build the sampler with the saved setting",
}


def epoch_order(length: int, seed: int, epoch: int, *, shuffle: bool = True) -> torch.Tensor | None:
    """Return the order of an epoch's samples, int64 of shape [length]; None means 0, 1, 2, ...

    ``torch.randperm(length)`` of a CPU generator with ``manual_seed`` the last 16 hex digits (64 bits) of
    the xxh3-128 of the text ``distckpt-sampler-1:<seed>:<epoch>``. No global generator is touched.
    """
    if not shuffle:
        return None
    generator = torch.Generator().manual_seed(seed_of(f"distckpt-sampler-1:{seed}:{epoch}"))
    return torch.randperm(length, generator=generator)


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
