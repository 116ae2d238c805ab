"""``compare_candidates``: what a run could ship, made, evaluated on the same rows and compared.

Single checkpoints, the average of the last and of the best by loss, EMA, a greedy soup, ensembles. Averages and soups are
written as checkpoints under ``out``, named after what is in them, so that nothing is made twice. Every choice is made on
validation rows; the test rows report.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from distckpt.averaging.average import average_checkpoints
from distckpt.averaging.blend import Blend
from distckpt.averaging.jury import Jury, check_apart, draft_of, ema_prefixes, exists, name_of, whole_evaluator
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.format.checkpoint import open_checkpoint
from distckpt.format.digest import digest
from distckpt.selection.compare import LOWER_IS_BETTER, CandidateComparison, Entrant, Kind, compare_entrants
from distckpt.selection.data import Rows, evaluation_data
from distckpt.selection.ensemble import ensemble_evaluations, pool_weights
from distckpt.selection.evaluation import Costs, Evaluation, Threshold
from distckpt.selection.evaluators import Evaluator, Outcome, evaluator_of
from distckpt.selection.ledger import candidate_of
from distckpt.selection.metrics import at_threshold
from distckpt.selection.predictions import Predictions
from distckpt.selection.rules import Rule, as_rule, best_by, choose, eligible, ranked
from distckpt.selection.statistics import interval_of
from distckpt.selection.subjects import Paths, Subject, find_subjects
from distckpt.selection.thresholds import ThresholdRule, choose_threshold, kept_predictions, with_threshold

log = logging.getLogger("distckpt")
ENSEMBLES: Final = ("probabilities", "logits", "weighted")
Pair = tuple[Evaluation, Predictions]


def compare_candidates(
    checkpoints: Paths,
    evaluator: Evaluator | Callable[[Any, Rows], Outcome] | str,
    validation: Any,
    test: Any = None,
    *,
    rule: Rule | str,
    out: str | os.PathLike[str],
    last: int = 5,
    top: int = 5,
    loss: str = "loss",
    ema: bool = True,
    soup: bool = True,
    ensembles: Sequence[str] = ("probabilities", "weighted"),
    metrics: Sequence[str] = ("accuracy", "loss"),
    criteria: Sequence[tuple[str, str]] | None = None,
    build: Callable[[dict[str, Any], Any], Any] | str | None = None,
    costs: Costs | None = None,
    threshold: Threshold | ThresholdRule | None = None,
    version: str | None = None,
    prefix: str = MODEL,
    batch_size: int = 32,
    batchnorm: Any = "refuse",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    timeout_s: float = 3600.0,
    progress: bool = True,
) -> CandidateComparison:
    """Make, evaluate and compare what a run could ship; ``rule`` (see ``rules.py``) says what matters.

    ``checkpoints``, ``evaluator``, ``validation``, ``test`` (checkpoints, and rows with no row in common), ``build``,
    ``costs``, ``version``, ``prefix``, ``batch_size``: as in ``evaluate_checkpoints``. ``out``: a folder or URL for averages.

    Candidates: every checkpoint; the average of the ``last`` ones; that of the ``top`` by ``loss`` on validation, and
    ``ensembles`` of the same (means of ``probabilities`` or ``logits``, or ``weighted``: probabilities, with the weights
    of least loss on validation); with ``ema`` the best of each EMA that the checkpoints hold; with ``soup`` a greedy soup
    scored by what the rule asks first, within its constraints. ``threshold``: a fixed one, or a rule by which each candidate
    gets its own on validation, which then holds on test. ``batchnorm``: as in ``average_checkpoints``; averages are told
    apart by how many batches they were recomputed on, not by what is in these: other data needs another ``out``. What
    cannot be made (other heads, BatchNorm, one checkpoint alone) is left out, and the result says why.

    The rest is that of ``compare_entrants``. Under torchrun all ranks call this, and all get the result.

    Raises as ``evaluate_checkpoints``, ``average_checkpoints`` and ``compare_entrants``; ``ConfigError`` where validation
    and test share rows, or the evaluator returns finished metrics instead of predictions.
    """
    unknown = [name for name in ensembles if name not in ENSEMBLES]
    if unknown or last < 1 or top < 1:
        raise ConfigError(f"ensembles {unknown}, last={last}, top={top}: want {', '.join(ENSEMBLES)}, and at least 1")
    rows = evaluation_data(validation)
    fresh = None if test is None else evaluation_data(test)
    if fresh is not None:
        check_apart(rows, fresh)
    options = {"costs": costs, "batch_size": batch_size, "timeout_s": timeout_s, "progress": progress}
    found = evaluator_of(evaluator, build=build, version=version)
    home = f"{os.fspath(out).rstrip('/')}"
    first = find_subjects(checkpoints, prefix=prefix)
    jury = Jury(whole_evaluator(found, first), rows, fresh, options, home, confidence)
    bench = _Bench(jury, as_rule(rule), prefix, batchnorm, name_of(batchnorm, timeout_s), threshold, timeout_s)
    bench.enter_singles(checkpoints)
    bench.enter_averages(last, top, loss, ensembles)
    if ema:
        bench.enter_emas()
    if soup:
        bench.enter_soup()
    return compare_entrants(
        bench.entrants, bench.rule, metrics=[m for m in metrics if m in bench.singles[0].metrics], criteria=criteria,
        confidence=confidence, resamples=resamples, seed=seed, looks=bench.looks, left_out=bench.left_out,
        threshold="" if threshold is None else str(threshold),
    )  # fmt: skip


@dataclass(slots=True)
class _Bench:
    """Candidates as they come in."""

    jury: Jury
    rule: Rule
    prefix: str
    batchnorm: Any
    batchnorm_name: str
    threshold: Threshold | ThresholdRule | None
    timeout_s: float
    singles: list[Evaluation] = field(default_factory=list)
    entrants: list[Entrant] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    looks: int = 0
    tested: dict[str, Evaluation] = field(default_factory=dict)

    def enter_singles(self, checkpoints: Paths) -> None:
        self.singles = self._look(checkpoints, self.prefix)
        for one in self.singles:
            self._enter(one.name, "single", one)

    def enter_averages(self, last: int, top: int, loss: str, ensembles: Sequence[str]) -> None:
        """Enter the average of the last, that of the best by loss, and ensembles of the latter."""
        newest = sorted(self.singles, key=lambda one: (one.step, one.generation))[-last:]
        self._average(f"average of the last {len(newest)}", newest)
        mode = "min" if loss in LOWER_IS_BETTER else "max"
        have = [one for one in self.singles if one.metrics.get(loss) is not None]
        if not have:
            self.left_out.append(f"the best by {loss}: validation does not give it")
            return
        names = [one.name for one in ranked(best_by(loss, mode), [candidate_of(one) for one in have], top)]
        best = [one for one in self.singles if one.name in names]
        if {one.name for one in best} == {one.name for one in newest}:
            self.left_out.append(f"average of the best {len(best)} by {loss}: they are the last {len(newest)}")
        else:
            self._average(f"average of the best {len(best)} by {loss}", best)
        for kind in ensembles:
            self._ensemble(kind, best, loss)

    def enter_emas(self) -> None:
        """Enter, of each EMA that the checkpoints hold, the best by the rule."""
        where: dict[str, list[str]] = {}
        for one in self.singles:
            if one.checkpoint.kind == "distckpt":
                for prefix in ema_prefixes(one.checkpoint.path):
                    where.setdefault(prefix, []).append(one.checkpoint.path)
        for prefix, paths in where.items():
            found = self._look(paths, prefix)
            best = self._best(found)
            name = prefix.rstrip(".").replace("ema", "EMA", 1)
            if best is None:
                self.left_out.append(f"{name}: none meets the rule")
            else:
                how = f"the best of {len(found)} on validation"
                self._enter(f"{name} of step {best.step}", "ema", best, how)

    def enter_soup(self) -> None:
        """Enter the greedy soup, if it is more than one checkpoint."""
        if len(self.singles) < 2:
            self.left_out.append("greedy soup: there is one checkpoint")
            return
        aim = self.rule.aim
        assert aim is not None
        known = {one.checkpoint.digest: one for one in self.singles}
        by_path = {os.path.realpath(one.checkpoint.path): one.checkpoint.digest for one in self.singles}
        newest = Subject(self.singles[-1].checkpoint, None)

        def score(blend: Blend) -> float:
            # A folder of another kind has no manifest, but was digested when it was evaluated alone.
            members = [m.manifest_digest or by_path[os.path.realpath(m.source.path)] for m in blend.members]
            if len(members) == 1 and members[0] in known:
                evaluation = known[members[0]]
            else:
                draft = draft_of(blend, newest, f"{self.jury.out}/results", members)
                (evaluation,) = map(self._judged, self.jury.on(self.jury.validation, lambda: [draft]))
            value = aim.value(candidate_of(evaluation)) if self._best([evaluation]) is not None else None
            return float("nan") if value is None else float(value)

        who = f"{self.jury.evaluator.name} {self.jury.evaluator.version}"
        what = f"greedy {self.rule} {self.threshold} {self.jury.validation.id.digest} {who}"
        made = self._made(f"greedy soup, {aim}", "soup", self.singles, what,
                          {"method": "greedy", "evaluate": score, "mode": aim.mode})  # fmt: skip
        if made is None:
            return
        provenance: Any = open_checkpoint(made.checkpoint.path).provenance
        steps = [str(member["step"]) for member in provenance["averaged_from"]]
        self.looks += max(0, int(provenance["soup"]["looks"]) - len(self.singles))
        if len(steps) == 1:
            self.left_out.append(f"greedy soup: no mean was better, so it is step {steps[0]} alone")
        else:
            self._enter("greedy soup", "soup", made, f"steps {', '.join(steps)}, added while {aim} got no worse")

    # ------------------------------------------------------------ inside

    def _look(self, paths: Paths, prefix: str) -> list[Evaluation]:
        found = list(map(self._judged, self.jury.of(self.jury.validation, paths, prefix)))
        self.looks += len(found)
        return found

    def _judged(self, one: Evaluation) -> Evaluation:
        """Return a result on validation at the threshold, or at the candidate's own."""
        if self.threshold is None:
            return one
        return self._at(one, kept_predictions(one))[0]

    def _at(self, one: Evaluation, said: Predictions, fixed: Threshold | None = None) -> Pair:
        value = fixed or self.threshold
        if value is None:
            return one, said
        costs = self.jury.options["costs"]
        if isinstance(value, ThresholdRule):
            value = choose_threshold(said, value, data=one.data.name, costs=costs)
        return with_threshold(one, said, value, costs=costs), at_threshold(said, value)

    def _best(self, found: Sequence[Evaluation]) -> Evaluation | None:
        def ends(candidate: Any, metric: str) -> tuple[float, float] | None:
            interval = interval_of(candidate, metric, confidence=self.jury.confidence)
            return None if interval is None else (interval.low, interval.high)

        pool, _ = eligible(self.rule, [candidate_of(one) for one in found], ends)
        return choose(self.rule, pool)[0].evaluation if pool else None

    def _enter(self, name: str, kind: Kind, one: Evaluation, how: str = "") -> None:
        test = self.jury.on_test(one)
        said = None if test is None else kept_predictions(test)
        if test is not None and said is not None:
            self.tested[one.checkpoint.digest + one.checkpoint.prefix] = test
            test, said = self._at(test, said, one.threshold)
        self.entrants.append(Entrant(name, kind, one, kept_predictions(one), test, said, how))

    def _average(self, name: str, members: Sequence[Evaluation]) -> None:
        if len(members) < 2:
            self.left_out.append(f"{name}: there is one checkpoint")
            return
        made = self._made(name, "average", members, "uniform", {"method": "uniform"})
        if made is not None:
            self.looks += 1
            self._enter(name, "average", made, f"mean of steps {_steps(members)}")

    def _made(
        self, name: str, stem: str, members: Sequence[Evaluation], what: str, how: Mapping[str, Any]
    ) -> Evaluation | None:
        """Average members unless that was done before; returns its evaluation on validation, None if it cannot be."""
        key = digest(
            repr([what, self.batchnorm_name, [one.checkpoint.digest + self.prefix for one in members]]).encode()
        )
        root = f"{self.jury.out}/{stem}-{key[:12]}"
        if not exists(root, self.timeout_s):
            paths = [one.checkpoint.path for one in members]
            try:
                average_checkpoints(
                    paths, root, prefix=self.prefix, batchnorm=self.batchnorm, timeout_s=self.timeout_s, **how
                )
            except (IncompatibleState, ConfigError) as error:
                self.left_out.append(f"{name}: {error}")
                return None
        return self._judged(self.jury.of(self.jury.validation, root)[0])

    def _ensemble(self, kind: str, members: Sequence[Evaluation], loss: str) -> None:
        if len(members) < 2:
            self.left_out.append("ensemble: there is one checkpoint")
            return
        average: Any = "logits" if kind == "logits" else "probabilities"
        name = f"ensemble of {len(members)}, {'weighted' if kind == 'weighted' else average}"
        try:
            said = [kept_predictions(one) for one in members]
            weights = pool_weights(said) if kind == "weighted" else None
            mine = self._at(*ensemble_evaluations(members, weights, average, name=name))
        except ConfigError as error:
            self.left_out.append(f"{name}: {error}")
            return
        told = "" if weights is None else f", weights {', '.join(f'{one:.2f}' for one in weights)}"
        tests = [self.tested.get(one.checkpoint.digest + one.checkpoint.prefix) for one in members]
        test, fresh = None, None
        if all(tests):
            joint = ensemble_evaluations([one for one in tests if one], weights, average, name=name)
            test, fresh = self._at(*joint, mine[0].threshold)
        self.looks += 1
        how = f"steps {_steps(members)} (the best by {loss}){told}"
        self.entrants.append(Entrant(name, "ensemble", *mine, test, fresh, how, len(members)))


def _steps(members: Sequence[Evaluation]) -> str:
    return ", ".join(str(one.step) for one in sorted(members, key=lambda one: (one.step, one.generation)))
