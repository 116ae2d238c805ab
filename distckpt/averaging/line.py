"""A line to the other replicas: the agreement among the ranks of one process group, and groups for some of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from distckpt.averaging.live import LiveWeights
from distckpt.averaging.replicas import Agreed
from distckpt.dcp.agreement import Agreement
from distckpt.errors import ConfigError
from distckpt.format import digest as digests

TIMEOUT_S: Final = 1800.0


@dataclass(slots=True)
class Line:
    """This rank's line to the others of a group: its agreement, its place in the group, its rank among all."""

    agreement: Agreement
    group: Any
    place: int
    rank: int
    calls: int = 0

    def key(self) -> str:
        """Return a key that no call over this group had; the same on all its ranks, as all make the same calls."""
        self.calls += 1
        return f"across/{self.calls}"


_LINES: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Line]] = weakref.WeakKeyDictionary()
_MADE: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def line_over(group: Any) -> Line:
    """Return the line over a group, made at its first use; alone where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return Line(Agreement(None, 0, 1, timeout_s=TIMEOUT_S), None, 0, 0)
    group = dist.group.WORLD if group is None else group
    place = dist.get_rank(group)
    if place < 0:
        raise ConfigError(f"rank {dist.get_rank()} is not in the group that it averages over")
    ranks = tuple(dist.get_process_group_ranks(group))
    lines = _LINES.setdefault(dist.group.WORLD, {})
    if ranks not in lines:
        store = dist.distributed_c10d._get_default_store() if len(ranks) > 1 else None
        prefix = f"distckpt/across/{digests.digest(repr(ranks).encode())[:16]}"
        agreement = Agreement(store, place, len(ranks), timeout_s=TIMEOUT_S, prefix=prefix)
        lines[ranks] = Line(agreement, group, place, dist.get_rank())
    lines[ranks].group = group
    return lines[ranks]


class Groups:
    """Process groups for sets of partners: the caller's, those of the model's meshes, else new ones that are kept."""

    def __init__(self, line: Line, weights: LiveWeights, agreed: Agreed, timeout_s: float) -> None:
        self._line, self._agreed, self._timeout_s = line, agreed, timeout_s
        self._known: dict[tuple[int, ...], Any] = {}
        meshes = {p.device_mesh for p in weights.parameters().values() if isinstance(p, DTensor)}
        for mesh in meshes if line.group is not None else ():
            for dim in range(mesh.ndim):
                found = mesh.get_group(dim)
                self._known.setdefault(tuple(sorted(dist.get_process_group_ranks(found))), found)
        if line.group is not None:
            self._known[tuple(sorted(agreed.ranks))] = line.group

    def of(self, places: Sequence[int]) -> Any:
        """Return the group of these places, collective among them the first time; None where there are no ranks."""
        if self._line.group is None:
            return None
        ranks = tuple(sorted(self._agreed.ranks[place] for place in places))
        made = _MADE.setdefault(dist.group.WORLD, {})
        found = self._known.get(ranks) or made.get(ranks)
        if found is None:
            backend = dist.get_backend_config(self._line.group)
            limit = timedelta(seconds=self._timeout_s)
            found = made[ranks] = dist.new_group(
                list(ranks), backend=backend, timeout=limit, use_local_synchronization=True
            )
        return found


def own_weight(weights: float | Sequence[float] | None, line: Line) -> tuple[float, list[float] | None]:
    """Return this rank's weight, and all ranks' where they were given."""
    if weights is None:
        return 1.0, None
    if isinstance(weights, (int, float)):
        return float(weights), None
    given = [float(weight) for weight in weights]
    if len(given) != line.agreement.world_size:
        raise ConfigError(f"{len(given)} weights for a group of {line.agreement.world_size} ranks")
    return given[line.place], given
