"""The bytes: reproducible random values, a rank's part of a state in reused memory, and its comparison byte by byte.

Every element of a global tensor is a function of (name, version, place in the tensor), so any rank of any layout can
fill its part and check what it has loaded without a second copy. Values are normal floats of deviation 0.02: mantissa
bits are random (a disk or a file system cannot compress them), exponents are those of trained weights.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import COLUMNS, FLAT, ITEMSIZE, REPLICATED, TensorSpec, Workload

TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PERIOD = 8_388_593  # elements, a prime: no two tensors of a state begin at the same place of a block
POISON = 0xA5


class Noise:
    """An endless stream of random bytes for each (name, version) and item size."""

    def __init__(self, seed: int = 1) -> None:
        bits = (np.random.default_rng(seed).standard_normal(_PERIOD, np.float32) * np.float32(0.02)).view(np.uint32)
        self._streams = {4: bits.view(np.uint8), 2: (bits >> 16).astype(np.uint16).view(np.uint8)}
        self.versions: dict[str, int] = {}
        """Names whose values have changed, and how often."""

    def runs(self, spec: TensorSpec, start: int, count: int) -> Iterator[np.ndarray]:
        """Yield the bytes of elements ``start:start + count`` of a tensor, flattened, in views that follow each other."""
        size = ITEMSIZE[spec.dtype]
        stream = self._streams[size]
        name = f"{spec.name}@{self.versions.get(spec.name, 0)}"
        at = (zlib.crc32(name.encode()) + start) % _PERIOD * size
        left = count * size
        while left:
            run = stream[at : at + left]
            yield run
            left -= run.size
            at = 0

    def fill(self, spec: TensorSpec, start: int, out: np.ndarray) -> None:
        """Write elements from ``start`` on into ``out`` (uint8)."""
        at = 0
        for run in self.runs(spec, start, out.size // ITEMSIZE[spec.dtype]):
            out[at : at + run.size] = run
            at += run.size

    def difference(self, spec: TensorSpec, start: int, found: np.ndarray) -> int | None:
        """Return the first byte of ``found`` (uint8) that is not the one ``fill`` writes; None if all are."""
        at = 0
        for run in self.runs(spec, start, found.size // ITEMSIZE[spec.dtype]):
            piece = found[at : at + run.size]
            if not np.array_equal(piece, run):
                return at + int(np.flatnonzero(piece != run)[0])
            at += run.size
        return None


class Arena:
    """Memory that is touched once and then reused: the first touch of a page costs more than many copies of it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """Return that many bytes, the same ones as the last time where they suffice; all of them touched."""
        if self._memory.size < nbytes:
            self._memory = np.empty(0, np.uint8)
            self._memory = np.empty(nbytes, np.uint8)
            self._memory[:: mmap.PAGESIZE] = 0
        return self._memory[:nbytes]


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's part of one tensor. ``start`` is its first element of the flattened tensor; columns have none."""

    spec: TensorSpec
    tensor: torch.Tensor
    octets: np.ndarray
    start: int | None
    columns: tuple[int, int] = (0, 0)


class Live:
    """The state of one rank: memory of its own, tensors over it, and every tensor with a storage of its own size.

    ``tensors`` is what a training job holds: plain tensors on one rank or where replicated, else DTensors. ``plain`` are
    the local tensors. In a flat layout both hold one tensor per kind of state, and ``locals`` has the true names.
    """

    def __init__(self, workload: Workload, rank: int, world: int, arena: Arena, noise: Noise) -> None:
        self.workload, self.rank, self.world, self.noise = workload, rank, world, noise
        self.mesh: Any = None
        if world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh("cpu", (world,))
        self.locals: list[Local] = []
        self.plain: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, Any] = {}
        if workload.placement == FLAT:
            self._flat(arena)
        else:
            self._cut(arena)
        self.nbytes = sum(t.numel() * t.element_size() for t in self.plain.values())

    # ------------------------------------------------------------------ layouts

    def _cut(self, arena: Arena) -> None:
        shapes = [self._held(spec) for spec in self.workload.tensors]
        sizes = [ITEMSIZE[s.dtype] * int(np.prod(h[0])) for s, h in zip(self.workload.tensors, shapes, strict=True)]
        memory = arena.take(64 + sum(-(-size // 64) * 64 for size in sizes))
        at = 64  # as torch allocates: aligned to cache lines, not to pages
        for spec, (shape, start, columns), size in zip(self.workload.tensors, shapes, sizes, strict=True):
            octets = memory[at : at + size]
            tensor = _tensor(octets, spec.dtype).view(shape)
            self.locals.append(Local(spec, tensor, octets, start, columns))
            self.plain[spec.name] = tensor
            self.tensors[spec.name] = self._distributed(spec, tensor)
            at += -(-size // 64) * 64

    def _held(self, spec: TensorSpec) -> tuple[tuple[int, ...], int | None, tuple[int, int]]:
        """Return the local shape, and where it starts: an element, or columns from and to."""
        placement = self.workload.placement
        if self.world == 1 or placement == REPLICATED:
            return spec.shape, 0, (0, 0)
        dim = 1 if placement == COLUMNS and len(spec.shape) > 1 else 0
        low, high = _chunk(spec.shape[dim], self.world, self.rank)
        shape = (*spec.shape[:dim], high - low, *spec.shape[dim + 1 :])
        if dim == 1:
            return shape, None, (low, high)
        return shape, low * int(np.prod(spec.shape[1:])), (0, 0)

    def _distributed(self, spec: TensorSpec, tensor: torch.Tensor) -> Any:
        if self.world == 1 or self.workload.placement == REPLICATED:
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        dim = 1 if self.workload.placement == COLUMNS and len(spec.shape) > 1 else 0
        whole = torch.empty(spec.shape, device="meta")
        return DTensor.from_local(
            tensor, self.mesh, [Shard(dim)], run_check=False, shape=whole.size(), stride=whole.stride()
        )

    def _flat(self, arena: Arena) -> None:
        kinds: dict[str, list[TensorSpec]] = {}
        for spec in self.workload.tensors:
            kinds.setdefault(flat_kind(spec), []).append(spec)
        parts = {kind: -(-sum(spec.numel for spec in specs) // self.world) for kind, specs in kinds.items()}  # padded
        sizes = {kind: parts[kind] * ITEMSIZE[specs[0].dtype] for kind, specs in kinds.items()}
        memory, at = arena.take(sum(sizes.values())), 0
        for kind, specs in kinds.items():
            octets = memory[at : at + sizes[kind]]
            at += sizes[kind]
            octets[:] = 0  # padding too
            flat = _tensor(octets, specs[0].dtype)
            self.plain[f"flat.{kind}"] = flat
            whole = TensorSpec(f"flat.{kind}", (parts[kind] * self.world,), specs[0].dtype)
            self.tensors[whole.name] = self._distributed(whole, flat)
            self._slots(specs, flat, octets, parts[kind])

    def _slots(self, specs: list[TensorSpec], flat: torch.Tensor, octets: np.ndarray, part: int) -> None:
        low, high, offset, size = self.rank * part, (self.rank + 1) * part, 0, ITEMSIZE[specs[0].dtype]
        for spec in specs:
            start, stop = max(low, offset), min(high, offset + spec.numel)
            if start < stop:
                piece = slice((start - low) * size, (stop - low) * size)
                tensor = flat[start - low : stop - low]
                self.locals.append(Local(spec, tensor, octets[piece], start - offset))
            offset += spec.numel

    # ------------------------------------------------------------------ bytes

    def fill(self) -> None:
        """Write the values of the state."""
        for local in self.locals:
            if local.start is not None:
                self.noise.fill(local.spec, local.start, local.octets)
            else:
                local.octets[:] = self._columns(local).reshape(-1)

    def use(self) -> int:
        """Read every page, and return what is of no use: hosts of virtual machines may have taken back what lay idle."""
        return sum(int(local.octets[:: mmap.PAGESIZE].sum()) for local in self.locals)

    def poison(self) -> None:
        """Overwrite every byte, so that what is compared later can only have come from a load."""
        for local in self.locals:
            local.octets[:] = POISON

    def compare(self) -> str:
        """Return ``equal``, or which byte of which tensor is not what was saved."""
        for local in self.locals:
            if local.start is not None:
                at = self.noise.difference(local.spec, local.start, local.octets)
            else:
                wrong = np.flatnonzero(self._columns(local).reshape(-1) != local.octets)
                at = int(wrong[0]) if wrong.size else None
            if at is not None:
                return f"different: {local.spec.name}, byte {at} of rank {self.rank}'s part"
        return "equal"

    def _columns(self, local: Local) -> np.ndarray:
        spec, size = local.spec, ITEMSIZE[local.spec.dtype]
        whole = np.empty(spec.nbytes, np.uint8)
        self.noise.fill(spec, 0, whole)
        low, high = local.columns
        return np.ascontiguousarray(whole.reshape(spec.shape[0], -1)[:, low * size : high * size])


def flat_kind(spec: TensorSpec) -> str:
    """Return which flat buffer a tensor lies in: ``weight`` or the optimizer state's name."""
    return spec.name.rpartition(".")[2] if spec.dtype == "float32" else "weight"


def _tensor(octets: np.ndarray, dtype: str) -> torch.Tensor:
    """Return a flat tensor over this memory whose storage is exactly it: a view would be saved with its whole storage."""
    if octets.size == 0:
        return torch.empty(0, dtype=TORCH[dtype])
    return torch.frombuffer(octets, dtype=TORCH[dtype])


def _chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    size = -(-extent // parts)
    return min(extent, index * size), min(extent, (index + 1) * size)
