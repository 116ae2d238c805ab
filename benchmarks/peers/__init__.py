"""The libraries that are compared, one adapter each, at their best documented settings.

An adapter is imported when it is first used: one whose library is absent or does not import says so by its error.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.peers.base import Peer

HOMES = {
    "distckpt": "ours:Ours",
    "distckpt-lazy": "ours:Lazy",
    "distckpt-incremental": "ours:Incremental",
    "distckpt-no-checksums": "ours:NoChecksums",
    "torch.save": "files:TorchSave",
    "safetensors": "files:Safetensors",
    "dcp": "dcp:Dcp",
    "dcp-threads": "dcp:DcpThreads",
    "dcp-hf": "dcp:DcpHuggingFace",
    "dcp-async-thread": "dcp:DcpAsyncThread",
    "dcp-async-process": "dcp:DcpAsyncProcess",
    "torch_checkpointing": "newer:TorchCheckpointing",
    "torchsnapshot": "newer:TorchSnapshot",
    "bytecheckpoint": "newer:ByteCheckpoint",
}
"""Name of a peer: module and class."""

OURS, NO_CHECKSUMS = "distckpt", "distckpt-no-checksums"


def make(name: str) -> Peer:
    """Return a new adapter; raises what importing it raises."""
    module, _, cls = HOMES[name].partition(":")
    peer: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), cls)()
    return peer


def is_dcp(name: str) -> bool:
    """Whether a peer is a setting of torch.distributed.checkpoint."""
    return name.startswith("dcp")
