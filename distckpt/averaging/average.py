"""``average_checkpoints``: checkpoints of any kind, layout and dtype as one ordinary checkpoint, streamed by block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from distckpt.averaging.arithmetic import accumulator
from distckpt.averaging.batchnorm import RecomputeBatchNorm, refresh
from distckpt.averaging.blend import Blend
from distckpt.averaging.choose import Choice, candidates, choose
from distckpt.averaging.soup import Evaluate, SoupReport, greedy_soup
from distckpt.averaging.sources import Member, Term, open_members
from distckpt.averaging.structure import Rules, statistics
from distckpt.averaging.write import Progress, Target, joined, together, write_blend
from distckpt.dcp.agreement import Agreement
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError
from distckpt.format.catalog import parse_location
from distckpt.heap import no_collections
from distckpt.importers.commit_source import SHARD_BYTES

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
THREADS: Final = 5
"""Threads that add up at most, one for each processor in any case; each takes up to 24 MiB."""
TIMEOUT_S: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What an average did. ``members``: name, step, weight, digest of each, oldest first; counts are of tensors.

    ``fit``: of a post-hoc EMA, its width, where it ends, and its fit error.
    """

    path: str
    step: int
    method: str
    members: tuple[dict[str, Any], ...]
    averaged: int
    copied: int
    aliases: int
    nbytes: int
    notes: tuple[str, ...]
    soup: SoupReport | None = None
    fit: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How an average is made and written; see ``average_checkpoints``."""

    prefix: str = MODEL
    include_optimizer: bool = False
    rules: Rules = field(default_factory=Rules)
    batchnorm: RecomputeBatchNorm | None = None
    step: int | None = None
    threads: int = THREADS
    shard_bytes: int = SHARD_BYTES
    timeout_s: float = TIMEOUT_S
    agreement: Agreement | None = None
    progress: Progress | None = None


def average_checkpoints(
    paths: Paths,
    out: str | os.PathLike[str],
    method: str = "uniform",
    *,
    weights: Sequence[float] | None = None,
    k: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    every: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    steps: Sequence[int] = (),
    evaluate: str | Evaluate | None = None,
    cache: str | os.PathLike[str] | None = None,
    prefix: str = MODEL,
    include_optimizer: bool = False,
    dtype: str | None = None,
    integers: str = "newest",
    copy: Sequence[str] = (),
    batchnorm: str | RecomputeBatchNorm = "refuse",
    step: int | None = None,
    threads: int = THREADS,
    shard_bytes: int = SHARD_BYTES,
    timeout_s: float = TIMEOUT_S,
    agreement: Agreement | None = None,
    progress: Progress | None = None,
) -> AverageReport:
    """Average checkpoints into a new committed checkpoint under the root ``out``.

    ``paths``: roots (all of a root's checkpoints), steps of one, Hugging Face or DCP folders, ``torch.save`` files, in
    any layouts and floating dtypes. ``steps``, ``window`` and ``every`` narrow what is taken (``choose.Choice``).

    ``method``: ``uniform``; ``weighted`` by ``weights`` (one for each of ``paths``, normalised in fp64; they may be
    negative); ``last`` ``k`` (5); ``best`` ``k`` by ``metric`` and ``mode``; ``every`` n-th; ``window``; ``greedy``: a soup
    chosen by ``evaluate`` (a function of a ``Blend``, or ``pkg.mod:name``; see ``soup.greedy_soup``), ``cache`` its file.

    Members are summed oldest first, in fp64 (fp32 for results of 16 bits and less), and rounded once, so the result has
    the same bits for any order of ``paths`` and any number of threads and ranks. ``dtype`` of averaged tensors is the
    members' common one unless named. Integers and flags are the newest's, or must be equal (``integers='equal'``);
    names that match a pattern of ``copy`` are the newest's too. Tied weights are averaged once. BatchNorm statistics that
    differ are refused, taken from the newest (``batchnorm='copy_newest'``) or recomputed (``RecomputeBatchNorm``).

    Only tensors whose names start with ``prefix`` go in, and become ``model.…``. ``include_optimizer`` adds the
    optimizer's state (averaged the same way; counters and whatever else a job holds are the newest's), so that a job can
    resume from the result. ``step`` defaults to the newest's.

    Where a process group exists (torchrun), all ranks call this together and each writes its part; ``agreement`` replaces
    the default one. Memory: about 24 MiB a thread, and what is read ahead (40–70 MiB, 128 at most), at any size.
    ``progress`` is told (bytes written, bytes in all).

    Raises ``ConfigError`` (wrong use), ``CheckpointNotFound``, ``IncompatibleState`` (different models; NaN or infinite
    weights, by name), ``CorruptCheckpoint`` (damage, by file), ``ReplicasDiffer`` (ranks call it differently), ``SaveFailed``;
    on all ranks. Nothing is committed then.
    """
    fixed = batchnorm if isinstance(batchnorm, RecomputeBatchNorm) else None
    rules = Rules(integers, tuple(copy) if not isinstance(copy, str) else copy, dtype,
                  "copy_newest" if isinstance(batchnorm, RecomputeBatchNorm) else batchnorm)  # fmt: skip
    options = Options(
        prefix, include_optimizer, rules, fixed, step, threads, shard_bytes, timeout_s, agreement, progress
    )
    choice = Choice(method, k, metric, mode, every, window, tuple(steps))
    if (weights is not None) != (method == "weighted"):
        raise ConfigError(f"method {method!r} with weights={weights}: method='weighted' and weights go together")
    if method == "greedy" and mode is None:
        raise ConfigError("method 'greedy' needs mode: 'max' where a higher score is better, else 'min'")
    if (evaluate is not None) != (method == "greedy"):
        raise ConfigError(f"method {method!r} with evaluate={evaluate!r}: method='greedy' and evaluate go together")
    with joined(options.agreement, options.timeout_s) as group:
        members = _opened(group, _agreed_terms(group, paths, choice, weights, options), options)
        if method != "greedy":
            return _finish(group, members, out, method, options, choice)
        assert evaluate is not None
        assert mode is not None
        soup = greedy_soup(
            members,
            evaluate,
            mode=mode,
            rules=rules,
            batchnorm=fixed,
            cache=cache,
            agreement=group,
            timeout_s=timeout_s,
        )
        return _finish(group, soup.members, out, method, options, choice, soup.report)


def combine_checkpoints(
    terms: Sequence[Term],
    out: str | os.PathLike[str],
    *,
    method: str = "linear",
    options: Options | None = None,
    fit: dict[str, Any] | None = None,
) -> AverageReport:
    """Write the linear combination of terms as a new committed checkpoint under the root ``out``.

    The general form of ``average_checkpoints``: each term has its own prefix and weight, which may be negative; the
    weights must sum to 1. The same checkpoint may be in it under several prefixes (two EMAs of one snapshot). ``fit``: plain
    values for the report and the provenance that say how the weights came about.
    """
    options = options or Options()
    with joined(options.agreement, options.timeout_s) as group:
        return _finish(group, _opened(group, terms, options, normalise=False), out, method, options, None, fit=fit)


def _agreed_terms(
    group: Agreement, paths: Paths, choice: Choice, weights: Sequence[float] | None, options: Options
) -> list[Term]:
    """Let rank 0 look and choose: a job that goes on saving would let every rank see other checkpoints."""

    def decide(_: list[bytes]) -> bytes:
        chosen = candidates(paths)
        factors = [1.0] * len(chosen)
        if weights is not None:
            if len(weights) != len(chosen):
                raise ConfigError(
                    f"{len(weights)} weights for {len(chosen)} checkpoints: {[c.path for c in chosen][:10]}"
                )
            factors = [float(weight) for weight in weights]
        by_path = dict(zip((c.path for c in chosen), factors, strict=True))
        left = choose(chosen, choice)
        return msgspec.json.encode([[candidate.path, by_path[candidate.path]] for candidate in left])

    answer = together(group, options.timeout_s, "average-choose", lambda: b"", decide)
    return [Term(path, weight, options.prefix) for path, weight in msgspec.json.decode(answer)]


def _opened(group: Agreement, terms: Sequence[Term], options: Options, *, normalise: bool = True) -> list[Member]:
    members: list[Member] = []

    def work() -> bytes:
        with no_collections():
            members.extend(open_members(terms, whole_state=options.include_optimizer, normalise=normalise))
        return b""

    together(group, options.timeout_s, "average-open", work, lambda _: b"")
    return members


def _finish(
    group: Agreement,
    members: Sequence[Member],
    out: str | os.PathLike[str],
    method: str,
    options: Options,
    choice: Choice | None,
    soup: SoupReport | None = None,
    fit: dict[str, Any] | None = None,
) -> AverageReport:
    made: list[tuple[Blend, int]] = []

    def work() -> bytes:
        with no_collections():
            blend = Blend(members, options.rules, whole_state=options.include_optimizer)
            steps = (parse_location(out).step, options.step, blend.newest.key[0])
            made.append((blend, next((s for s in steps if s is not None and s >= 0), 0)))
        return b""

    together(group, options.timeout_s, "average-blend", work, lambda _: b"")
    blend, step = made[0]
    how = options.rules.batchnorm if statistics(list(blend.tensors)) else "none"
    if options.batchnorm is not None and how != "none":
        refresh(options.batchnorm, blend, agreement=group, timeout_s=options.timeout_s)
        how = "recomputed"
    provenance = _provenance(blend, method, how, choice, soup) | ({} if fit is None else {"fit": fit})
    target = Target(os.fspath(out), step, options.threads, options.shard_bytes, options.timeout_s)
    with no_collections():
        path = write_blend(blend, target, provenance, group, options.progress)
    averaged = sum(mixed.how == "average" for mixed in blend.tensors.values())
    return AverageReport(
        path, step, method, tuple(member.row() for member in blend.members), averaged, len(blend.tensors) - averaged,
        len(blend.aliases), blend.nbytes, tuple(blend.notes), soup, fit,
    )  # fmt: skip


def _provenance(
    blend: Blend, method: str, batchnorm: str, choice: Choice | None, soup: SoupReport | None
) -> dict[str, Any]:
    averaged = sorted({mixed.dtype for mixed in blend.tensors.values() if mixed.how == "average"})
    rule = (
        {} if choice is None else {f: getattr(choice, f) for f in ("k", "metric", "mode", "every", "window", "steps")}
    )
    rule = {name: value for name, value in rule.items() if value not in (None, ())}
    return {
        "averaged_from": [member.row() for member in blend.members],
        "method": method,
        "rule": rule,
        "summed_in": {dtype: accumulator(dtype) for dtype in averaged},
        "integers": blend.rules.integers,
        "batchnorm": batchnorm,
        "notes": list(blend.notes),
        **({} if soup is None else {"soup": soup.plain()}),
    }
