"""Buffers of live replicas: floating ones averaged, BatchNorm's with the spread of the means, others from one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from distckpt.averaging.buckets import Moved, real, reduce_pairs, send_from
from distckpt.averaging.line import Groups, Line
from distckpt.averaging.live import Live
from distckpt.averaging.replicas import Agreed, by_partners
from distckpt.averaging.updater import Pair
from distckpt.clock import Deadline
from distckpt.dcp.leaves import TensorLeaf, torch_dtype
from distckpt.engines.base import clean_fqn

POLICIES = ("average", "first", "keep")


def persistent_buffers(module: nn.Module, live: Live) -> dict[str, TensorLeaf]:
    """Return the buffers that a checkpoint holds, by FQN."""
    own = {clean_fqn(name) for name, _ in module.named_buffers()}
    return {name: msgspec.structs.replace(leaf, fqn=name) for name, leaf in live.followed.items() if name in own}


@dataclass(frozen=True, slots=True)
class Together:
    """What moving buffers needs of a call: who takes part, how they are reached, and until when."""

    agreed: Agreed
    groups: Groups
    line: Line
    deadline: Deadline


@torch.no_grad()
def move_buffers(module: nn.Module, buffers: Mapping[str, TensorLeaf], policy: str, together: Together) -> Moved:
    """Average or send buffers. Sums are fp64; a BatchNorm's variance is that of all ranks' data together."""
    agreed, groups, line = together.agreed, together.groups, together.line
    averaged = {n: leaf for n, leaf in buffers.items() if policy == "average" and _is_number(leaf)}
    sent = {n: leaf for n, leaf in buffers.items() if n not in averaged}
    moved = Moved()
    for places, leaves in by_partners(sent, agreed, line.place, line.rank).items():
        first = agreed.ranks[agreed.first(places)]
        tensors = [tensor for leaf in leaves for _, tensor in leaf.parts]
        moved.add(send_from(first, tensors, groups.of(places), deadline=together.deadline))
    norms = [(averaged[mean], averaged[variance]) for mean, variance in _norms(module) if variance in averaged]
    moments = [_Moments(mean.parts[0][1], variance.parts[0][1]) for mean, variance in norms]
    stand_in = {id(t): wide for m in moments for t, wide in ((m.mean, m.first), (m.variance, m.second))}
    for places, leaves in by_partners(averaged, agreed, line.place, line.rank).items():
        share = agreed.shares(places)[places.index(line.place)]
        tensors = [stand_in.get(id(tensor), tensor) for leaf in leaves for _, tensor in leaf.parts]
        pairs = [Pair(real(t), ()) for t in tensors]
        moved.add(reduce_pairs(pairs, share, groups.of(places), wide=True, deadline=together.deadline))
    for moment in moments:
        moment.write()
    return moved


class _Moments:
    """A BatchNorm's statistics as first and second moments in fp64, which are what averages."""

    def __init__(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.mean, self.variance = mean, variance
        self.first = mean.double()
        self.second = variance.double() + self.first.square()

    def write(self) -> None:
        self.mean.copy_(self.first)
        self.variance.copy_((self.second - self.first.square()).clamp_(min=0.0))


def _norms(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of running means and variances that belong together."""
    found = []
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            prefix = clean_fqn(f"{name}.") if name else ""
            found.append((f"{prefix}running_mean", f"{prefix}running_var"))
    return found


def _is_number(leaf: TensorLeaf) -> bool:
    dtype = torch_dtype(leaf.dtype)
    return dtype.is_floating_point or dtype.is_complex


def has_norms(module: nn.Module) -> bool:
    """Whether a module keeps BatchNorm statistics."""
    return bool(_norms(module))
