"""One file per rank, of its local tensors: torch.save and safetensors. Neither reshards nor knows other ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.payload import Live
from benchmarks.peers.base import Peer, copy_all


class TorchSave(Peer):
    """``torch.save`` and ``torch.load(mmap=True)``, copied into the live tensors as ``load_state_dict`` does."""

    name = "torch.save"
    link = "https://docs.pytorch.org/tutorials/recipes/recipes/module_load_state_dict_tips.html"
    durable = False

    def save(self, root: Path, step: int, live: Live) -> None:
        folder = self.path(root, step)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(live.plain, folder / f"{live.rank:05d}.pt")

    def load(self, root: Path, step: int, live: Live) -> None:
        path = self.path(root, step) / f"{live.rank:05d}.pt"
        loaded = torch.load(path, mmap=True, weights_only=True)
        copy_all((live.plain[name], loaded[name]) for name in live.plain)


class Safetensors(Peer):
    """``save_file`` and ``load_file``, which maps the file; copied into the live tensors."""

    name = "safetensors"
    package = "safetensors"
    link = "https://huggingface.co/docs/safetensors/speed"
    durable = False

    def save(self, root: Path, step: int, live: Live) -> None:
        from safetensors.torch import save_file

        folder = self.path(root, step)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(live.plain, folder / f"{live.rank:05d}.safetensors")

    def load(self, root: Path, step: int, live: Live) -> None:
        from safetensors.torch import load_file

        loaded = load_file(self.path(root, step) / f"{live.rank:05d}.safetensors")
        copy_all((live.plain[name], loaded[name]) for name in live.plain)
