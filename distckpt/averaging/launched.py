"""Joining the other processes of a launcher, for commands; a training job has its process group already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def launched_ranks() -> Iterator[bool]:
    """Join the ranks that torchrun started, if it did; yields whether this one reports. The group ends with the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
