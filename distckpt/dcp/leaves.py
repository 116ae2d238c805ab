"""Leaves: what a rank holds, as boxes. The one place that knows DTensor, ShardedTensor and plain tensors."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import torch
from torch.distributed.tensor import DTensor

from distckpt.boxes import Box
from distckpt.errors import IncompatibleState
from distckpt.format.layout import Held, Layout, Mesh, held_boxes, interned

REPLICATED = "replicated"
"""The same value on every rank that has it; checked by digest."""
PER_RANK = "per_rank"
"""Every rank has its own value and gets it back; ranks new after a resize keep what they have, and are reported."""
DROP_ON_RESIZE = "drop_on_resize"
"""Per rank, but of no use on another world size: then left as it is on every rank, and reported."""
GROUPS = "groups"
"""Optimizer param groups: each rank's groups may name other parameters (pipeline stages); merged by position."""


class TensorLeaf(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One tensor of the global state, as this rank holds it.

    ``shape`` is global. ``layout`` is None for a plain tensor, which is whole on every rank that has it. Each part is
    a box of the global tensor with the local tensor (any device, any strides) that holds it, of ``box.sizes``.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout | None
    parts: tuple[tuple[Box, torch.Tensor], ...]

    def view(self, box: Box) -> torch.Tensor:
        """Return the local tensor of a box that lies within one part; shares memory with the live state."""
        for held, tensor in self.parts:
            if held == box:
                return tensor
            if held.contains(box):
                return tensor[box.relative_to(held.offsets).slices]
        raise IncompatibleState(
            f"{self.fqn}: this rank does not hold box {box.offsets}+{box.sizes}; held: "
            f"{[(b.offsets, b.sizes) for b, _ in self.parts]}"
        )

    @property
    def local_nbytes(self) -> int:
        """Bytes that this rank holds of the tensor."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.parts)


class ObjectLeaf(msgspec.Struct, frozen=True, eq=False):
    """One value that is not a tensor; ``kind`` says how ranks' values relate (the constants of this module)."""

    name: str
    value: Any
    kind: str = REPLICATED


@dataclass(slots=True)
class State:
    """Everything that one rank offers to a save, or wants from a load. Aliases map a tied name to its first name."""

    tensors: dict[str, TensorLeaf] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[str, ObjectLeaf] = field(default_factory=dict)

    def add_tensor(self, fqn: str, value: torch.Tensor) -> None:
        """Add one tensor; a name that is there already raises ``IncompatibleState``."""
        self._claim(fqn)
        self.tensors[fqn] = tensor_leaf(fqn, value)

    def add_leaf(self, leaf: TensorLeaf) -> None:
        """Add a tensor that was cut into boxes elsewhere (ZeRO partitions)."""
        self._claim(leaf.fqn)
        self.tensors[leaf.fqn] = leaf

    def add_object(self, name: str, value: Any, kind: str = REPLICATED) -> None:
        """Add one value that is not a tensor."""
        self._claim(name)
        self.objects[name] = ObjectLeaf(name, value, kind)

    def _claim(self, name: str) -> None:
        if name in self.tensors or name in self.objects or name in self.aliases:
            raise IncompatibleState(f"two parts of the state are both called {name!r}; rename one of them")


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a torch dtype: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a format name; ``IncompatibleState`` where this torch lacks it."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise IncompatibleState(f"this torch ({torch.__version__}) has no dtype {name!r}; upgrade torch to load it")
    return dtype


def tensor_leaf(fqn: str, value: torch.Tensor) -> TensorLeaf:
    """Return the leaf of a plain tensor, ``DTensor`` or ``ShardedTensor``.

    Raises ``IncompatibleState`` for what cannot be saved as boxes: partial or ragged placements, sparse or
    quantized tensors, and meta tensors, which have no bytes.
    """
    if isinstance(value, DTensor):
        return _dtensor_leaf(fqn, value)
    if type(value).__name__ == "ShardedTensor":
        return _sharded_tensor_leaf(fqn, value)
    local = _checked(fqn, value.detach())
    shape = tuple(local.shape)
    return TensorLeaf(fqn, dtype_name(local.dtype), shape, None, ((_whole(shape), local),))


_whole = functools.lru_cache(Box.whole)
"""A model has few shapes, and many tensors of each."""


def _checked(fqn: str, local: torch.Tensor) -> torch.Tensor:
    if local.is_meta:
        raise IncompatibleState(
            f"{fqn} is on the meta device and has no bytes; materialise it before saving or loading"
        )
    if local.layout is not torch.strided or local.is_quantized:
        raise IncompatibleState(f"{fqn} is a {local.layout} tensor; convert it to a dense one before saving")
    return local


def _dtensor_leaf(fqn: str, value: DTensor) -> TensorLeaf:
    shape = tuple(value.shape)
    share = _share(fqn, value, shape)
    local = _checked(fqn, value.to_local().detach())
    if local.numel() != share.numel and value.device_mesh.get_coordinate() is not None:
        raise IncompatibleState(
            f"{fqn}: rank {torch.distributed.get_rank()} holds {tuple(local.shape)} but {share.layout.placements} of {shape} "
            f"on mesh {share.layout.mesh.shape} says {share.numel} elements; was it built by from_local without its global "
            "shape?"
        )
    parts = []
    for held in share.held:
        whole = held.box.sizes == local.shape  # the usual case, without an operation
        parts.append((held.box, local if whole else local[Box(held.local, held.box.sizes).slices]))
    return TensorLeaf(fqn, dtype_name(local.dtype), shape, share.layout, tuple(parts))


class _Share(NamedTuple):
    """A tensor's layout, and what this rank holds in it: nothing outside the mesh."""

    layout: Layout
    held: tuple[Held, ...]
    numel: int


_MESHES: weakref.WeakKeyDictionary[Any, tuple[Mesh, dict[Any, _Share]]] = weakref.WeakKeyDictionary()
_MOST_SHARES = 4096
"""Kept for a mesh at most: shapes that come and go do not pile up."""


def _share(fqn: str, value: DTensor, shape: tuple[int, ...]) -> _Share:
    """Return what this rank holds of a DTensor; worked out once for a mesh, placements and a shape."""
    device_mesh, placements = value.device_mesh, value.placements
    known = _MESHES.get(device_mesh)
    if known is None:
        grid = device_mesh.mesh
        known = _MESHES[device_mesh] = (interned(Mesh(tuple(grid.shape), tuple(grid.flatten().tolist()))), {})
    mesh, shares = known
    key = (shape, placements, tuple(map(type, placements)))  # a strided shard may call itself equal to a plain one
    if key not in shares:
        layout = Layout(mesh, tuple(_placement_text(fqn, p) for p in placements))
        inside = device_mesh.get_coordinate() is not None
        held = tuple(held_boxes(shape, layout, torch.distributed.get_rank())) if inside else ()
        if len(shares) >= _MOST_SHARES:
            shares.clear()
        shares[key] = _Share(layout, held, sum(h.box.numel for h in held))
    return shares[key]


def _placement_text(fqn: str, placement: Any) -> str:
    if placement.is_replicate():
        return "R"
    if type(placement).__name__ == "_StridedShard":
        return f"SS({placement.dim},{int(placement.split_factor)})"
    if placement.is_shard():
        return f"S({placement.dim})"
    raise IncompatibleState(f"{fqn} has placement {placement}; redistribute it to Shard or Replicate before saving")


def _sharded_tensor_leaf(fqn: str, value: Any) -> TensorLeaf:
    metadata = value.metadata()
    shape = tuple(metadata.size)
    by_rank: dict[int, list[Box]] = {}
    for shard in metadata.shards_metadata:
        by_rank.setdefault(shard.placement.rank(), []).append(Box(tuple(shard.shard_offsets), tuple(shard.shard_sizes)))
    world = torch.distributed.get_world_size()
    layout = Layout(Mesh.flat(range(world)), ("S(0)",))
    if any(
        [h.box for h in held_boxes(shape, layout, r)] != [b for b in by_rank.get(r, []) if b.numel]
        for r in range(world)
    ):
        ranks = sorted(by_rank)
        layout = Layout(Mesh.flat(ranks), ("E",), tuple(tuple(by_rank[r]) for r in ranks))
    parts = tuple(
        (Box(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)), _checked(fqn, s.tensor.detach()))
        for s in value.local_shards()
    )
    return TensorLeaf(fqn, dtype_name(metadata.tensor_properties.dtype), shape, layout, parts)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy. Shape ``[nbytes]``, writable."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() and flat.data_ptr() != tensor.data_ptr():
        raise ValueError("byte_view needs a contiguous tensor")
    return flat.view(torch.uint8).numpy().data


def flatten_tree(prefix: str, tree: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Take the tensors out of a nested state dict.

    Returns (FQN to tensor, the tree with a ``typed_json.Ref`` in each tensor's place). Containers that are walked:
    dict, list, tuple. Names are the path joined by dots; 0-d and small tensors are tensors like any other.
    """
    from distckpt.format.typed_json import Ref

    tensors: dict[str, torch.Tensor] = {}

    def walk(path: str, node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            if path in tensors:
                raise IncompatibleState(f"two tensors of the state are both called {path!r}")
            tensors[path] = node
            return Ref(path)
        if type(node) in (list, tuple):
            return type(node)(walk(f"{path}.{i}", item) for i, item in enumerate(node))
        if type(node) is dict:
            return {key: walk(f"{path}.{key}", item) for key, item in node.items()}
        return node

    return tensors, walk(prefix, tree)


def unflatten_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Put tensors back where ``flatten_tree`` left references; ``KeyError`` names one that is missing."""
    from distckpt.format.typed_json import Ref

    if isinstance(tree, Ref):
        return tensors[tree.name]
    if type(tree) in (list, tuple):
        return type(tree)(unflatten_tree(item, tensors) for item in tree)
    if type(tree) is dict:
        return {key: unflatten_tree(item, tensors) for key, item in tree.items()}
    return tree


def tree_refs(tree: Any) -> Iterator[str]:
    """Yield the names of the tensors that a tree refers to."""
    from distckpt.format.typed_json import Ref

    if isinstance(tree, Ref):
        yield tree.name
        return
    children: Iterable[Any] = tree.values() if type(tree) is dict else tree if type(tree) in (list, tuple) else ()
    for child in children:
        yield from tree_refs(child)
