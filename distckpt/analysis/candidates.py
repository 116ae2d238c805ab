"""Who is compared in a report: the evaluations of a run's checkpoints, of averages and others, and what a rule chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distckpt.analysis.reading import RunReader
from distckpt.analysis.record import Run, Save
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.format.catalog import parse_location
from distckpt.selection.evaluation import Evaluation
from distckpt.selection.ledger import Candidate, candidates_of, evaluations
from distckpt.selection.select import Choice, select

Key = tuple[str, str]
"""(digest of the checkpoint, prefix of its weights)."""


@dataclass(frozen=True, slots=True)
class Average:
    """An averaged checkpoint: ``members`` are the digests of the manifests that it was made from."""

    label: str
    digest: str
    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every evaluation to be compared, averages that are known, and the choice where a rule was given."""

    evaluations: tuple[Evaluation, ...]
    averages: tuple[Average, ...]
    choice: Choice | None
    own: Mapping[str, Save]

    def label(self, one: Evaluation) -> str:
        """Return what a candidate is called in tables."""
        c = one.checkpoint
        average = next((average for average in self.averages if average.digest == c.digest), None)
        name = average.label if average is not None else c.name
        said = f" ({c.prefix.rstrip('.')})"
        return name if c.prefix in ("", "model.") or name.endswith(said) else name + said

    def is_own(self, one: Evaluation) -> bool:
        """Whether it is an ordinary checkpoint of this run's lineage, to be drawn over its steps."""
        return one.checkpoint.digest in self.own and one.checkpoint.prefix in ("", "model.")

    def is_chosen(self, one: Evaluation) -> bool:
        """Whether the rule chose it."""
        return key_of(one) in self.chosen

    @property
    def chosen(self) -> set[Key]:
        """The winner of the rule; empty without one."""
        winner = None if self.choice is None else self.choice.winner
        return set() if winner is None or winner.evaluation is None else {key_of(winner.evaluation)}

    @property
    def chosen_save(self) -> Save | None:
        """The checkpoint of this run that the rule chose."""
        winner = None if self.choice is None else self.choice.winner
        if winner is None:
            return None
        if winner.evaluation is not None:
            return self.own.get(winner.evaluation.checkpoint.digest)
        where = (winner.step, winner.generation)
        return next((save for save in self.own.values() if (save.step, save.generation) == where), None)

    @property
    def members(self) -> set[str]:
        """Digests of the checkpoints that went into an average."""
        return {digest for average in self.averages for digest in average.members}


def key_of(one: Evaluation) -> Key:
    """Return what an evaluation is about."""
    return one.checkpoint.digest, one.checkpoint.prefix


def gather(
    run: Run, compare: Sequence[str | os.PathLike[str]] = (), *, by: str | None = None, data: str | None = None
) -> Candidates:
    """Return the candidates of a run and of other roots or results folders.

    ``by``: a rule as ``distckpt select`` takes it, on ``data`` or on the run's own metrics. A mean of one checkpoint of the
    run (a greedy soup that took no second) is that checkpoint again, and left out. Raises as ``select`` does, and
    ``CheckpointNotFound`` for a folder that holds neither checkpoints nor results.
    """
    found = list(evaluations(run.root))
    averages = [_average(save, run.root) for save in run.kept if save.provenance.get("averaged_from")]
    for path in compare:
        more, others = evaluations(path), _saves(path)
        if not more and not others:
            raise CheckpointNotFound(f"{os.fspath(path)}: neither checkpoints nor results are there; check the path")
        found += more
        averages += [_average(save, os.fspath(path)) for save in others if save.provenance.get("averaged_from")]
    own = {save.digest: save for save in run.kept}
    same = {average.digest for average in averages if len(average.members) == 1 and average.members <= own.keys()}
    found = [one for one in found if one.checkpoint.digest not in same]
    averages = [average for average in averages if average.digest not in same]
    if data is not None and by is None:
        raise ConfigError(f"data {data!r} without a rule: say by which rule to choose on it")
    known = Candidates(tuple(found), tuple(averages), None, own)
    if by is None:
        return known
    roots = [run.root, *(os.fspath(path) for path in compare)] if data is not None else run.root
    named = [
        _named(candidate, known)
        for candidate in candidates_of(roots, data)
        if candidate.evaluation is None or candidate.evaluation.checkpoint.digest not in same
    ]
    return replace(known, choice=select(named, by, data=data))


def _named(candidate: Candidate, known: Candidates) -> Candidate:
    return candidate if candidate.evaluation is None else replace(candidate, name=known.label(candidate.evaluation))


def _saves(path: str | os.PathLike[str]) -> list[Save]:
    if parse_location(path).step is not None:
        raise ConfigError(f"{os.fspath(path)}: this is a step; give the root or the results folder")
    try:
        return RunReader(path).read().kept
    except CheckpointNotFound:
        return []


def _average(save: Save, root: str) -> Average:
    rows = save.provenance["averaged_from"]
    members = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, (list, tuple)) else []
    method = save.provenance.get("method")
    how = f"{method} average" if isinstance(method, str) and method != "uniform" else "average"
    name = os.path.basename(root.rstrip("/"))
    return Average(
        f"{how} of {len(members)} ({name}, step {save.step})", save.digest,
        frozenset(str(row["manifest"]) for row in members if row.get("manifest")),
    )  # fmt: skip
