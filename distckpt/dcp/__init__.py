"""Live sharded tensors to and from the format: agreement between ranks, plans, writing, reading.

The first layer that may import torch; nothing here touches a training process group.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("DistckptStorageWriter", "DistckptStorageReader"):
        from distckpt.dcp import plugin

        return getattr(plugin, name)
    raise AttributeError(f"module 'distckpt.dcp' has no attribute {name!r}")
