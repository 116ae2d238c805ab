"""torch.distributed.checkpoint: synchronous, with several threads, as Hugging Face files, and in the background."""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.payload import Live
from benchmarks.peers.base import Peer

THREADS = 4
"""More did not help on the machines that this was tried on: its threads share the interpreter."""
warnings.filterwarnings("ignore", category=FutureWarning)


class Dcp(Peer):
    """One thread, the default. ``sync_files`` is on; folders are not synced by it, so the adapter does."""

    name = "dcp"
    link = "https://docs.pytorch.org/docs/stable/distributed.checkpoint.html"
    durable = False
    threads = 1

    def writer(self, folder: Path) -> Any:
        """Return the storage writer of a new checkpoint."""
        return FileSystemWriter(folder, thread_count=self.threads, sync_files=True)

    def planner(self) -> Any:
        """Return the planner of a save."""
        return DefaultSavePlanner()

    def save(self, root: Path, step: int, live: Live) -> None:
        dcp.save(live.tensors, storage_writer=self.writer(self.path(root, step)), planner=self.planner())

    def load(self, root: Path, step: int, live: Live) -> None:
        dcp.load(live.tensors, storage_reader=FileSystemReader(self.path(root, step)))


class CachedPlanner(DefaultSavePlanner):
    """Keeps its plan from save to save: its cache is keyed by the class's name, so each setting has a class of its own."""

    def __init__(self) -> None:
        super().__init__(enable_plan_caching=True)


class DcpThreads(Dcp):
    """Several writer threads, and the plan cached from the first save on."""

    name = "dcp-threads"
    threads = THREADS

    def planner(self) -> Any:
        return CachedPlanner()


class DcpHuggingFace(Dcp):
    """Safetensors files, every rank its own shards, not consolidated."""

    name = "dcp-hf"

    def writer(self, folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        return HuggingFaceStorageWriter(str(folder), thread_count=THREADS, save_distributed=True)

    def load(self, root: Path, step: int, live: Live) -> None:
        dcp.load(live.tensors, storage_reader=HuggingFaceStorageReader(str(self.path(root, step)), THREADS))


class _Async(Dcp):
    """``async_save`` with a stager that keeps its buffers: the copy is made on a thread, ``fence`` waits for it."""

    kind = AsyncCheckpointerType.THREAD
    shared = False
    link = "https://docs.pytorch.org/tutorials/recipes/distributed_async_checkpoint_recipe.html"

    def __init__(self) -> None:
        self._stager: DefaultStager | None = None
        self._response: Any = None

    def begin(self, root: Path, step: int, live: Live) -> None:
        if self._stager is None:
            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=self.shared, use_async_staging=True,
                use_non_blocking_copy=False,
            )  # fmt: skip
            self._stager = DefaultStager(options)
        self._response = dcp.async_save(
            live.tensors, storage_writer=self.writer(self.path(root, step)), planner=self.planner(),
            async_checkpointer_type=self.kind, async_stager=self._stager,
        )  # fmt: skip

    def fence(self) -> None:
        if isinstance(self._response, AsyncSaveResponse):
            self._response.staging_completion.result()

    def _upload(self) -> Future[Any]:
        response = self._response
        found: Future[Any] = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        return found

    def done(self) -> bool:
        return self._upload().done()

    def finish(self) -> None:
        self._upload().result()

    def save(self, root: Path, step: int, live: Live) -> None:
        raise NotImplementedError("a background setting")

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class ThreadPlanner(CachedPlanner):
    """Of the thread setting."""


class DcpAsyncThread(_Async):
    """Written by a thread of the training process."""

    name = "dcp-async-thread"

    def planner(self) -> Any:
        return ThreadPlanner()


class ProcessPlanner(CachedPlanner):
    """Of the process setting: the cache lives in the writing process."""


class DcpAsyncProcess(_Async):
    """Written by a process of its own from shared memory, plan cached: what PyTorch's 2025 figures used."""

    name = "dcp-async-process"
    kind = AsyncCheckpointerType.PROCESS
    shared = True
    link = "https://pytorch.org/blog/6x-faster-async-checkpointing/"

    def planner(self) -> Any:
        return ProcessPlanner()

    def close(self) -> None:
        super().close()
        from torch.distributed.checkpoint import _async_process_executor as executor

        executor._CHECKPOINT_PROCESS = None  # its __del__ ends the process
