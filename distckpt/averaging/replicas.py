"""Who is averaged with whom: ranks whose tensors are the same boxes of the same tensors. Plain values; nothing waits here.

Tensors of one mesh shape and one set of placements are of one **kind**. Of a kind, a rank's coordinate on the mesh
dimensions that shard says which boxes it holds; ranks with the same coordinate are **partners**. So replicate dimensions
are averaged over and no others, and it makes no difference whether the replicas lie in one mesh or have one each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from distckpt.dcp.leaves import TensorLeaf
from distckpt.errors import ConfigError, IncompatibleState, ReplicasDiffer, first_names

PLAIN: Final = "plain"
Row = tuple[str, str, tuple[int, ...], str]
"""Name, dtype, global shape, kind."""


class Offer(msgspec.Struct, array_like=True):
    """What a rank tells the others before anything moves.

    ``rank``: in the default group. ``structure``: digest of its rows. ``kinds``: kind to coordinate. ``sums``: kind to
    checksum of what partners must have alike already. ``weights``: what it was given for all ranks, if it was.
    ``infinite``: buffers with infinities, by FQN, with their kind and checksum: partners must have these alike too.
    """

    rank: int
    host: str
    structure: str
    settings: str
    weight: float
    weights: list[float] | None
    kinds: dict[str, list[int]]
    sums: dict[str, int]
    infinite: dict[str, tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks of a group have agreed on: global ranks and weights in the group's order, coordinates by kind."""

    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    coordinates: Mapping[str, Sequence[Sequence[int]]]

    def partners(self, kind: str, me: int) -> tuple[int, ...]:
        """Return the places in the group of all that hold what ``me`` holds of a kind, ``me`` included."""
        own = list(self.coordinates[kind][me])
        return tuple(place for place, other in enumerate(self.coordinates[kind]) if list(other) == own)

    def shares(self, places: Sequence[int]) -> list[float]:
        """Return the weights of these ranks, normalised in fp64 so that they sum to 1."""
        return normalised([self.weights[place] for place in places])

    def first(self, places: Sequence[int]) -> int:
        """Return the first of these places whose weight is not 0."""
        return next(place for place in places if self.weights[place])


def normalised(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum (fp64, exactly rounded sum)."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def kind_of(leaf: TensorLeaf, rank: int) -> tuple[str, list[int]]:
    """Return a leaf's kind, and this rank's coordinate on the mesh dimensions that shard it.

    Raises ``IncompatibleState`` for layouts that no mesh describes (FSDP1's, ZeRO's).
    """
    layout = leaf.layout
    if layout is None:
        return PLAIN, []
    if any(not text.startswith(("R", "S")) for text in layout.placements):
        raise IncompatibleState(
            f"{leaf.fqn} has layout {layout.placements}: partitions of one optimizer are no replicas; average models under "
            "DDP, FSDP2, HSDP or tensor parallelism"
        )
    sharded = [dim for dim, text in enumerate(layout.placements) if text != "R"]
    if not sharded:
        return PLAIN, []
    coordinate = layout.mesh.coordinate(rank)
    if coordinate is None:
        raise IncompatibleState(f"{leaf.fqn}: rank {rank} is not in the mesh that it is sharded over")
    return f"{layout.mesh.shape}:{','.join(layout.placements)}", [coordinate[dim] for dim in sharded]


def row_of(leaf: TensorLeaf, rank: int) -> Row:
    """Return what has to be the same of a tensor on all ranks."""
    return (leaf.fqn, leaf.dtype, tuple(leaf.shape), kind_of(leaf, rank)[0])


def by_kind(leaves: Iterable[TensorLeaf], rank: int) -> dict[str, list[TensorLeaf]]:
    """Return leaves by their kind."""
    found: dict[str, list[TensorLeaf]] = {}
    for leaf in leaves:
        found.setdefault(kind_of(leaf, rank)[0], []).append(leaf)
    return found


def by_partners(
    leaves: Mapping[str, TensorLeaf], agreed: Agreed, place: int, rank: int
) -> dict[tuple[int, ...], list[TensorLeaf]]:
    """Return leaves by their set of partners, in an order that is the same for all ranks: no two wait for each other."""
    found: dict[tuple[int, ...], list[TensorLeaf]] = {}
    for kind, alike in by_kind(leaves.values(), rank).items():
        found.setdefault(agreed.partners(kind, place), []).extend(alike)
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))


def check_offers(offers: Sequence[Offer]) -> Agreed | list[int]:
    """Return what all agreed on, or the places of ranks whose structure differs from the first one's.

    Raises ``ConfigError`` for calls that differ, for weights that cannot be and where there are no replicas,
    ``ReplicasDiffer`` where partners have other checksums.
    """
    first = offers[0]
    for offer in offers[1:]:
        if offer.settings != first.settings:
            raise ConfigError(
                f"ranks {first.rank} and {offer.rank} call it differently: {first.settings}; {offer.settings}"
            )
        if offer.weights != first.weights:
            raise ConfigError(
                f"rank {offer.rank} has weights {offer.weights}, rank {first.rank} {first.weights}; give one number, this "
                "rank's own, or the same list everywhere"
            )
    other = [place for place, offer in enumerate(offers) if offer.structure != first.structure]
    if other:
        return other
    _check_weights(offers)
    kinds = {kind: [offer.kinds[kind] for offer in offers] for kind in first.kinds}
    agreed = Agreed(tuple(o.rank for o in offers), tuple(o.weight for o in offers), kinds)
    for kind in kinds:
        _check_kind(kind, agreed, offers)
    _check_infinite(agreed, offers)
    return agreed


def _check_weights(offers: Sequence[Offer]) -> None:
    for offer in offers:
        if not (math.isfinite(offer.weight) and offer.weight >= 0):
            raise ConfigError(f"rank {offer.rank} has weight {offer.weight}; want a finite number, 0 or more")
    if not math.isfinite(math.fsum(o.weight for o in offers)) or not any(o.weight for o in offers):
        raise ConfigError(f"weights {[o.weight for o in offers][:10]} have no finite sum above 0")


def _check_kind(kind: str, agreed: Agreed, offers: Sequence[Offer]) -> None:
    """Check that a kind is held by whole replicas, of one weight each, and that partners agree on their checksums."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, coordinate in enumerate(agreed.coordinates[kind]):
        places.setdefault(tuple(coordinate), []).append(place)
    counts = {len(found) for found in places.values()}
    if len(agreed.ranks) > 1 and counts == {1}:
        raise ConfigError(
            f"tensors laid out as {kind} are held once by the {len(agreed.ranks)} ranks of the group, which are one replica: "
            "nothing to average. Build each replica on a mesh of its own ranks, or on a mesh with a replicate dimension"
        )
    if len(counts) > 1:
        raise ConfigError(
            f"tensors laid out as {kind}: some shards are held by {min(counts)} ranks of the group and others by "
            f"{max(counts)}; give a group of whole replicas"
        )
    wanted: list[float] | None = None
    for found in places.values():
        if not any(agreed.weights[place] for place in found):
            raise ConfigError(f"ranks {[agreed.ranks[p] for p in found]} share {kind} and all have weight 0")
        shares = sorted(agreed.shares(found))
        wanted = wanted or shares
        if any(not math.isclose(a, b, rel_tol=1e-12) for a, b in zip(wanted, shares, strict=True)):
            raise ConfigError(
                f"ranks of one replica have different weights, so that its shards ({kind}) would be averaged differently; "
                "give all ranks of a replica one weight"
            )
        sums = {offers[place].sums.get(kind, 0) for place in found}
        if len(sums) > 1:
            raise ReplicasDiffer(
                f"ranks {[agreed.ranks[p] for p in found]} start from different {kind} tensors; average_across_ranks(model) "
                "before the outer step is made, or load one checkpoint on all ranks"
            )


def _check_infinite(agreed: Agreed, offers: Sequence[Offer]) -> None:
    """Check that infinities in buffers are a mask's, the same for all partners that go into the mean."""
    for place, offer in enumerate(offers):
        alone = [
            name
            for name, (kind, own) in offer.infinite.items()
            for other in agreed.partners(kind, place)
            if agreed.weights[other] and offers[other].infinite.get(name) != (kind, own)
        ]
        if alone:
            raise IncompatibleState(
                f"rank {offer.rank} has infinities in buffers where other ranks have other values: "
                f"{first_names(list(dict.fromkeys(alone)), 5)}; nothing was changed on any rank. Load its last good "
                "checkpoint, give it weight 0 to take the others' mean, or average with buffers='keep'"
            )


def describe_difference(tables: Mapping[int, Sequence[Row]]) -> str:
    """Return in words how ranks' rows differ from the first one's: rank to rows."""
    ranks = list(tables)
    base = {row[0]: row for row in tables[ranks[0]]}
    texts = []
    for rank in ranks[1:]:
        rows = {row[0]: row for row in tables[rank]}
        lacking, alone = sorted(base.keys() - rows.keys()), sorted(rows.keys() - base.keys())
        texts += [f"rank {rank} lacks {first_names(lacking, 5)}"] if lacking else []
        texts += [f"rank {rank} alone has {first_names(alone, 5)}"] if alone else []
        for name in sorted(base.keys() & rows.keys()):
            if tuple(rows[name]) != tuple(base[name]):
                texts.append(f"{name} is {_row(rows[name])} on rank {rank} and {_row(base[name])} on rank {ranks[0]}")
                break
    return "; ".join(texts[:5])


def _row(row: Row) -> str:
    return f"{row[1]}{list(row[2])}" + ("" if row[3] == PLAIN else f" as {row[3]}")
