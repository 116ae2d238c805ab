"""Proof that what is declared replicated is the same on every rank that holds it: digests, compared by the leader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distckpt.dcp.leaves import State, TensorLeaf, byte_view
from distckpt.dcp.planner import Plan
from distckpt.errors import ReplicasDiffer
from distckpt.format import digest as digests
from distckpt.format.layout import held_boxes, replica_of


def replica_digests(state: State, plan: Plan, rank: int) -> dict[str, str]:
    """Return FQN to a digest of this rank's values, for every tensor that other ranks hold too.

    One pass of hashing over those values, on the calling thread; device tensors are copied to the host one by one.
    """
    out = {}
    for fqn, leaf in state.tensors.items():
        layout = plan.tensors[fqn].layout
        assert layout is not None
        if replica_of(layout, rank)[1] > 1 and leaf.parts:
            out[fqn] = leaf_digest(leaf)
    return out


def leaf_digest(leaf: TensorLeaf) -> str:
    """Return a digest of the values that this rank holds of one tensor, part by part in order."""
    return digests.digest("".join(digests.digest(host_bytes(tensor)) for _, tensor in leaf.parts).encode())


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, in host memory; a copy unless it is contiguous there already."""
    return byte_view(tensor.detach().cpu().contiguous())


def check_replicas(plan: Plan, by_rank: Sequence[Mapping[str, str]]) -> None:
    """Compare the digests of all ranks that hold the same boxes; ``ReplicasDiffer`` names tensors and ranks."""
    problems = []
    for fqn, row in plan.tensors.items():
        assert row.layout is not None
        groups: dict[object, dict[str, list[int]]] = {}
        for rank in row.layout.mesh.ranks:
            found = by_rank[rank].get(fqn)
            if found is not None:
                boxes = tuple(h.box for h in held_boxes(row.shape, row.layout, rank))
                groups.setdefault(boxes, {}).setdefault(found, []).append(rank)
        for variants in groups.values():
            if len(variants) > 1:
                problems.append(f"{fqn} (ranks {' / '.join(str(ranks) for ranks in variants.values())})")
    if problems:
        shown = ", ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ReplicasDiffer(
            f"values that should be the same on several ranks differ: {shown}. Synchronise them, or declare per-rank "
            "state with CheckpointConfig(per_rank=...); saving one rank's values would lose the others'"
        )
