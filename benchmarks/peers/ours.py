"""distckpt through its public manager: a module that holds the tensors, default settings."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.payload import Live, flat_kind
from benchmarks.peers.base import Peer
from benchmarks.shapes import FLAT
from distckpt import CheckpointConfig, CheckpointManager
from distckpt.boxes import flat_range_to_boxes
from distckpt.dcp.leaves import State, TensorLeaf
from distckpt.format import digest as digests
from distckpt.format.layout import Layout, Mesh


class NotBuilt(RuntimeError):
    """This version of distckpt does not have the option."""


def module_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a tree of modules with these tensors as parameters, under their dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


class FlatEngine:
    """An engine whose tensors are contiguous ranges of flat buffers, cut over the ranks: what ZeRO holds."""

    name = "flat"
    parts: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, live: Live) -> None:
        self._live = live

    def state(self, *, optimizer: bool) -> State:
        """Return the leaves, as views of the flat buffers."""
        live, state = self._live, State()
        mesh = Mesh.flat(range(live.world))
        held = {local.spec.name: local for local in live.locals}
        offsets: dict[str, int] = {}
        for spec in live.workload.tensors:
            kind = flat_kind(spec)
            offset = offsets.get(kind, 0)
            offsets[kind] = offset + spec.numel
            layout = Layout(mesh, (f"F({offset},{live.plain[f'flat.{kind}'].numel()})",))
            parts, local = [], held.get(spec.name)
            if local is not None and local.start is not None:
                at = 0
                for box in flat_range_to_boxes(spec.shape, local.start, local.start + local.tensor.numel()):
                    parts.append((box, local.tensor.narrow(0, at, box.numel).view(box.sizes)))
                    at += box.numel
            state.add_leaf(TensorLeaf(f"model.{spec.name}", spec.dtype, spec.shape, layout, tuple(parts)))
        return state

    def prepare(self, saved: Mapping[str, Any], *, optimizer: bool) -> State:
        return self.state(optimizer=optimizer)

    def trained(self) -> frozenset[str]:
        return frozenset()

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None: ...


class Ours(Peer):
    """Synchronous, and (``begin``) in the background with a blocking copy."""

    name = "distckpt"
    package = "distckpt"
    settings: ClassVar[Mapping[str, Any]] = {}
    in_background: ClassVar[bool] = False
    """Whether the settings are of background saves alone."""

    def __init__(self) -> None:
        unknown = set(self.settings) - {field.name for field in fields(CheckpointConfig)}
        if unknown:
            raise NotBuilt(f"not built: CheckpointConfig has no {', '.join(sorted(unknown))}")
        self._manager: CheckpointManager | None = None
        self._job: tuple[Path, bool] | None = None
        self._counters: dict[str, Any] = {}
        self._before: dict[str, int] = {}
        self._model: tuple[Live, nn.Module] | None = None

    def path(self, root: Path, step: int) -> Path:
        return root / self.name / f"step-{step:010d}"

    def manager(self, root: Path, live: Live, *, background: bool) -> CheckpointManager:
        """Return a manager over the live state: a training job's, which has its own, or the module made here."""
        config = CheckpointConfig(
            root / self.name, async_save=background, save_total_limit=None, preemption_signals=(), control_file=None,
            verbose=False, max_consecutive_failures=0, start_fresh=True,  # a rank that was ended saves where it saved before
            **(self.settings if background or not self.in_background else {}),
        )  # fmt: skip
        model, optimizer = getattr(live, "model", None), getattr(live, "optimizer", None)
        if model is not None:
            return CheckpointManager(config, model=model, optimizer=optimizer)
        if live.workload.placement == FLAT and live.world > 1:
            return CheckpointManager(config, engine=FlatEngine(live))
        return CheckpointManager(config, model=self._model_of(live))

    def _model_of(self, live: Live) -> nn.Module:
        """Return the state as a module: a job has its model before it loads, and making one is not loading."""
        if self._model is None or self._model[0] is not live:
            self._model = live, module_of(live.tensors if live.world > 1 else live_tensors(live))
        return self._model[1]

    def _saving(self, root: Path, live: Live, *, background: bool) -> CheckpointManager:
        """Return the manager of the job that saves there; one job at a time owns a root."""
        if self._manager is None or self._job != (root, background):
            self.close()
            self._manager, self._job = self.manager(root, live, background=background), (root, background)
        self._before = dict(self._manager.store.counters)
        return self._manager

    def _count(self, manager: CheckpointManager) -> None:
        counters = manager.store.counters
        self._counters = {name: count - self._before.get(name, 0) for name, count in counters.items()}

    def save(self, root: Path, step: int, live: Live) -> None:
        manager = self._saving(root, live, background=False)
        manager.save(step=step)
        self._count(manager)

    def load(self, root: Path, step: int, live: Live) -> None:
        with self.manager(root, live, background=False) as manager:
            report = manager.load(step)
            self._before = {}
            self._count(manager)
            seen = {"wanted_bytes": report.wanted_bytes, "payload_bytes": report.read_bytes}
            self._counters |= seen | {"headers_read": report.headers_read}

    def resume(self, root: Path, step: int, live: Live) -> None:
        self._saving(root, live, background=False).load(step)

    def begin(self, root: Path, step: int, live: Live) -> None:
        self._saving(root, live, background=True).save(step=step)

    def done(self) -> bool:
        return self._manager is not None and not self._manager._saver.busy

    def finish(self) -> None:
        assert self._manager is not None
        self._manager.wait()
        self._count(self._manager)

    def counters(self) -> dict[str, Any]:
        return self._counters

    def close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()


def live_tensors(live: Live) -> dict[str, torch.Tensor]:
    """Return the tensors by their own names; in a flat layout on one rank they are whole ranges of the buffers."""
    if live.workload.placement != FLAT:
        return live.tensors
    return {local.spec.name: local.tensor.view(local.spec.shape) for local in live.locals}


class Lazy(Ours):
    """The copy is made while forward and backward run; the optimizer's step waits for what is left."""

    name = "distckpt-lazy"
    settings: ClassVar[Mapping[str, Any]] = {"lazy_staging": True}
    in_background = True


class Incremental(Ours):
    """Blocks that have not changed since the last checkpoint are referred to, not written."""

    name = "distckpt-incremental"
    settings: ClassVar[Mapping[str, Any]] = {"incremental": True}


class NoChecksums(Ours):
    """What the digests of the data cost: they are patched out here, there is no setting for it."""

    name = "distckpt-no-checksums"

    def save(self, root: Path, step: int, live: Live) -> None:
        with without_digests(live.nbytes // 2):
            super().save(root, step, live)

    def load(self, root: Path, step: int, live: Live) -> None:
        with without_digests(live.nbytes // 2):
            super().load(root, step, live)


@contextlib.contextmanager
def without_digests(nbytes: int, least: int = 4096) -> Iterator[None]:
    """Give every buffer of at least ``least`` bytes the same digest, at no cost; small ones (names, plans) keep theirs.

    Raises ``RuntimeError`` on leaving unless that many bytes went through: the digests are then made elsewhere, and
    the comparison would be of nothing.
    """
    real, seen = digests.xxhash, [0]

    def constant(data: Any) -> str:
        size = memoryview(data).nbytes
        if size < least:
            return str(real.xxh3_128_hexdigest(data))
        seen[0] += size
        return "0" * 32

    digests.xxhash = SimpleNamespace(xxh3_128_hexdigest=constant)  # type: ignore[assignment]
    try:
        yield
    finally:
        digests.xxhash = real
    if seen[0] < nbytes:
        raise RuntimeError(f"only {seen[0]} of {nbytes} bytes went through distckpt.format.digest: the patch misses it")
