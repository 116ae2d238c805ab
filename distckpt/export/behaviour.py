"""Runs the trained model and what it was exported to side by side, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from distckpt.export import checks
from distckpt.export.checks import Limits
from distckpt.export.feeds import Batches, Feed, Inputs
from distckpt.export.outcome import Check, Latency, Port
from distckpt.export.runners import AsNetwork, Run, Signature, eager, named_outputs
from distckpt.export.timing import measure as measure_latency
from distckpt.selection.data import EvaluationData, Rows
from distckpt.selection.evaluators import Evaluator
from distckpt.selection.huggingface import HuggingFaceEvaluator, LanguageModel, SequenceClassification
from distckpt.selection.metrics import Custom, measure
from distckpt.selection.predictions import Predictions

Metrics = dict[str, float | None]


@dataclass(slots=True, eq=False)
class Side:
    """A model that can be run: ``network`` is what evaluators are given, a module or something that is called like one."""

    run: Run
    network: Any


@dataclass(slots=True, eq=False)
class Scene:
    """What both sides are run on."""

    feed: Feed
    rows: EvaluationData
    batches: Batches
    evaluator: Evaluator | None
    metrics: Mapping[str, Custom]
    batch_size: int
    tokenizer: Any = None


@dataclass(slots=True)
class Findings:
    """Answers, figures, and the reference's own statements about the data."""

    checks: list[Check] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)


def module_side(module: nn.Module, signature: Signature, example: Inputs) -> Side:
    """Return a module as a side; evaluators get itself, or (half precision, inputs that are fractions) what casts inputs."""
    run = eager(module, signature)
    if all(signature.cast(example)[name].dtype == value.dtype for name, value in example.items()):
        return Side(run, module)
    return Side(run, AsNetwork(run, signature, getattr(module, "config", None), torch.device("cpu")))


def graph_side(run: Run, signature: Signature, config: Any) -> Side:
    """Return a recorded graph as a side; ``config``: what evaluators look up classes in."""
    return Side(run, AsNetwork(run, signature, config, torch.device("cpu")))


def compare(reference: Side, candidate: Side, scene: Scene, limits: Limits, *, name: str, runs: int) -> Findings:
    """Ask every question that needs rows: outputs, predictions, metric, edges; then measure both."""
    found = Findings()
    found.checks += checks.same_outputs(reference.run, candidate.run, scene.batches, limits)
    if checks_failed(found):
        return found
    found.checks += checks.edge_cases(reference.run, candidate.run, scene.batches, limits)
    mine, predictions = _evaluate(reference, scene)
    theirs, _ = _evaluate(candidate, scene)
    found.checks.append(checks.same_metrics(mine, theirs, limits, str(scene.rows.id)))
    found.metrics = {"trained": mine, "exported": theirs}
    found.baseline = baseline(predictions, scene.batches.lengths)
    if runs:
        for title, side in (("eager", reference), (name, candidate)):
            for inputs in (scene.batches.single, scene.batches.several):
                found.latency.append(measure_latency(title, side.run, inputs, runs=runs))
    return found


def checks_failed(found: Findings) -> bool:
    """Whether the rest is not worth asking."""
    return any(check.status == "fail" for check in found.checks)


def evaluator_for(class_name: str, rows: EvaluationData, text: str) -> Evaluator | None:
    """Return the built-in evaluator of a transformers class, where rows have what it needs."""
    row = rows.rows[0]
    if class_name.endswith("ForSequenceClassification") and isinstance(row, Mapping) and {text, "label"} <= set(row):
        return SequenceClassification(text=text)
    if class_name.endswith(("ForCausalLM", "LMHeadModel")) and (
        isinstance(row, str) or text in row or "input_ids" in row
    ):
        return LanguageModel(text=text)
    return None


def _evaluate(side: Side, scene: Scene) -> tuple[Metrics, Predictions | None]:
    if scene.evaluator is None:
        return {}, None
    rows = Rows(scene.rows, np.arange(len(scene.rows)), scene.batch_size)
    hugging = isinstance(scene.evaluator, HuggingFaceEvaluator)
    with torch.inference_mode():
        outcome = scene.evaluator.evaluate((side.network, scene.tokenizer) if hugging else side.network, rows)
    if not isinstance(outcome, Predictions):
        return {name: float(value) for name, value in outcome.items()}, None
    return dict(measure(outcome, custom=dict(scene.metrics)).metrics), outcome


def baseline(predictions: Predictions | None, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return what monitoring compares production with: shares of classes, confidence, and sizes of inputs."""
    found: dict[str, Any] = {"input_elements": _quantiles(np.array(lengths))}
    chosen = None if predictions is None else predictions.chosen()
    if predictions is None or chosen is None:
        return found
    names = predictions.class_names()
    counts = np.bincount(chosen, minlength=len(names))
    found["predicted_share"] = {name: float(c) / len(chosen) for name, c in zip(names, counts, strict=False)}
    scores = predictions.scores()
    if scores is not None:
        found["confidence"] = _quantiles(scores.max(axis=1))
    return found | {"rows": len(chosen)}


def _quantiles(values: Any) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95)}


def ports(batches: Batches, signature: Signature, run: Run) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Return inputs and outputs with their axes; an output's axis is named after the input's that it moves with."""
    inputs = signature.cast(batches.trace)
    took = tuple(
        Port(name, _dtype(inputs[name]), tuple(axis or size for axis, size in _axes(batches, name, inputs)))
        for name in signature.inputs
    )
    sizes: dict[str, list[tuple[int, ...]]] = {}
    by_axis: dict[str, list[int]] = {}
    outputs: dict[str, torch.Tensor] = {}
    for given in batches.named.values():
        outputs = run(given)
        for name, value in outputs.items():
            sizes.setdefault(name, []).append(tuple(value.shape))
        for name in signature.inputs:
            for axis, size in _axes(batches, name, given):
                if axis is not None and len(by_axis.get(axis, ())) < len(next(iter(sizes.values()))):
                    by_axis.setdefault(axis, []).append(size)
    gave = []
    for name, shapes in sizes.items():
        axes: list[int | str] = []
        for column in zip(*shapes, strict=True):
            fits = [axis for axis, seen in by_axis.items() if list(column) == seen]
            axes.append(fits[0] if fits else column[0] if len(set(column)) == 1 else "any")
        gave.append(Port(name, _dtype(outputs[name]), tuple(axes)))
    return took, tuple(gave)


def _axes(batches: Batches, name: str, inputs: Inputs) -> list[tuple[str | None, int]]:
    return list(zip(batches.axes[name], inputs[name].shape, strict=True))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def with_gradients(module: nn.Module, signature: Signature, inputs: Inputs) -> Callable[[], dict[str, torch.Tensor]]:
    """Return a call of a module that records gradients."""

    def call() -> dict[str, torch.Tensor]:
        given = signature.cast(inputs)
        args = () if signature.keywords else tuple(given.values())
        return named_outputs(module(*args, **(given if signature.keywords else {})))

    return call
