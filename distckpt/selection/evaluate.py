"""Evaluate every checkpoint of a run on the same rows, on one rank or many, and keep what each said about every row."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from distckpt import clock
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.format.plain_json import canonical, strict_loads
from distckpt.manager.display import progress_bar
from distckpt.selection import cache
from distckpt.selection.data import EvaluationData, Rows, evaluation_data, import_object, share_of
from distckpt.selection.evaluation import Costs, Evaluation, EvaluatorId, slug
from distckpt.selection.evaluators import Evaluator, Outcome, code_version, evaluator_of
from distckpt.selection.metrics import Custom, Measured, measure
from distckpt.selection.predictions import Predictions, merge
from distckpt.selection.sharing import Ranks
from distckpt.selection.subjects import Paths, Subject, find_subjects

log = logging.getLogger("distckpt")
Share = Literal["auto", "data", "checkpoint"]


def evaluate_checkpoints(
    checkpoints: Paths,
    evaluator: Evaluator | Callable[[Any, Rows], Outcome] | str,
    data: Any,
    *,
    data_name: str | None = None,
    steps: Sequence[int] | None = None,
    build: Callable[[dict[str, Any], Any], Any] | str | None = None,
    metrics: Mapping[str, Custom | str] | None = None,
    costs: Costs | None = None,
    version: str | None = None,
    prefix: str = "model.",
    batch_size: int = 32,
    share: Share = "auto",
    results: str | os.PathLike[str] | None = None,
    reuse: bool = True,
    timeout_s: float = 3600.0,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate checkpoints on the same rows; returns one ``Evaluation`` each, in order of step, on every rank.

    ``checkpoints``: roots, step folders, manifests, Hugging Face folders or folders of such; ``steps`` picks some.
    ``evaluator``: ``fn(model, rows)`` or its import path, or an ``Evaluator`` (``selection.huggingface`` has some);
    ``build(state_dict, config)`` makes the function's model. ``data``: see ``evaluation_data``. ``metrics``: further
    ones, functions of ``Predictions`` or import paths. ``costs``: {(true, predicted): cost}, for the metric ``cost``.

    Under ``torchrun`` (or in any process group) every rank calls this. ``share``: whole checkpoints, or the rows of
    each; rows carry ids and are merged before anything is counted, so the result is that of one process.

    Results go to ``evaluations/`` in the step's folder (or below ``results``) and are found again by checkpoint, data,
    evaluator and version: nothing is run twice unless ``reuse`` is off. ``timeout_s``: for one checkpoint on one rank.

    Raises ``CheckpointNotFound``, ``ConfigError``, ``IncompatibleState`` (rows missing), ``CorruptCheckpoint``; with
    several ranks ``AgreementError``, the same on each.
    """
    return evaluate_subjects(
        lambda: find_subjects(checkpoints, steps=steps, prefix=prefix, results=results),
        evaluator_of(evaluator, build=build, version=version),
        evaluation_data(data, data_name),
        metrics=metrics,
        costs=costs,
        batch_size=batch_size,
        share=share,
        reuse=reuse,
        timeout_s=timeout_s,
        progress=progress,
    )


def evaluate_subjects(
    find: Callable[[], list[Subject]],
    evaluator: Evaluator,
    data: EvaluationData,
    *,
    metrics: Mapping[str, Custom | str] | None = None,
    costs: Costs | None = None,
    batch_size: int = 32,
    share: Share = "auto",
    reuse: bool = True,
    timeout_s: float = 3600.0,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate what ``find`` returns on this rank; all ranks must find the same. See ``evaluate_checkpoints``."""
    if share not in ("auto", "data", "checkpoint") or batch_size < 1:
        raise ConfigError(f"share={share!r}, batch_size={batch_size}: want auto, data or checkpoint; and at least 1")
    ranks = Ranks(timeout_s)
    try:
        return _Job(
            ranks,
            evaluator,
            data,
            {name: import_object(one) if isinstance(one, str) else one for name, one in (metrics or {}).items()},
            dict(costs or {}),
            batch_size,
            reuse,
            progress,
        ).run(find, share)
    finally:
        ranks.close()


@dataclass(slots=True)
class _Job:
    """One call of ``evaluate_checkpoints``."""

    ranks: Ranks
    evaluator: Evaluator
    data: EvaluationData
    custom: dict[str, Custom]
    costs: dict[tuple[str, str], float]
    batch_size: int
    reuse: bool
    progress: bool

    def run(self, find: Callable[[], list[Subject]], share: Share) -> list[Evaluation]:
        subjects, known = self._plan(find)
        todo = [index for index, evaluation in enumerate(known) if evaluation is None]
        by_rows = share == "data" or (share == "auto" and len(todo) < self.ranks.world_size)
        if todo and self.ranks.world_size > 1 and not by_rows:
            fresh = self._by_checkpoint([subjects[index] for index in todo])
        else:
            fresh = [
                self._by_rows(subjects[index], f"{place}/{len(todo)}") for place, index in enumerate(todo, start=1)
            ]
        for index, evaluation in zip(todo, fresh, strict=True):
            known[index] = evaluation
        return [evaluation for evaluation in known if evaluation is not None]

    # ------------------------------------------------------------ what there is to do

    def _plan(self, find: Callable[[], list[Subject]]) -> tuple[list[Subject], list[Evaluation | None]]:
        """Agree on what is evaluated and what is known already: rank 0 looks, so that no rank sees another state."""
        subjects: list[Subject] = []
        facts = [self.data.id.digest, self.evaluator.name, self.evaluator.version, self._more(), self.batch_size]

        def look(check: Callable[[], None]) -> bytes:
            subjects.extend(find())
            return canonical([*facts, [[s.id.path, s.id.digest] for s in subjects]])

        def decide(told: list[bytes]) -> bytes:
            other = next((rank for rank, text in enumerate(told) if text != told[0]), None)
            if other is not None:
                raise IncompatibleState(
                    f"rank {other} was given other data, checkpoints or options than rank 0: {told[other][:300]!r}, "
                    f"not {told[0][:300]!r}"
                )
            known = [self._known(subject) for subject in subjects]
            return canonical([None if one is None else one.to_json() for one in known])

        answers = _json(self.ranks.gather(look, decide))
        return subjects, [self._received(s, answer) for s, answer in zip(subjects, answers, strict=True)]

    def _more(self) -> Any:
        """What else than checkpoint, data and evaluator a result depends on."""
        versions = {name: code_version(function) for name, function in self.custom.items()}
        return [sorted(versions.items()), sorted([true, said, repr(cost)] for (true, said), cost in self.costs.items())]

    @property
    def _id(self) -> EvaluatorId:
        return EvaluatorId(self.evaluator.name, f"{self.evaluator.version}, batches of {self.batch_size}")

    @property
    def _reusable(self) -> bool:
        return self.reuse and self.evaluator.version is not None

    def _known(self, subject: Subject) -> Evaluation | None:
        """Return the result as stored; or made anew from stored predictions, where only own metrics or costs differ."""
        if subject.home is None:
            return None
        self._warn_of_drift(subject)
        if not self._reusable:
            return None
        found, stored = cache.find(subject.home, subject.id, self._key(subject))
        if found is not None:
            return found
        if stored is None:
            return None
        blank = Evaluation(subject.id, self.data.id, self._id, {}, predictions=stored, home=subject.home)
        predictions = cache.load_predictions(blank)
        return self._finish(subject, predictions, measure(predictions, custom=self.custom, costs=self.costs), stored)

    def _warn_of_drift(self, subject: Subject) -> None:
        assert subject.home is not None
        for earlier in cache.read_results(subject.home):
            if slug(earlier.data.name) == slug(self.data.id.name) and earlier.data.digest != self.data.id.digest:
                log.warning(
                    "%s: data %s is not %s, on which it was evaluated before: results are not comparable",
                    subject.id.name, self.data.id, earlier.data,
                )  # fmt: skip
                return

    def _key(self, subject: Subject) -> str:
        """Return the key to find a result by; parts that nothing may be found by are random."""
        first, second = cache.keys(subject.id, self.data.id, self._id, self._more()).split(".")
        versioned = all(code_version(function) is not None for function in self.custom.values())
        return f"{first if self._reusable else os.urandom(6).hex()}.{second if versioned else os.urandom(4).hex()}"

    def _received(self, subject: Subject, answer: Any) -> Evaluation | None:
        if answer is None:
            return None
        return Evaluation.from_json(answer, where=subject.path, home=subject.home)

    # ------------------------------------------------------------ doing it

    def _by_rows(self, subject: Subject, place: str) -> Evaluation:
        """Evaluate one checkpoint, each rank some of the rows; rank 0 merges, measures and stores."""
        rows = share_of(self.data, self.batch_size, self.ranks.rank, self.ranks.world_size)

        def work(check: Callable[[], None]) -> bytes:
            outcome = self._outcome(subject, rows, place, check)
            if isinstance(outcome, Predictions):
                return b"P" + outcome.to_bytes()
            if self.ranks.world_size > 1:
                raise ConfigError(
                    f"evaluator {self.evaluator.name} returns metrics, which cannot be merged over ranks: return Predictions, "
                    "or share by checkpoint"
                )
            return b"M" + _metrics_json(outcome)

        def combine(parts: list[bytes]) -> bytes:
            if parts[0][:1] == b"M":
                return canonical(self._finish(subject, None, _finished(_json(parts[0][1:]), len(self.data))).to_json())
            found = [Predictions.from_bytes(p[1:], where=f"rank {rank}") for rank, p in enumerate(parts)]
            return canonical(self._store(subject, found).to_json())

        answer = _json(self.ranks.gather(work, combine))
        return Evaluation.from_json(answer, where=subject.path, home=subject.home)

    def _by_checkpoint(self, todo: Sequence[Subject]) -> list[Evaluation]:
        """Evaluate each checkpoint on one rank alone, which also stores its result."""
        rows = share_of(self.data, self.batch_size, 0, 1)
        rank, world_size = self.ranks.rank, self.ranks.world_size

        def work(check: Callable[[], None]) -> bytes:
            done = []
            for index in range(rank, len(todo), world_size):
                check()
                outcome = self._outcome(todo[index], rows, f"{index + 1}/{len(todo)}", check)
                if isinstance(outcome, Predictions):
                    done.append(self._store(todo[index], [outcome]))
                else:
                    done.append(self._finish(todo[index], None, _finished(outcome, len(self.data))))
            return canonical([evaluation.to_json() for evaluation in done])

        def combine(parts: list[bytes]) -> bytes:
            lists = [_json(part) for part in parts]
            return canonical([lists[index % world_size][index // world_size] for index in range(len(todo))])

        answers = _json(self.ranks.gather(work, combine, times=-(-len(todo) // world_size)))
        return [Evaluation.from_json(a, where=s.path, home=s.home) for s, a in zip(todo, answers, strict=True)]

    def _outcome(self, subject: Subject, rows: Rows, place: str, check: Callable[[], None]) -> Outcome:
        """Load a model and run it."""
        title = f"{subject.id.name} ({place}) on {self.data.id.name}"
        with progress_bar(title, len(rows), enabled=self.progress and self.ranks.rank == 0, unit="rows") as advance:

            def tick(number: int) -> None:
                advance(number)
                check()

            outcome = self.evaluator.evaluate(self.evaluator.load(subject), replace(rows, tick=tick))
        if not isinstance(outcome, (Predictions, Mapping)):
            raise ConfigError(
                f"evaluator {self.evaluator.name} returned {type(outcome).__name__}; want Predictions, or a dict of metrics"
            )
        return outcome

    def _store(self, subject: Subject, parts: Sequence[Predictions]) -> Evaluation:
        merged, dropped = merge(parts, len(self.data))
        if dropped:
            log.info("%s: %d duplicate rows (padding of samplers) were dropped", subject.id.name, dropped)
        predictions = replace(merged, content=self.data.content)
        return self._finish(subject, predictions, measure(predictions, custom=self.custom, costs=self.costs))

    def _finish(
        self, subject: Subject, predictions: Predictions | None, found: Measured, stored: Any = None
    ) -> Evaluation:
        """Make the result, and store it where there is a place for it."""
        evaluation = Evaluation(
            subject.id, self.data.id, self._id, found.metrics, found.counts, found.n, found.classes, found.confusion,
            tuple((true, said, float(cost)) for (true, said), cost in self.costs.items()),
            key=self._key(subject), created=clock.utc_text(),
        )  # fmt: skip
        return evaluation if subject.home is None else cache.save(subject.home, evaluation, stored or predictions)


def _finished(metrics: Mapping[str, Any], rows: int) -> Measured:
    """Return what a function computed itself; the n is all that is known of it."""
    found = Measured()
    for name, value in metrics.items():
        try:
            found.number(str(name), None if value is None else float(value), rows)
        except (TypeError, ValueError) as cause:
            raise ConfigError(f"metric {name!r} is {value!r}, which is no number") from cause
    return found


def _metrics_json(metrics: Mapping[str, Any]) -> bytes:
    finished = _finished(metrics, 0).metrics
    return json.dumps({name: None if value is None else repr(value) for name, value in finished.items()}).encode()


def _json(data: bytes) -> Any:
    return strict_loads(data, where="a rank's answer", max_bytes=1 << 30)
