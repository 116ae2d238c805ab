"""An average that is not written: tensors whose bytes are computed from the members' when they are read.

Reading any part of it reads that part of each member, verified, and nothing else; what is read in pieces of any size,
on any number of threads or ranks, has the same bits. So it can be written, exported, or loaded into a model for a look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from distckpt.averaging.arithmetic import PIECE, accumulator, add, all_finite, rounded
from distckpt.averaging.identity import check_identity
from distckpt.averaging.sources import Member
from distckpt.averaging.structure import Mixed, Rules, compare
from distckpt.boxes import Box
from distckpt.dcp.leaves import byte_view, tensor_leaf, torch_dtype
from distckpt.dcp.parallel import run_all
from distckpt.engines.base import MODEL, clean_fqn
from distckpt.errors import IncompatibleState
from distckpt.export.stream import Buffer, Stream
from distckpt.format.digest import digest
from distckpt.format.dtypes import itemsize
from distckpt.format.read_ahead import ReadAhead
from distckpt.storage.direct import BufferPool

if TYPE_CHECKING:
    from torch import nn

BLOCK_BYTES: Final = 4 << 20
"""Bytes of the widest member that are read at once; the sum of them is at most twice as many."""
READ_THREADS: Final = 4


class Blend:
    """A linear combination of members; read only, safe to read from several threads.

    ``weights`` are normalised; ``digest`` stands for members and weights; ``tensors`` say how each one comes about.
    """

    def __init__(self, members: Sequence[Member], rules: Rules, *, whole_state: bool = False) -> None:
        """Compare the members; nothing is read but ties and statistics that may differ. See ``structure.compare``."""
        self.members = tuple(members)
        self.rules = rules
        self.notes = check_identity(self.members)
        found = compare(self.members, rules)
        self.tensors, self.aliases = found.tensors, found.aliases
        self.notes += found.notes
        self._constants: dict[str, torch.Tensor] = {}
        self._pool = BufferPool(limit=64)
        self.objects = self._objects()
        self._whole_state = whole_state
        if whole_state:
            self._add_rest()

    @property
    def newest(self) -> Member:
        """The member that integers, names and the order of tensors are taken from."""
        return self.members[-1]

    @property
    def weights(self) -> list[float]:
        """The members' weights, oldest first; they sum to 1."""
        return [member.weight for member in self.members]

    @property
    def digest(self) -> str:
        """One digest of which members go in, with which weights."""
        return digest("\n".join(f"{m.identity} {m.weight.hex()}" for m in self.members).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(self.stream(name).nbytes for name in self.tensors)

    @property
    def config(self) -> Any:
        """The model's config: the newest member that has one."""
        return next((m.source.config for m in reversed(self.members) if m.source.config is not None), None)

    def _objects(self) -> dict[str, Any]:
        prefix = self.newest.prefix
        own = self.newest.source.objects
        return {MODEL + n.removeprefix(prefix): value for n, value in own.items() if n.startswith(prefix)}

    def _add_rest(self) -> None:
        """Take what is neither model nor optimizer (other parts of the job, its plain values) from the newest."""
        source = self.newest.source
        rest = {n: t for n, t in source.tensors.items() if not n.startswith((MODEL, "optim."))}
        self.tensors |= {name: Mixed(t.dtype, t.shape, "newest", (t,)) for name, t in rest.items()}
        self.aliases |= {n: t for n, t in source.aliases.items() if t in self.tensors and not n.startswith(MODEL)}
        self.objects |= {n: value for n, value in source.objects.items() if not n.startswith(MODEL)}

    @property
    def rank_objects(self) -> list[dict[str, Any]]:
        """What each rank of the newest stored for itself, where the whole state was asked for; else nothing."""
        return self.newest.source.per_rank if self._whole_state else []

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put values in the place of tensors of the model (``FQN`` to tensor), cast to the dtypes that they have here."""
        for fqn, value in values.items():
            mixed = self.tensors[MODEL + fqn]
            if tuple(value.shape) != mixed.shape:
                raise IncompatibleState(f"{fqn}: a value of shape {list(value.shape)} for {list(mixed.shape)}")
            self._constants[MODEL + fqn] = value.detach().cpu().to(torch_dtype(mixed.dtype)).contiguous()

    # ------------------------------------------------------------ reading

    @contextmanager
    def reading_ahead(self, wanted: Iterable[tuple[str, Box]]) -> Iterator[None]:
        """Have members' bytes of these boxes fetched in large requests inside ``with``, if they are filled in this order."""
        members = [(i, m.source.checkpoint, m) for i, m in enumerate(self.members) if m.source.checkpoint is not None]
        last = len(self.members) - 1
        rows = [
            [
                source.extents(member.stored(name) if name in member.names else name, box)
                for i, source, member in members
                if i == last or self.tensors[name].how != "newest"
            ]
            for name, box in wanted
            if name not in self._constants
        ]
        with ReadAhead(rows) as ahead, ExitStack() as stack:
            for _, source, _ in members:
                stack.enter_context(source.reading_through(ahead))
            yield

    def stream(self, name: str) -> Stream:
        """Return one tensor of the result as a stream."""
        mixed = self.tensors[name]
        whole = Box.whole(mixed.shape)

        def read(start: int, stop: int) -> Buffer:
            size = itemsize(mixed.dtype)
            first, last = start // size * size, -(-stop // size) * size
            out = memoryview(bytearray(last - first))
            self.fill(name, whole, first, last, out)
            return out[start - first : stop - first]

        return Stream(
            mixed.dtype, mixed.shape, read, lambda box, start, stop, view: self.fill(name, box, start, stop, view)
        )

    def fill(self, name: str, box: Box, start: int, stop: int, view: memoryview) -> None:
        """Put bytes [start, stop) of the row-major elements of a box of a tensor into ``view``; see ``Stream.fill``.

        Raises ``IncompatibleState`` where the result is NaN or infinite, naming tensor and member, or where members
        differ that must not; ``ShardError`` for damage.
        """
        mixed = self.tensors[name]
        if name in self._constants:
            view[:] = byte_view(self._constants[name][box.slices].contiguous())[start:stop]
            return
        size = itemsize(mixed.dtype)
        widest = max(itemsize(dtype) for dtype in (mixed.dtype, *(stream.dtype for stream in mixed.streams)))
        step = BLOCK_BYTES // widest
        for first in range(start // size, stop // size, step):
            last = min(first + step, stop // size)
            self._block(name, mixed, box, first, last, view[first * size - start : last * size - start])

    def _block(self, name: str, mixed: Mixed, box: Box, first: int, last: int, view: memoryview) -> None:
        if mixed.how == "average":
            self._average(name, mixed, box, first, last, view)
            return
        size = itemsize(mixed.dtype)
        mixed.streams[-1].fill(box, first * size, last * size, view)
        for member, stream in zip(self.members[:-1], mixed.streams[:-1] if mixed.how == "equal" else (), strict=False):
            with self._pool.lend() as buffer:
                other = buffer[: (last - first) * itemsize(stream.dtype)]
                stream.fill(box, first * itemsize(stream.dtype), last * itemsize(stream.dtype), other)
                if stream.dtype != mixed.dtype or other != view:
                    raise IncompatibleState(
                        f"{name} ({mixed.dtype}) differs between {member.label} and {self.newest.label}, and integers='equal' "
                        "was asked for"
                    )

    def _average(self, name: str, mixed: Mixed, box: Box, first: int, last: int, view: memoryview) -> None:
        wide = torch_dtype(accumulator(mixed.dtype))
        out = _tensor(view, torch_dtype(mixed.dtype))
        with self._pool.lend() as raw, self._pool.lend() as buffer:
            total = _tensor(buffer[: (last - first) * wide.itemsize], wide)
            if len(set(self.weights)) > 1:
                self._sum(mixed, box, first, last, self.weights, raw, total)
                finite = rounded(total, out)
            else:  # equal weights: one multiplication, of the sum
                self._sum(mixed, box, first, last, [1.0] * len(self.members), raw, total)
                finite = rounded(total, out, self.weights[0])
                if not finite and mixed.dtype in ("bfloat16", "float64"):
                    # A sum may leave the range where the mean does not (masks of the least bfloat16). Element by element,
                    # so that what becomes of one does not depend on its neighbours.
                    kept, good = out.clone(), torch.isfinite(total)
                    self._sum(mixed, box, first, last, self.weights, raw, total)
                    finite = rounded(total, out)
                    out.copy_(torch.where(good, kept, out))
            if not finite:
                self._explain(name, mixed, box, first, last, raw)

    def _sum(
        self,
        mixed: Mixed,
        box: Box,
        first: int,
        last: int,
        weights: Sequence[float],
        raw: memoryview,
        total: torch.Tensor,
    ) -> None:
        """Put the weighted sum of elements [first, last) of the box into ``total``."""
        with self._pool.lend() as rest:
            scratch = _tensor(rest[: PIECE * total.itemsize], total.dtype)
            for index, (stream, weight) in enumerate(zip(mixed.streams, weights, strict=True)):
                size, dtype = itemsize(stream.dtype), torch_dtype(stream.dtype)
                spare = raw[: (last - first) * size]
                for at, view in stream.lend(box, first * size, last * size, spare):
                    part = total[at // size : (at + len(view)) // size]
                    add(part, _tensor(view, dtype), weight, scratch, first=index == 0)

    @staticmethod
    def _values(stream: Stream, box: Box, first: int, last: int, buffer: memoryview) -> torch.Tensor:
        size = itemsize(stream.dtype)
        part = buffer[: (last - first) * size]
        stream.fill(box, first * size, last * size, part)
        return _tensor(part, torch_dtype(stream.dtype))

    def _explain(self, name: str, mixed: Mixed, box: Box, first: int, last: int, buffer: memoryview) -> None:
        """Say whose value it is that is not finite."""
        guilty = []
        for member, stream in zip(self.members, mixed.streams, strict=True):
            values = self._values(stream, box, first, last, buffer)
            if not all_finite(values):
                count = int((~torch.isfinite(values.float())).sum())
                guilty.append(f"{member.label} ({count} elements)")
        if guilty:
            raise IncompatibleState(
                f"{name} is NaN or infinite in {', '.join(guilty)}: leave those out, or, if it is a mask, copy it from the "
                f"newest (copy=[{name.removeprefix(MODEL)!r}])"
            )
        raise IncompatibleState(f"{name}: the result is too large for {mixed.dtype}; ask for a wider dtype")

    # ------------------------------------------------------------ for a look at it

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Return one tensor (or a box of it) of the result, on the host, under any of its names."""
        mixed = self.tensors[self.aliases.get(name, name)]
        region = Box.whole(mixed.shape) if box is None else box
        out = torch.empty(region.sizes, dtype=torch_dtype(mixed.dtype))
        if out.numel():
            self.fill(self.aliases.get(name, name), region, 0, out.numel() * out.element_size(), byte_view(out))
        return out

    def state_dict(self, prefix: str = MODEL) -> dict[str, torch.Tensor]:
        """Return the result's tensors whose names start with ``prefix``, without it; tied ones are one tensor."""
        wanted = [name for name in (*self.tensors, *self.aliases) if name.startswith(prefix)]
        stored = list(dict.fromkeys(self.aliases.get(name, name) for name in wanted))
        read: dict[str, torch.Tensor] = {}
        run_all(lambda name: read.__setitem__(name, self.read(name)), stored, READ_THREADS, "average")
        return {name.removeprefix(prefix): read[self.aliases.get(name, name)] for name in wanted}

    def load_into(self, module: nn.Module) -> None:
        """Copy the result into a live model: plain, DDP, or with DTensor parameters, of which each rank reads its own.

        Names and shapes must be the model's; dtypes are cast. Raises ``IncompatibleState`` naming what does not fit.
        """
        live = {MODEL + clean_fqn(name): value for name, value in module.state_dict(keep_vars=True).items()}
        live = {name: value for name, value in live.items() if isinstance(value, torch.Tensor)}
        here = {n for n in (*self.tensors, *self.aliases) if n.startswith(MODEL)}
        if here != live.keys():
            raise IncompatibleState(
                f"the average does not fit the model: only in the average {sorted(here - live.keys())[:5]}, only in the "
                f"model {sorted(live.keys() - here)[:5]}"
            )
        parts = [(name, box, tensor) for name, value in live.items() for box, tensor in self._targets(name, value)]

        def load(part: tuple[str, Box, torch.Tensor]) -> None:
            name, box, tensor = part
            with torch.no_grad():
                tensor.copy_(self.read(name, box))

        run_all(load, parts, READ_THREADS, "average")

    def _targets(self, name: str, value: torch.Tensor) -> Iterable[tuple[Box, torch.Tensor]]:
        leaf = tensor_leaf(name, value)
        if leaf.shape != self.tensors[self.aliases.get(name, name)].shape:
            raise IncompatibleState(f"{name} is {list(leaf.shape)} in the model, another shape in the average")
        return leaf.parts


def _tensor(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Return memory as a 1-D tensor that shares it."""
    return torch.frombuffer(view, dtype=torch.uint8).view(dtype)
