"""Greedy soups: add one checkpoint after another, best first, as long as a held-out score does not get worse.

From Wortsman et al. 2022 (model soups). Every call of the evaluation is a look at the held-out data, and a soup takes up
to 2K - 1 of them: they are counted, and its score is the best of many. Report the result on data that had no part in it.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from distckpt.averaging.batchnorm import RecomputeBatchNorm, refresh
from distckpt.averaging.blend import Blend
from distckpt.averaging.sources import Member, reweighted
from distckpt.averaging.structure import Rules, statistics
from distckpt.averaging.write import joined, together
from distckpt.dcp.agreement import Agreement
from distckpt.errors import ConfigError, ReplicasDiffer
from distckpt.format.digest import digest
from distckpt.manager.ranking import check_mode, measured

log = logging.getLogger("distckpt")

Evaluate = Callable[[Blend], float]
"""Takes a blend (``load_into(model)``, ``state_dict()``, ``read(name)``) and returns its held-out score."""


@dataclass(frozen=True, slots=True)
class Look:
    """One candidate soup: its members' names, its score, whether it was kept, and whether the score was cached."""

    members: tuple[str, ...]
    score: float
    kept: bool
    cached: bool


@dataclass(frozen=True, slots=True)
class SoupReport:
    """How a soup came about. ``looks``: evaluations on the held-out data, cached ones (earlier looks) included."""

    mode: str
    score: float
    best_single: float
    looks: int
    evaluated: int
    history: tuple[Look, ...]

    def plain(self) -> dict[str, Any]:
        """Return it as plain values, for provenance."""
        history = [{"members": list(h.members), "score": h.score, "kept": h.kept} for h in self.history]
        return {
            "mode": self.mode, "score": self.score, "best_single": self.best_single, "looks": self.looks,
            "evaluated": self.evaluated, "history": history,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Soup:
    """The members that were kept, equally weighted, oldest first."""

    members: list[Member]
    report: SoupReport


@dataclass(slots=True)
class _Scores:
    """Scores by digest of the member set, and what gives new ones; the same on all ranks."""

    evaluate: Evaluate
    named: str
    rules: Rules
    batchnorm: RecomputeBatchNorm | None
    agreement: Agreement
    timeout_s: float
    file: Path | None
    known: dict[str, float] = field(default_factory=dict)
    looks: int = 0
    evaluated: int = 0

    def of(self, members: Sequence[Member]) -> tuple[float, bool]:
        """Return (score, whether it was cached) of the uniform mean of some members."""
        blend, key = self._mean(members)
        self.looks += 1
        if key in self.known:
            return self.known[key], True
        if self.batchnorm is not None and len(members) > 1 and statistics(list(blend.tensors)):
            refresh(self.batchnorm, blend, agreement=self.agreement, timeout_s=self.timeout_s)
        score = self._agreed(blend)
        self.evaluated += 1
        self.known[key] = score
        self._keep()
        return score, False

    def _mean(self, members: Sequence[Member]) -> tuple[Blend, str]:
        """Return the mean and its key among the scores; rank 0's, as times of files may differ where nodes have copies."""
        made: list[Blend] = []

        def work() -> bytes:
            made.append(Blend(reweighted(members, [1.0] * len(members)), self.rules))
            return self._key(made[0]).encode()

        key = together(self.agreement, self.timeout_s, "soup-mean", work, lambda keys: keys[0])
        return made[0], key.decode()

    def _key(self, blend: Blend) -> str:
        """Return what a score depends on: the evaluation, the members, their files, and how they are averaged."""
        files = [member.files for member in blend.members]
        batchnorm = "" if self.batchnorm is None else self.batchnorm.name
        return f"{self.named} {digest(repr((blend.digest, files, self.rules.text, batchnorm)).encode())}"

    def _agreed(self, blend: Blend) -> float:
        """Evaluate on all ranks together; one number for all, or an error for all."""

        def decide(payloads: list[bytes]) -> bytes:
            scores = [msgspec.msgpack.decode(payload) for payload in payloads]
            other = [rank for rank, score in enumerate(scores) if score.hex() != scores[0].hex()]
            if other:
                raise ReplicasDiffer(
                    f"the evaluation returned {scores[0]} on rank 0 and {scores[other[0]]} on rank {other[0]}; reduce its "
                    "counts over ranks, so that all return one score"
                )
            return payloads[0]

        def work() -> bytes:
            return msgspec.msgpack.encode(float(self.evaluate(blend)))

        return float(msgspec.msgpack.decode(together(self.agreement, self.timeout_s, "soup", work, decide)))

    def load(self) -> None:
        """Let rank 0 read the cache, so that all ranks skip the same evaluations."""

        def decide(_: list[bytes]) -> bytes:
            found = {} if self.file is None or not self.file.is_file() else _read(self.file)
            return msgspec.msgpack.encode(found)

        answer = together(self.agreement, self.timeout_s, "soup-cache", lambda: b"", decide)
        self.known = msgspec.msgpack.decode(answer)

    def _keep(self) -> None:
        if self.file is None or not self.agreement.is_leader:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1))
        except OSError as error:
            log.warning("scores are not kept: %s", error)


def greedy_soup(
    members: Sequence[Member],
    evaluate: str | Evaluate,
    *,
    mode: str = "max",
    rules: Rules | None = None,
    batchnorm: RecomputeBatchNorm | None = None,
    cache: str | os.PathLike[str] | None = None,
    agreement: Agreement | None = None,
    timeout_s: float = 6 * 3600.0,
) -> Soup:
    """Choose members greedily by a held-out score; ``mode`` says whether higher (``max``) or lower (``min``) is better.

    Every member is scored alone; the best starts the soup (of equals, the earlier), and each other one, best first, stays
    if the mean with it is not worse. A score that is NaN or infinite in the winning direction counts as unmeasured, and
    never wins. ``evaluate``: a function, or ``pkg.mod:name``; all ranks call it together, and must get one result.
    ``batchnorm`` recomputes the statistics of each mean before it is scored; its batches are then read many times.
    ``cache``: a JSON file of scores by evaluation, member set (of other kinds than distckpt's: with sizes and times of
    their files) and rules; it does not see what data ``evaluate`` and ``batchnorm`` read: other data, another file. Blends
    are read from storage when the evaluation reads them; nothing is written.

    Raises ``ConfigError`` where no member can be scored, ``ReplicasDiffer`` where ranks disagree, and what the
    evaluation raises, on all ranks.
    """
    check_mode(mode, "mode")
    name = evaluate if isinstance(evaluate, str) else f"{evaluate.__module__}:{getattr(evaluate, '__qualname__', '<>')}"
    if cache is not None and "<" in name:
        raise ConfigError(
            f"cache={os.fspath(cache)}: scores of {name} cannot be told from another's; use a named function"
        )
    rules = rules or Rules()
    if batchnorm is not None:
        rules = replace(rules, batchnorm="copy_newest")  # until they are recomputed
    functions: list[Evaluate] = []

    def begin() -> bytes:
        functions.append(load_function(evaluate) if isinstance(evaluate, str) else evaluate)
        Blend(members, rules)  # what cannot be averaged is refused before anything is looked at
        return b""

    with joined(agreement, timeout_s) as group:
        together(group, timeout_s, "soup-begin", begin, lambda _: b"")
        file = None if cache is None else Path(cache)
        scores = _Scores(functions[0], name, rules, batchnorm, group, timeout_s, file)
        scores.load()
        return _chosen(members, mode, scores)


def _chosen(members: Sequence[Member], mode: str, scores: _Scores) -> Soup:
    """Score every member alone, then each one with what was kept before it, best first."""
    sign = 1.0 if mode == "max" else -1.0
    single = [(*scores.of([member]), member) for member in members]
    ranked = sorted((s for s in single if measured(s[0], mode) is not None), key=lambda s: -sign * s[0])
    if not ranked:
        raise ConfigError(f"the evaluation measured none of {len(members)} checkpoints: {[s[0] for s in single][:10]}")
    best, _, first = ranked[0]
    soup, best_single = [first], best
    history = [Look((m.source.name,), score, m is first, cached) for score, cached, m in single]
    for _, _, member in ranked[1:]:
        trial = sorted([*soup, member], key=lambda m: m.key)
        score, cached = scores.of(trial)
        kept = measured(score, mode) is not None and sign * score >= sign * best
        history.append(Look(tuple(m.source.name for m in trial), score, kept, cached))
        if kept:
            best, soup = score, trial
    report = SoupReport(mode, best, best_single, scores.looks, scores.evaluated, tuple(history))
    return Soup(reweighted(soup, [1.0] * len(soup)), report)


def load_function(path: str) -> Callable[..., Any]:
    """Return the function that an import path ``pkg.mod:name`` names; ``ConfigError`` if there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as cause:
        raise ConfigError(f"{path!r}: no such function ({cause}); give it as package.module:function") from cause
    if not callable(found):
        raise ConfigError(f"{path!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text())
        return {str(key): float(value) for key, value in found.items() if not math.isnan(float(value))}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: scores cannot be read and are taken anew: %s", file, error)
        return {}
