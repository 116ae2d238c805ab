"""Proof that what is declared replicated is the same on every rank that holds it: digests, compared by the leader.

A rank sends one digest for each set of values that the same ranks hold, whatever their number. Only where two ranks'
digests differ do the ranks concerned send one for each value, so that the error can name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from distckpt.dcp.leaves import REPLICATED, State, TensorLeaf, byte_view
from distckpt.dcp.planner import Plan
from distckpt.errors import ReplicasDiffer
from distckpt.format import digest as digests
from distckpt.format import typed_json
from distckpt.format.shares import Group, group_of

_OBJECTS, _TENSORS = "objects", "tensors"


@dataclass(frozen=True, slots=True)
class Claims:
    """What one rank says of replicated values: set to name to digest. A set's key is the same on all its ranks."""

    sets: Mapping[str, Mapping[str, str]]

    def encode(self) -> bytes:
        """Return one digest a set."""
        return msgspec.msgpack.encode(
            {key: digests.digest(msgspec.json.encode(sorted(found.items()))) for key, found in self.sets.items()}
        )

    def details(self, keys: Iterable[str]) -> bytes:
        """Return this rank's values' digests in some sets."""
        return msgspec.msgpack.encode({key: dict(self.sets[key]) for key in keys if key in self.sets})


def object_claims(plan: Plan, objects: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the digests of replicated objects (encoded, by name), those that the same ranks have in one set."""
    sets: dict[str, dict[str, str]] = {}
    for name, value in objects.items():
        if plan.objects[name] == REPLICATED:
            digest = digests.digest(typed_json.canonical(value))
            sets.setdefault(f"{_OBJECTS} {plan.shared[name]}", {})[name] = digest
    return sets


def tensor_claims(state: State, plan: Plan, rank: int) -> dict[str, dict[str, str]]:
    """Return the digests of this rank's values of every tensor that other ranks hold too, in sets.

    One pass of hashing over those values, on the calling thread; device tensors are copied to the host one by one.
    """
    sets: dict[Group, dict[str, str]] = {}
    for fqn, leaf in state.tensors.items():
        layout = plan.tensors[fqn].layout
        assert layout is not None
        copies = "R" in layout.placements and any(
            n > 1 for n, text in zip(layout.mesh.shape, layout.placements, strict=True) if text == "R"
        )
        if copies and leaf.parts and layout.mesh.position(rank) is not None:
            sets.setdefault(group_of(layout), {})[fqn] = leaf_digest(leaf)
    return {_key(group, rank): found for group, found in sets.items()}


def _key(group: Group, rank: int) -> str:
    """Return what the ranks that hold the same boxes call them: the mesh, and their place in it but for replicas."""
    mesh, mask = group
    coordinate = mesh.coordinate(rank) or ()
    cell = [0 if replicates else index for replicates, index in zip(mask, coordinate, strict=True)]
    return f"{_TENSORS} {digests.digest(msgspec.json.encode([mesh.shape, mesh.ranks, mask]))} {cell}"


def leaf_digest(leaf: TensorLeaf) -> str:
    """Return a digest of the values that this rank holds of one tensor, part by part in order."""
    return digests.digest("".join(digests.digest(host_bytes(tensor)) for _, tensor in leaf.parts).encode())


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, in host memory; a copy unless it is contiguous there already."""
    return byte_view(tensor.detach().cpu().contiguous())


def disagreeing(payloads: Sequence[bytes]) -> list[str]:
    """Return the sets of which ranks sent different digests; ``payloads`` are all ranks' encoded claims."""
    found: dict[str, str] = {}
    differing: set[str] = set()
    for payload in payloads:
        for key, digest in msgspec.msgpack.decode(payload, type=dict[str, str]).items():
            if found.setdefault(key, digest) != digest:
                differing.add(key)
    return sorted(differing)


def refuse(payloads: Sequence[bytes]) -> None:
    """Raise ``ReplicasDiffer``, naming values and ranks; ``payloads`` are all ranks' details of the sets that differ."""
    values: dict[tuple[str, str], dict[str, list[int]]] = {}
    for rank, payload in enumerate(payloads):
        for key, names in msgspec.msgpack.decode(payload, type=dict[str, dict[str, str]]).items():
            for name, digest in names.items():
                values.setdefault((key, name), {}).setdefault(digest, []).append(rank)
    differing = [
        (key, name, " / ".join(str(ranks) for ranks in by_digest.values()))
        for (key, name), by_digest in sorted(values.items())
        if len(by_digest) > 1
    ]
    for key, name, ranks in differing:
        if key.startswith(_OBJECTS):
            raise ReplicasDiffer(
                f"object {name!r} differs between ranks {ranks}; make it equal, or declare it per rank: "
                f"CheckpointConfig(per_rank=({name.split('.')[0]!r},))"
            )
    shown = ", ".join(f"{name} (ranks {ranks})" for _, name, ranks in differing[:8])
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    raise ReplicasDiffer(
        f"values that should be the same on several ranks differ: {shown}{more}. Synchronise them, or declare per-rank "
        "state with CheckpointConfig(per_rank=...); saving one rank's values would lose the others'"
    )
