"""``average_across_ranks``: the mean of live replicas, in place, over the training group (local SGD, federated rounds).

A call is a round of the agreement (everything is compared, NaN is looked for, nothing has moved), the reductions
(``buckets.py``), and a second round that compares what came out. ``replicas.py`` says who is averaged with whom,
``outer.py`` is an outer optimizer in the place of the plain mean.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import msgspec
import torch

from distckpt import errors
from distckpt.averaging.arithmetic import AVERAGEABLE
from distckpt.averaging.buckets import (
    BUCKET,
    Moved,
    Write,
    checksum,
    copy_back,
    not_finite,
    real,
    reduce_pairs,
)
from distckpt.averaging.line import TIMEOUT_S, Groups, Line, line_over, own_weight
from distckpt.averaging.live import Live, LiveWeights
from distckpt.averaging.live_buffers import POLICIES, Together, has_norms, move_buffers, persistent_buffers
from distckpt.averaging.replicas import (
    Agreed,
    Offer,
    Row,
    by_kind,
    by_partners,
    check_offers,
    describe_difference,
    kind_of,
    row_of,
)
from distckpt.averaging.updater import Pair
from distckpt.clock import Deadline
from distckpt.dcp.leaves import TensorLeaf
from distckpt.engines.deepspeed_guard import is_deepspeed
from distckpt.engines.step_hook import pass_fences
from distckpt.errors import AgreementError, ConfigError, DistckptError, IncompatibleState, ReplicasDiffer, first_names
from distckpt.format import digest as digests

STALE: Final = (
    "BatchNorm statistics are of the ranks' own weights: recompute_batchnorm() before evaluating, or train on"
)


@dataclass(frozen=True, slots=True)
class AcrossReport:
    """What an average over ranks did.

    ``ranks``: of the group, in its order, with their normalised ``weights``. ``tensors`` were averaged, ``buffers`` averaged
    or sent. ``collectives`` and ``nbytes``: what this rank took part in, and the bytes that it put in.
    """

    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    tensors: int
    buffers: int
    collectives: int
    nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """What becomes of the means: ``write`` puts them in their place. ``shadows``: further memory of a leaf's parts, cut alike.

    ``same``: tensors by FQN that partners must have alike before the call. ``settings``: compared between ranks.
    """

    settings: str = "mean"
    write: Write = copy_back
    shadows: Callable[[str, int], tuple[torch.Tensor, ...]] = lambda name, part: ()
    same: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One call's arguments, as far as they are the same for every operation."""

    group: Any
    weights: float | Sequence[float] | None
    buffers: str
    dtype: torch.dtype
    bucket: int
    timeout_s: float

    def check(self) -> None:
        """Raise ``ConfigError`` for settings that make no sense."""
        if self.buffers not in POLICIES:
            raise ConfigError(f"buffers={self.buffers!r}: want one of {', '.join(map(repr, POLICIES))}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={self.dtype}: sums want torch.float32 or torch.float64")
        if self.bucket < 1:
            raise ConfigError(f"bucket={self.bucket}: want a number of elements, 1 or more")
        if not _is_time(self.timeout_s):
            raise ConfigError(f"timeout_s={self.timeout_s!r}: want seconds, above 0")

    def deadline(self) -> Deadline:
        """Return when the call is over. What is no time at all is told to the others in the round, within the usual time."""
        return Deadline.after(self.timeout_s if _is_time(self.timeout_s) else TIMEOUT_S)

    @property
    def settings(self) -> str:
        """What has to be the same on all ranks."""
        return f"buffers={self.buffers!r}, dtype={self.dtype}, bucket={self.bucket}"


def average_across_ranks(
    model: Any,
    group: Any = None,
    weights: float | Sequence[float] | None = None,
    op: Any = "mean",
    *,
    buffers: str = "average",
    dtype: torch.dtype = torch.float32,
    bucket: int = BUCKET,
    timeout_s: float = TIMEOUT_S,
) -> AcrossReport:
    """Set the weights of every replica to their weighted mean, in place; all ranks of ``group`` call it together.

    ``model``: a module under any torch layout (one process, DDP, FSDP2, HSDP, tensor parallel, compiled, or a list of
    pipeline stages), whose trainable floating-point parameters are averaged: each with those ranks of the group that hold
    the same shard of it, so over replicate dimensions alone. Frozen parameters and optimizer state stay as they are.
    ``group``: a process group of whole replicas, by default all ranks; reductions run on it, and on the groups of the
    model's meshes. With pipeline stages: the ranks of one stage.

    ``weights``: this rank's own (samples seen, say), or a list of all ranks' in the group's order; divided by their sum in
    fp64. A rank of weight 0 gets the mean and does not contribute, whatever its weights are. All ranks of a sharded
    replica have one weight. ``op``: ``"mean"``, or an ``OuterStep`` made for this model, which then takes its step.

    ``buffers``: ``"average"`` those of floating dtype (of BatchNorm, variances are pooled with the spread of the means) and
    take integers from the first rank with a weight; ``"first"`` takes all from it; ``"keep"`` leaves each rank its own.
    Sums are fp32, or ``dtype=torch.float64``; fp64 tensors' are fp64. ``bucket``: elements reduced at a time.

    The result has the same bits on all replicas, which is checked. Raises, on all ranks and before anything was changed:
    ``IncompatibleState`` (weights that are NaN or infinite, buffers to average that are NaN or have other infinities than their
    partners', other tensors, shapes, dtypes or layouts, by rank and FQN),
    ``ConfigError`` (weights, settings that differ, ranks that are one replica), ``AgreementTimeout`` naming ranks that did
    not come within ``timeout_s``. An ``AgreementError`` with ``in_doubt``, from a rank that died later, leaves weights that
    may be partly averaged: load the last checkpoint.
    """
    call = Call(group, weights, buffers, dtype, bucket, timeout_s)
    if callable(getattr(op, "run", None)) and not isinstance(op, type):
        return op.run(model, call)  # type: ignore[no-any-return]

    def prepare(_: Live) -> Operation:
        if op != "mean":
            raise ConfigError(f"op={op!r}: want 'mean' or an OuterStep")
        return Operation()

    return Averager(model).run(call, prepare)


class Averager:
    """The weights of one model, as they are averaged over ranks; looks at the model anew in each call."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._weights: LiveWeights | None = None

    @property
    def weights(self) -> LiveWeights:
        """The model's weights; ``ConfigError`` for models that are no replicas. First asked for where errors are told."""
        if self._weights is None:
            if is_deepspeed(self._model):
                raise ConfigError(
                    "the ranks of a DeepSpeed engine are one replica, whose partitions have no partners: average checkpoints "
                    "of several jobs (average_checkpoints), or train replicas with DDP or FSDP2"
                )
            self._weights = LiveWeights(self._model, average_buffers=False)
        return self._weights

    @torch.no_grad()
    def run(self, call: Call, prepare: Callable[[Live], Operation]) -> AcrossReport:
        """Do one call; see ``average_across_ranks``. ``prepare``: says what to do with the weights as they lie now."""
        line, deadline = line_over(call.group), call.deadline()
        key = line.key()
        try:
            with line.agreement.guard(key, deadline=deadline):
                call.check()
                live = self.weights.look()
                operation = prepare(live)
                buffers = {} if call.buffers == "keep" else persistent_buffers(self.weights.module, live)
                rows = [row_of(leaf, line.rank) for leaf in (*live.averaged.values(), *buffers.values())]
                offer = self._offer(call, operation, live, buffers, rows, line)
            agreed = _agree(line, key, offer, rows, deadline)
            done, sums, moved = f"{key}/done", {}, Moved()
            with line.agreement.guard(done, deadline=deadline):
                pass_fences()
                together = Together(agreed, Groups(line, self.weights, agreed, call.timeout_s), line, deadline)
                moved.add(move_buffers(self.weights.module, buffers, call.buffers, together))
                for places, leaves in by_partners(live.averaged, agreed, line.place, line.rank).items():
                    share = agreed.shares(places)[places.index(line.place)]
                    pairs = [pair for leaf in leaves for pair in pairs_of(leaf, operation)]
                    moved.add(reduce_pairs(pairs, share, together.groups.of(places), operation.write,
                                           wide=call.dtype == torch.float64, bucket=call.bucket, deadline=deadline))  # fmt: skip
                for kind, leaves in by_kind((*live.averaged.values(), *buffers.values()), line.rank).items():
                    sums[kind] = checksum([tensor for leaf in leaves for _, tensor in leaf.parts])
            _compare(line, done, agreed, sums, deadline)
        except AgreementError as error:
            _raise(error)
        notes = (STALE,) if buffers and has_norms(self.weights.module) else ()
        return AcrossReport(agreed.ranks, tuple(agreed.shares(range(len(agreed.ranks)))), len(live.averaged), len(buffers),
                            moved.collectives, moved.nbytes, notes)  # fmt: skip

    def _offer(
        self,
        call: Call,
        operation: Operation,
        live: Live,
        buffers: Mapping[str, TensorLeaf],
        rows: Sequence[Row],
        line: Line,
    ) -> Offer:
        """Return what this rank tells the others; ``IncompatibleState`` for weights that no mean can use."""
        own, given = own_weight(call.weights, line)
        if own != 0:
            bad = not_finite(live.averaged)
            if bad:
                raise IncompatibleState(
                    f"rank {line.rank} has weights that are NaN or infinite: {first_names(bad, 5)}; "
                    "nothing was changed on any rank. Load its last good checkpoint, or give it weight 0 to take the others' "
                    "mean"
                )
        leaves = (*live.averaged.values(), *buffers.values())
        kinds = dict(kind_of(leaf, line.rank) for leaf in leaves)
        sums: dict[str, int] = {}
        for kind, alike in by_kind([live.averaged[name] for name in operation.same], line.rank).items():
            sums[kind] = checksum([tensor for leaf in alike for tensor in operation.same[leaf.fqn]])
        infinite = _infinities(buffers, line.rank) if own != 0 and call.buffers == "average" else {}
        settings = f"op={operation.settings}, {call.settings}"
        structure = digests.digest(msgspec.json.encode(rows))
        return Offer(line.rank, socket.gethostname(), structure, settings, own, given, kinds, sums, infinite)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


# ---------------------------------------------------------------------- rounds


def _agree(line: Line, key: str, offer: Offer, rows: Sequence[Row], deadline: Deadline) -> Agreed:
    """Return what all ranks agreed on before anything moves; errors are all ranks'."""

    def decide(payloads: list[bytes]) -> bytes:
        found = check_offers([msgspec.msgpack.decode(payload, type=Offer) for payload in payloads])
        if isinstance(found, list):
            return msgspec.msgpack.encode({"differ": found})
        return msgspec.msgpack.encode(
            {"ranks": found.ranks, "weights": found.weights, "coordinates": found.coordinates}
        )

    verdict = msgspec.msgpack.decode(
        line.agreement.round(key, msgspec.msgpack.encode(offer), decide, deadline=deadline)
    )
    if "differ" in verdict:
        told = line.place == 0 or line.place in verdict["differ"][:3]
        payload = msgspec.msgpack.encode((offer.rank, rows if told else []))

        def name(payloads: list[bytes]) -> bytes:
            tables = {rank: own for rank, own in (msgspec.msgpack.decode(p) for p in payloads) if own}
            raise IncompatibleState(
                f"the ranks' models differ: {describe_difference(tables)}; nothing was changed on any rank. Average models of "
                "one structure (pipeline stages: group= the ranks of one stage)"
            )

        line.agreement.round(f"{key}/rows", payload, name, deadline=deadline)
    return Agreed(tuple(verdict["ranks"]), tuple(verdict["weights"]), verdict["coordinates"])


def _compare(line: Line, key: str, agreed: Agreed, sums: Mapping[str, int], deadline: Deadline) -> None:
    """Check that partners have the same bits now."""

    def decide(payloads: list[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(payload) for payload in payloads]
        for place in range(len(found)):
            for kind in found[place]:
                other = [p for p in agreed.partners(kind, place) if found[p][kind] != found[place][kind]]
                if other:
                    raise ReplicasDiffer(
                        f"after the average ranks {agreed.ranks[place]} and {agreed.ranks[other[0]]} have different bits in "
                        f"tensors laid out as {kind}: a collective gave ranks different results, or something else wrote them"
                    )
        return b""

    line.agreement.round(key, msgspec.msgpack.encode(dict(sums)), decide, deadline=deadline)


def _raise(error: AgreementError) -> NoReturn:
    """Raise on every rank the kind of error that the first failed rank raised, with all ranks' texts."""
    cause = error.__cause__
    if isinstance(cause, DistckptError) and not isinstance(cause, AgreementError):
        raise cause from None
    kind = getattr(errors, error.failures[0].kind, None) if error.failures else None
    if isinstance(kind, type) and issubclass(kind, DistckptError) and not issubclass(kind, AgreementError):
        raise kind(str(error)) from error
    if error.key.endswith("/done"):
        raise AgreementError(
            f"{error}; weights may be partly averaged: load the last checkpoint", key=error.key, failures=error.failures,
            missing=error.missing, in_doubt=True,
        ) from error  # fmt: skip
    raise error


def _infinities(buffers: Mapping[str, TensorLeaf], rank: int) -> dict[str, tuple[str, int]]:
    """Return kind and checksum of the buffers with infinities, which a mask may have; ``IncompatibleState`` for NaN."""
    found = not_finite({name: leaf for name, leaf in buffers.items() if leaf.dtype in AVERAGEABLE})
    bad = [name for name in found if any(bool(real(t).double().isnan().any()) for _, t in buffers[name].parts)]
    if bad:
        raise IncompatibleState(
            f"rank {rank} has buffers that are NaN: {first_names(bad, 5)}; nothing was changed on any rank. Load its last good "
            "checkpoint, give it weight 0 to take the others' mean, or average with buffers='keep'"
        )
    return {
        name: (kind_of(buffers[name], rank)[0], checksum([tensor for _, tensor in buffers[name].parts]))
        for name in found
    }


def pairs_of(leaf: TensorLeaf, operation: Operation) -> list[Pair]:
    """Return a leaf's parts with the operation's own memory beside them, complex ones as real."""
    return [
        Pair(real(tensor), tuple(map(real, operation.shadows(leaf.fqn, number))))
        for number, (_, tensor) in enumerate(leaf.parts)
    ]
