"""What runs candidates over rows: checkpoints, means that are not written, and where their results lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distckpt.averaging.batchnorm import RecomputeBatchNorm
from distckpt.averaging.blend import Blend
from distckpt.averaging.structure import statistics
from distckpt.dcp.leaves import byte_view
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError
from distckpt.format.checkpoint import list_checkpoints, open_checkpoint
from distckpt.format.digest import digest
from distckpt.selection.data import EvaluationData
from distckpt.selection.evaluate import evaluate_subjects
from distckpt.selection.evaluation import CheckpointId, Evaluation, Home
from distckpt.selection.evaluators import Evaluator
from distckpt.selection.huggingface import HuggingFaceEvaluator
from distckpt.selection.sharing import Ranks
from distckpt.selection.subjects import Paths, Subject, find_subjects
from distckpt.storage import open_store


def check_apart(validation: EvaluationData, test: EvaluationData) -> None:
    shared = len(set(validation.content.tolist()) & set(test.content.tolist()))
    if shared or validation.id.name == test.id.name:
        what = f"share {shared} rows: drop them from one" if shared else "have one name: give them names of their own"
        raise ConfigError(f"validation ({validation.id}) and test ({test.id}) {what}")


def whole_evaluator(evaluator: Evaluator, subjects: Sequence[Subject]) -> Evaluator:
    """Let averages of Hugging Face folders, which are weights alone, have the folders' own tokenizer and config."""
    newest = subjects[-1]
    if isinstance(evaluator, HuggingFaceEvaluator) and newest.id.kind == "huggingface":
        return replace(evaluator, tokenizer=evaluator.tokenizer or newest.path, config=evaluator.config or newest.path)
    return evaluator


@dataclass(slots=True)
class Jury:
    """Runs candidates over the rows."""

    evaluator: Evaluator
    validation: EvaluationData
    test: EvaluationData | None
    options: dict[str, Any]
    out: str
    confidence: float

    def on(self, data: EvaluationData, find: Callable[[], list[Subject]]) -> list[Evaluation]:
        return evaluate_subjects(find, self.evaluator, data, **self.options)

    def of(self, data: EvaluationData, paths: Paths, prefix: str = MODEL) -> list[Evaluation]:
        """Evaluate checkpoints; what belongs to no root of checkpoints has its results under ``out``."""

        def find() -> list[Subject]:
            found = find_subjects(paths, prefix=prefix)
            lacking = any(subject.home is None for subject in found)
            return find_subjects(paths, prefix=prefix, results=f"{self.out}/results") if lacking else found

        return self.on(data, find)

    def on_test(self, one: Evaluation) -> Evaluation | None:
        return None if self.test is None else self.of(self.test, one.checkpoint.path, one.checkpoint.prefix or MODEL)[0]


@dataclass(frozen=True, slots=True)
class _Draft(Subject):
    """A mean that is not written, as something to evaluate."""

    blend: Blend | None = None
    like: Subject | None = None

    @property
    def config(self) -> Any:
        """The newest member's."""
        return None if self.like is None else self.like.config

    def state_dict(self) -> dict[str, Any]:
        """Return the mean's weights under the model's own names."""
        assert self.blend is not None
        return self.blend.state_dict()


def draft_of(blend: Blend, newest: Subject, results: str, contents: Sequence[str]) -> Subject:
    """Return a mean as something to evaluate; ``contents`` are digests of its members' content, not of their paths."""
    # BatchNorm statistics may have been recomputed, on data that no digest stands for: their values go in.
    said = [digest(bytes(byte_view(blend.read(one)))) for one in statistics(list(blend.tensors))]
    members = [(m.prefix, m.weight.hex()) for m in blend.members]
    whole = digest(repr((list(contents), members, blend.rules.text, said)).encode())
    name = f"mean of {len(blend.members)}"
    home = Home(open_store(results), f"mean_of_{len(blend.members)}-{whole[:8]}")
    return _Draft(CheckpointId(name, name, whole, newest.id.step, prefix=MODEL), home, blend, newest)


def name_of(batchnorm: str | RecomputeBatchNorm, timeout_s: float) -> str:
    """Return what names of results call a BatchNorm policy: the same in every run, and rank 0's on all ranks."""
    if not isinstance(batchnorm, RecomputeBatchNorm):
        return str(batchnorm)
    ranks = Ranks(timeout_s)
    try:
        return ranks.gather(lambda check: batchnorm.name.encode(), lambda names: names[0]).decode()
    finally:
        ranks.close()


def exists(root: str, timeout_s: float) -> bool:
    """Whether a root has a checkpoint, as rank 0 sees it."""
    ranks = Ranks(timeout_s)
    try:
        there = ranks.gather(lambda check: b"", lambda parts: b"yes" if list_checkpoints(root) else b"no")
    finally:
        ranks.close()
    return there == b"yes"


def ema_prefixes(path: str) -> list[str]:
    """Return where the EMAs of a checkpoint lie: an object says what each is called."""
    checkpoint = open_checkpoint(path)
    found = []
    for name, record in checkpoint.objects.items():
        averages = record.get("averages") if isinstance(record, Mapping) else None
        for label in averages if isinstance(averages, Mapping) else ():
            prefix = f"{name}.{label}." if label else f"{name}."
            if any(tensor.startswith(prefix) for tensor in checkpoint.tensors):
                found.append(prefix)
    return found
