"""A loader that tells its sampler what training has consumed, however far its workers have read ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from distckpt.errors import ConfigError
from distckpt.format.digest import digest

if TYPE_CHECKING:
    from distckpt.engines.sampler import ResumableSampler

Batch = TypeVar("Batch")
_COLUMNS = (torch.Tensor, np.ndarray, Mapping, tuple, list)


class TrackedLoader(Generic[Batch]):
    """A loader whose batches move its sampler's position; made by ``ResumableSampler.track``.

    Local samples per batch are the loader's ``batch_size`` (or its batch sampler's), so that all ranks
    count alike even where ``uneven="none"`` gives one of them a shorter last batch; the epoch's end cuts
    off what is too much. A DataLoader with ``batch_size=None`` has one sample per item. Any other iterable
    is counted by its batches: the length of the first tensor, array or list found in a batch's values. When
    the loader ends, the epoch counts as consumed, including what ``drop_last`` left out.

    Making an iterator draws no number from torch's global generator (a plain DataLoader draws the seed of
    its workers there, which would shift every random number after a resume): unless the loader has a
    generator of its own, the seed of its workers comes from (seed, epoch, position, rank). Numbers drawn
    inside worker processes are not continued across a restart; derive those from the sample's index.
    """

    def __init__(self, sampler: ResumableSampler, loader: Iterable[Batch]) -> None:
        """Check that ``loader`` draws from ``sampler``, as far as it can be seen."""
        self.sampler, self.loader = sampler, loader
        batch_sampler = getattr(loader, "batch_sampler", None)
        sources = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
        if isinstance(loader, DataLoader) and not any(source is sampler for source in sources):
            raise ConfigError("track: the DataLoader does not use this sampler; build it with DataLoader(sampler=...)")
        if not getattr(loader, "in_order", True):
            raise ConfigError("track: in_order=False hands out batches in no order that a position could describe")
        self.batch_size: int | None = None
        for value in (getattr(loader, "batch_size", None), getattr(batch_sampler, "batch_size", None)):
            if isinstance(value, int) and self.batch_size is None:
                self.batch_size = value
        if self.batch_size is None and isinstance(loader, DataLoader) and batch_sampler is None:
            self.batch_size = 1

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from the sampler's position to the epoch's end."""
        sampler, n_local, token = self.sampler, 0, None
        for batch in self._iterator():
            token = sampler.current_pass if token is None else token
            n_local += _first_length(batch) if self.batch_size is None else self.batch_size
            sampler.reach(token, n_local)
            yield batch
        sampler.reach(sampler.current_pass if token is None else token, sampler.length)

    def __len__(self) -> int:
        """Return the loader's length, in batches of the current pass."""
        return len(self.loader)  # type: ignore[arg-type]

    def _iterator(self) -> Iterator[Batch]:
        loader: Any = self.loader
        if getattr(loader, "generator", True) is not None:
            return iter(self.loader)
        epoch, start = self.sampler.next_pass()
        name = f"distckpt-workers-1:{self.sampler.seed}:{epoch}:{start}:{self.sampler.rank}"
        loader.generator = torch.Generator().manual_seed(seed_of(name))
        try:
            return iter(self.loader)
        finally:
            loader.generator = None


def _first_length(batch: Any) -> int:
    """Return how many samples a batch of unknown make holds."""
    if isinstance(batch, Mapping) and batch:
        return _first_length(next(iter(batch.values())))
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], _COLUMNS):
        return _first_length(batch[0])
    shape = getattr(batch, "shape", None)
    if shape is not None and len(shape) > 0:
        return int(shape[0])
    if isinstance(batch, Sized) and not isinstance(batch, str | bytes):
        return len(batch)
    raise ConfigError(
        f"track: cannot tell how many samples a batch of type {type(batch).__qualname__} holds; "
        "use a loader with batch_size, or count with advance(n_local)"
    )


def seed_of(name: str) -> int:
    """Return the last 64 bits of the xxh3-128 of ``name`` (big-endian, so its last 16 hex digits)."""
    return int(digest(name.encode())[-16:], 16)
