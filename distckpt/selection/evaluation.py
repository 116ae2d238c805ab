"""What an evaluation found: frozen values, and their JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

from distckpt.errors import ConfigError, CorruptCheckpoint
from distckpt.format import names, typed_json
from distckpt.format.digest import digest
from distckpt.format.plain_json import canonical
from distckpt.storage.base import Store

VERSION: Final = 1
Costs = Mapping[tuple[str, str], float]
"""What an error costs: (true class, predicted class) to a number; pairs that are not there cost nothing."""


@dataclass(frozen=True, slots=True)
class CheckpointId:
    """What was evaluated. ``digest``: of its content; ``name``: short, for tables; ``path``: opens it.

    ``prefix``: which weights of it (``model.``, or those of an average). ``nbytes``: of the checkpoint's files.
    """

    name: str
    path: str
    digest: str
    step: int
    generation: int = 0
    epoch: float | None = None
    prefix: str = ""
    nbytes: int = 0
    kind: Literal["distckpt", "huggingface", "ensemble"] = "distckpt"


@dataclass(frozen=True, slots=True)
class DataId:
    """Rows that models were evaluated on: results may be compared only where the digests are equal."""

    name: str
    digest: str
    rows: int

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:8]} ({self.rows} rows)"


@dataclass(frozen=True, slots=True)
class EvaluatorId:
    """How it was evaluated; ``version`` changes whenever its results might."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Threshold:
    """When a row counts as ``positive``: from this probability on; else the best of the other classes.

    ``origin`` says where the value comes from: fixed, or chosen on which data for which aim.
    """

    positive: str
    value: float
    origin: str = "fixed"

    def __str__(self) -> str:
        return f"{self.positive} from p >= {self.value:.6g} ({self.origin})"


@dataclass(frozen=True, slots=True)
class StoredPredictions:
    """The file beside the result that holds every row's prediction."""

    file: str
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Home:
    """Where results about one checkpoint lie: a folder of a store, with ``evaluations/`` in it."""

    store: Store
    folder: str

    def name(self, file: str) -> str:
        """Return the name on the store of a result's file."""
        return f"{self.folder}/{names.EVALUATIONS}/{file}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One checkpoint on one set of rows.

    ``metrics``: name to value; None where it is undefined (0/0), and NaN where the computation gave that.
    ``counts``: the same as (numerator, denominator) where the metric is a ratio of integers, so that ties are exact.
    ``n``: how many rows (for ``loss`` and ``perplexity`` loss terms) each number rests on. ``confusion[i][j]``: rows of
    class i that were predicted as class j, in the order of ``classes``. ``home``: where the result and the predictions lie.
    """

    checkpoint: CheckpointId
    data: DataId
    evaluator: EvaluatorId
    metrics: Mapping[str, float | None]
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    costs: tuple[tuple[str, str, float], ...] = ()
    threshold: Threshold | None = None
    predictions: StoredPredictions | None = None
    key: str = ""
    created: str = ""
    home: Home | None = field(default=None, compare=False, repr=False)

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        return self.checkpoint.step

    @property
    def generation(self) -> int:
        """Job start that wrote the checkpoint."""
        return self.checkpoint.generation

    @property
    def name(self) -> str:
        """Short name of the checkpoint."""
        return self.checkpoint.name

    @property
    def support(self) -> dict[str, int]:
        """Rows of each class."""
        if self.classes is None or self.confusion is None:
            return {}
        return {name: sum(row) for name, row in zip(self.classes, self.confusion, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; ``home`` is left out, and a digest covers the rest."""
        body = _plain(replace(self, home=None))
        del body["home"]
        body["metrics"] = typed_json.encode(dict(sorted(self.metrics.items())), where="$.metrics")
        return {"format": "distckpt evaluation", "version": VERSION, "digest": _body_digest(body), "evaluation": body}

    @classmethod
    def from_json(cls, document: Any, *, where: str, home: Home | None = None) -> Evaluation:
        """Return what ``to_json`` wrote to ``where``; ``CorruptCheckpoint`` if it is anything else."""
        try:
            body = dict(document["evaluation"])
            if document["format"] != "distckpt evaluation" or document["version"] != VERSION:
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            if document["digest"] != _body_digest(body):
                raise ValueError("its digest is another")
            stored, threshold, confusion = body["predictions"], body["threshold"], body["confusion"]
            body |= {
                "checkpoint": CheckpointId(**body["checkpoint"]),
                "data": DataId(**body["data"]),
                "evaluator": EvaluatorId(**body["evaluator"]),
                "metrics": typed_json.decode(body["metrics"], where=f"{where}: $.metrics"),
                "counts": {name: (pair[0], pair[1]) for name, pair in body["counts"].items()},
                "classes": None if body["classes"] is None else tuple(body["classes"]),
                "confusion": None if confusion is None else tuple(map(tuple, confusion)),
                "costs": tuple((true, said, cost) for true, said, cost in body["costs"]),
                "threshold": None if threshold is None else Threshold(**threshold),
                "predictions": None if stored is None else StoredPredictions(**stored),
            }
            return cls(**body, home=home)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as cause:
            raise CorruptCheckpoint(f"{where}: not an evaluation as it was written: {cause!r}") from cause


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _body_digest(body: Mapping[str, Any]) -> str:
    return digest(canonical(body))


def slug(text: str) -> str:
    """Return a name as metrics and files carry it: lower case, everything else than letters and digits an underscore.

    Raises ``ConfigError`` where nothing is left.
    """
    found = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not found:
        raise ConfigError(f"name {text!r}: it needs at least one letter or digit of ASCII")
    return found


def class_slugs(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes' names in metrics (``recall_negative``); ``ConfigError`` if two would be the same."""
    found = tuple(slug(name) for name in classes)
    if len(set(found)) != len(found):
        raise ConfigError(f"classes {classes}: two of them have the same name in lower case ASCII; rename them")
    return found


def costs_of(evaluation: Evaluation) -> Costs | None:
    """Return the costs that the evaluation was made with, None for none."""
    return {(true, said): cost for true, said, cost in evaluation.costs} or None


def value_and_n(evaluation: Evaluation, metric: str) -> str:
    """Return ``0.8700 (348/400)``, or ``0.3112 (n=1200)``, or ``undefined (0/0)``."""
    value, n = evaluation.metrics.get(metric), evaluation.n.get(metric, 0)
    counts = evaluation.counts.get(metric)
    if value is None:
        return f"undefined ({counts[0]}/{counts[1]})" if counts else "missing"
    small = counts is not None and counts[1] <= 10_000_000
    return f"{value:.4f} ({counts[0]}/{counts[1]})" if counts and small else f"{value:.4f} (n={n})"
