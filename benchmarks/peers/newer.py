"""torch_checkpointing (announced successor of DCP), torchsnapshot, ByteCheckpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.payload import Live
from benchmarks.peers.base import Peer, Tail, sync_tree
from benchmarks.shapes import REPLICATED


class TorchCheckpointing(Peer):
    """Sharded items with its resharder; in the background staged on a thread and written by a process.

    It syncs nothing: the adapter does, in the background on a thread of its own. Direct I/O is off, as its page on
    troubleshooting says for file systems that refuse it: its writes are not aligned, and ext4 answers EINVAL. Its
    resharder gathers metadata through CUDA tensors only: without a GPU each rank saves its local tensors, unsharded.
    """

    name = "torch_checkpointing"
    package = "torch_checkpointing"
    link = "https://github.com/meta-pytorch/torch_checkpointing/blob/main/docs/troubleshooting.md"
    durable = False

    def __init__(self) -> None:
        self._sync: Any = None
        self._async: Any = None
        self._tail: Tail | None = None

    def _manager(self, *, background: bool, world: int) -> Any:
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_async_save() if background else CheckpointManager.Config.with_sync_save()
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        if world > 1 and torch.cuda.is_available():
            config.items = {"state": ItemSpec(resharder=DefaultResharder())}
        return config.build()

    def _state(self, live: Live) -> dict[str, Any]:
        return live.tensors if torch.cuda.is_available() else live.plain

    def save(self, root: Path, step: int, live: Live) -> None:
        self._sync = self._sync or self._manager(background=False, world=live.world)
        folder = self.path(root, step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._sync.save(str(folder), {"state": self._state(live)})

    def load(self, root: Path, step: int, live: Live) -> None:
        self._sync = self._sync or self._manager(background=False, world=live.world)
        self._sync.load(str(self.path(root, step)), into={"state": self._state(live)}, strict=True)

    def begin(self, root: Path, step: int, live: Live) -> None:
        self._async = self._async or self._manager(background=True, world=live.world)
        folder = self.path(root, step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = self._async.save(str(folder), {"state": self._state(live)})

        def wait_and_sync() -> None:
            written.result()
            sync_tree(folder, live.rank, live.world)

        self._tail = Tail(wait_and_sync)

    def fence(self) -> None:
        if self._async is not None:
            with self._async.lock():  # waits while the copy is being made
                pass

    def done(self) -> bool:
        return self._tail is not None and self._tail.done()

    def finish(self) -> None:
        assert self._tail is not None
        self._tail.finish()

    def close(self) -> None:
        for manager in (self._sync, self._async):
            if manager is not None:
                manager.close()


class TorchSnapshot(Peer):
    """``Snapshot.take``, ``async_take`` and ``restore`` of the local tensors; replicated ones are shared out over ranks."""

    name = "torchsnapshot"
    package = "torchsnapshot"
    link = "https://pytorch.org/torchsnapshot/main/getting_started.html"
    durable = False

    def __init__(self) -> None:
        self._tail: Tail | None = None

    def _state(self, live: Live) -> tuple[dict[str, Any], list[str]]:
        from torchsnapshot import StateDict

        shared = live.world > 1 and live.workload.placement == REPLICATED
        return {"state": StateDict(**live.plain)}, ["**"] if shared else []

    def save(self, root: Path, step: int, live: Live) -> None:
        from torchsnapshot import Snapshot

        state, replicated = self._state(live)
        Snapshot.take(str(self.path(root, step)), state, replicated=replicated)

    def load(self, root: Path, step: int, live: Live) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(self.path(root, step))).restore(self._state(live)[0])

    def begin(self, root: Path, step: int, live: Live) -> None:
        from torchsnapshot import Snapshot

        state, replicated = self._state(live)
        folder = self.path(root, step)
        pending = Snapshot.async_take(str(folder), state, replicated=replicated)

        def wait_and_sync() -> None:
            pending.wait()
            sync_tree(folder, live.rank, live.world)

        self._tail = Tail(wait_and_sync)

    def done(self) -> bool:
        return self._tail is not None and self._tail.done()

    def finish(self) -> None:
        assert self._tail is not None
        self._tail.finish()


class ByteCheckpoint(Peer):
    """ByteDance's; needs GPUs, grpc and an older torch. Its checkpointers wrap live FSDP modules."""

    name = "bytecheckpoint"
    package = "bytecheckpoint"
    link = "https://github.com/ByteDance-Seed/ByteCheckpoint"
    durable = False

    def version(self) -> str:
        import bytecheckpoint

        del bytecheckpoint
        return super().version()

    def save(self, root: Path, step: int, live: Live) -> None:
        from bytecheckpoint import DDPCheckpointer

        DDPCheckpointer.save(str(self.path(root, step)), {"model": _holder(live)}, fast_saving=True)

    def load(self, root: Path, step: int, live: Live) -> None:
        from bytecheckpoint import DDPCheckpointer

        DDPCheckpointer.load(str(self.path(root, step)), {"model": _holder(live)}, fast_loading=True)


def _holder(live: Live) -> torch.nn.Module:
    from benchmarks.peers.ours import module_of

    return module_of(live.plain)
