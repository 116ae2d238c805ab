"""Ensembles of checkpoints: averaged probabilities (or logits), from kept predictions, or of models as they run.

Weights are normalised. ``probabilities``: the mean of the members' probabilities; ``logits``: the softmax of the mean of
their logits (a geometric mean). Language models average the probabilities of the next token; of their kept predictions
that takes no more than each target token's log-probability, which is why logits need the models themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from distckpt import clock
from distckpt.errors import ConfigError
from distckpt.format.digest import digest
from distckpt.selection.evaluation import CheckpointId, Evaluation, EvaluatorId, costs_of
from distckpt.selection.metrics import Custom, measure
from distckpt.selection.predictions import Array, Predictions, log_softmax
from distckpt.selection.statistics import check_paired
from distckpt.selection.thresholds import kept_predictions

Average = Literal["probabilities", "logits"]


def ensemble_predictions(
    members: Sequence[Predictions], weights: Sequence[float] | None = None, average: Average = "probabilities"
) -> Predictions:
    """Return what the ensemble says about each row, from what its members said; no model runs.

    Raises ``ConfigError`` where scores are missing, ``IncompatibleState`` for members of different rows or classes.
    """
    shares = normalised(weights, len(members))
    _check_average(average)
    first = members[0]
    for other in members[1:]:
        check_paired(first, other)
    common: dict[str, Any] = {
        "ids": first.ids,
        "labels": first.labels,
        "classes": first.classes,
        "content": first.content,
    }
    if first.token_logprobs is not None:
        if average == "logits":
            raise ConfigError(
                "averaging a language model's logits needs whole distributions: use Ensemble with the models"
            )
        tokens = np.stack([_tokens(member, first).astype(np.float64) for member in members])
        with np.errstate(divide="ignore"):
            joint = np.logaddexp.reduce(tokens + np.log(shares)[:, None], axis=0)
        return Predictions(**common, terms=first.terms, token_logprobs=joint)
    scores = [_scores(member) for member in members]
    if average == "probabilities":
        return Predictions(**common, probabilities=np.tensordot(shares, np.stack(scores), axes=1))
    with np.errstate(divide="ignore"):
        logs = [
            np.log(one) if m.logits is None else log_softmax(m.logits) for m, one in zip(members, scores, strict=True)
        ]
    return Predictions(**common, probabilities=np.exp(log_softmax(np.tensordot(shares, np.stack(logs), axes=1))))


def _scores(member: Predictions) -> Array:
    found = member.scores()
    if found is None:
        raise ConfigError("an ensemble needs probabilities or logits of every member, which some did not keep")
    return found


def _tokens(member: Predictions, first: Predictions) -> Array:
    if member.token_logprobs is None or not np.array_equal(np.asarray(member.terms), np.asarray(first.terms)):
        raise ConfigError("an ensemble of language models needs the same tokens from each: use one tokenizer")
    return member.token_logprobs


def ensemble_evaluations(
    members: Sequence[Evaluation],
    weights: Sequence[float] | None = None,
    average: Average = "probabilities",
    *,
    name: str | None = None,
    metrics: dict[str, Custom] | None = None,
) -> tuple[Evaluation, Predictions]:
    """Return the evaluation of the ensemble of evaluated checkpoints, and its predictions: a candidate like any other.

    Raises as ``ensemble_predictions``; ``ConfigError`` for different data; ``CheckpointNotFound`` where none were kept.
    """
    shares = normalised(weights, len(members))
    first = members[0]
    if any(one.data.digest != first.data.digest for one in members):
        raise ConfigError(
            f"an ensemble of evaluations on different rows: {', '.join(sorted({str(one.data) for one in members}))}"
        )
    made = ensemble_predictions([kept_predictions(one) for one in members], weights, average)
    found = measure(made, custom=metrics, costs=costs_of(first))
    content = digest(repr([(one.checkpoint.digest, one.checkpoint.prefix) for one in members] + list(shares)).encode())
    title = name or f"ensemble of {len(members)} ({average}{'' if weights is None else ', weighted'})"
    nbytes = sum(one.checkpoint.nbytes for one in members)
    identity = CheckpointId(title, "", content, max(one.step for one in members), nbytes=nbytes, kind="ensemble")
    evaluator = EvaluatorId(first.evaluator.name, first.evaluator.version)
    evaluation = Evaluation(
        identity, first.data, evaluator, found.metrics, found.counts, found.n, found.classes, found.confusion, first.costs,
        created=clock.utc_text(),
    )  # fmt: skip
    return evaluation, made


def pool_weights(members: Sequence[Predictions], *, rounds: int = 1000, tolerance: float = 1e-9) -> list[float]:
    """Return the weights (sum 1) with which the members' mean probability has the least loss on these rows.

    The loss is convex in them; expectation maximisation for a mixture of fixed components (Dempster et al. 1977, 4.3)
    never increases it. They are chosen on these rows, so they are judged on others. Raises as ``ensemble_predictions``.
    """
    for other in members[1:]:
        check_paired(members[0], other)
    right = np.stack([np.exp(-_target_losses(member, members[0])) for member in members])
    right = np.maximum(right, np.finfo(np.float64).tiny)
    shares = normalised(None, len(members))
    for _ in range(rounds):
        before, shares = shares, shares * (right / (shares @ right)).mean(axis=1)
        if np.abs(shares - before).max() < tolerance:
            break
    return [float(one) for one in shares / shares.sum()]


def _target_losses(member: Predictions, first: Predictions) -> Array:
    """Return minus ln p of each row's class, or of each target token."""
    if first.token_logprobs is not None:
        return -_tokens(member, first).astype(np.float64)
    losses = member.row_losses() if member.scores() is not None else None
    if losses is None:
        raise ConfigError("weights of an ensemble need labels, and probabilities or logits of every member")
    return losses


def normalised(weights: Sequence[float] | None, count: int) -> Any:
    """Return the weights with sum 1 (float64), equal ones for None; ``ConfigError`` for negative or unfit ones."""
    found = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if not count or found.shape != (count,) or not np.isfinite(found).all() or found.min() < 0 or found.sum() <= 0:
        raise ConfigError(f"weights {weights} for {count} members: want one number from 0 on for each, not all 0")
    return found / found.sum()


def _check_average(average: str) -> None:
    if average not in ("probabilities", "logits"):
        raise ConfigError(f"average={average!r}: want 'probabilities' or 'logits'")


def average_logits(logits: Sequence[torch.Tensor], weights: Any, average: Average = "probabilities") -> torch.Tensor:
    """Return the ensemble's log-probabilities (..., classes or vocabulary), float32, from each member's logits."""
    _check_average(average)
    logs = torch.stack([one.float().log_softmax(-1) for one in logits])
    shares = torch.as_tensor(weights, dtype=torch.float32, device=logs.device).view(-1, *[1] * (logs.ndim - 1))
    if average == "logits":
        return (logs * shares).sum(0).log_softmax(-1)
    return (logs + shares.log()).logsumexp(0)


class Ensemble(torch.nn.Module):
    """Several models as one: called like any of them, it returns an object whose ``logits`` are log-probabilities.

    For classifiers, and for language models (next-token probabilities at every position); it goes wherever an evaluator
    takes a model. Memory and time are those of all members.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        weights: Sequence[float] | None = None,
        average: Average = "probabilities",
    ) -> None:
        super().__init__()
        _check_average(average)
        self.models = torch.nn.ModuleList(models)
        self.shares = normalised(weights, len(models))
        self.average: Average = average
        self.config = getattr(models[0], "config", None)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the first member's."""
        return next(self.models[0].parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """Run every member on the same inputs."""
        outputs = [model(*args, **kwargs) for model in self.models]
        return SimpleNamespace(logits=average_logits([_logits(one) for one in outputs], self.shares, self.average))


def _logits(output: Any) -> torch.Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"a member returned {type(output).__name__}; want logits, or an object that has them")
    return found
