"""Is what was written what was trained? Each function asks one question and returns one answer with its evidence.

The order is that of how much an answer means: bytes, then numbers on real rows at several shapes, then predictions, then
the metric (torch.onnx's own check, a tolerance on made-up inputs, comes nowhere).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from distckpt.export.feeds import Batches, Inputs
from distckpt.export.networks import fleeting_buffers
from distckpt.export.outcome import Check
from distckpt.export.runners import Run, floats, shape_text
from distckpt.export.weights import CastNotes, Weights, is_float

TOLERANCE: Final = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of an output, in units of the outputs' own largest value (at least 1), by the dtype of the weights."""
AGREEMENT: Final = 0.99
"""Share of predictions that must be the same after a cast; without one all must."""
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What may differ. ``outputs``: see ``TOLERANCE``; ``agreement``: share of equal predictions; ``metric``: of a metric.

    After a cast a metric may move by 0.005, or by what one row weighs if that is more; without one by 0.0001.
    """

    outputs: float
    agreement: float
    metric: float

    @classmethod
    def of(
        cls, dtypes: tuple[str, str], rows: int, outputs: float | None, agreement: float | None, metric: float | None
    ) -> Limits:
        """Return limits for weights trained in one dtype and exported in another; numbers given replace the usual ones."""
        cast = dtypes[0] != dtypes[1]
        return cls(
            max(TOLERANCE.get(dtype, 1e-1) for dtype in dtypes) if outputs is None else outputs,
            (AGREEMENT if cast else 1.0) if agreement is None else agreement,
            (max(5e-3, 1 / rows) if cast else 1e-4) if metric is None else metric,
        )


# ---------------------------------------------------------------- weights


def same_weights(wanted: Mapping[str, str], found: Mapping[str, str], dtypes: Mapping[str, str]) -> Check:
    """Compare what was read back as a stranger would with what was to be written: names, dtypes, shapes, every byte."""
    if wanted == found:
        kinds = ", ".join(sorted(set(dtypes.values())))
        return Check("weights read back", "pass", f"{len(wanted)} tensors ({kinds}), every byte read back and compared")
    names = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    what = [
        f"{n} {'is missing' if n not in found else 'is not wanted' if n not in wanted else 'differs'}" for n in names
    ]
    return Check("weights read back", "fail", f"{'; '.join(what[:_SHOWN])} ({len(names)} in all)", {"names": names})


def same_state(weights: Weights, state: Mapping[str, torch.Tensor], partial: bool) -> Check:
    """Compare a recorded graph's weights with the model's, bit for bit; of ``partial`` ones those that are in it."""
    from distckpt.export.dcp_folder import load

    compared, wrong = 0, []
    for name in weights.names:
        if name not in state:
            if not partial:
                wrong.append(f"{name} is missing")
            continue
        mine = load(weights.tensors[weights.aliases.get(name, name)])
        other = state[name].detach().cpu()
        compared += 1
        if mine.dtype != other.dtype or mine.shape != other.shape:
            wrong.append(f"{name} is {other.dtype} {list(other.shape)}, not {mine.dtype} {list(mine.shape)}")
        elif not torch.equal(mine, other):
            wrong.append(f"{name} differs")
    if wrong:
        return Check("weights read back", "fail", f"{'; '.join(wrong[:_SHOWN])} ({len(wrong)} in all)")
    rest = len(weights.names) - compared
    folded = f"; {rest} are not in the graph, for no output needs them" if rest else ""
    return Check("weights read back", "pass", f"{compared} of {len(weights.names)} names with equal bits{folded}")


def sound_values(notes: CastNotes, dtype: str | None) -> list[Check]:
    """Say whether values are numbers, and what the cast did to them."""
    checks = []
    if notes.nan:
        checks.append(
            Check("finite weights", "fail", f"NaN in {_counted(notes.nan)}: this model was broken in training")
        )
    elif notes.infinite:
        checks.append(Check("finite weights", "warn", f"infinities in {_counted(notes.infinite)} (masks have some)"))
    else:
        checks.append(Check("finite weights", "pass", "no NaN, no infinity"))
    if dtype is not None:
        if notes.overflowed:
            checks.append(
                Check("cast", "fail", f"{_counted(notes.overflowed)} overflow in {dtype}; bfloat16 has float32's range")
            )
        else:
            worst = max(notes.largest.items(), key=lambda item: item[1], default=("none", 0.0))
            checks.append(
                Check(
                    "cast",
                    "pass",
                    f"to {dtype}: largest change {worst[1]:.2g} of a tensor's largest value ({worst[0]})",
                )
            )
    return checks


def _counted(table: Mapping[str, int]) -> str:
    first = ", ".join(f"{name} ({count})" for name, count in list(table.items())[:_SHOWN])
    return first if len(table) <= _SHOWN else f"{first} and {len(table) - _SHOWN} more"


def no_doubles(
    meant: bool, written: Mapping[str, str], others: Sequence[str] = (), outputs: Sequence[str] = ()
) -> Check:
    """Look for float64 that nobody ``meant``: it doubles the size and is slow, and comes from stray Python numbers."""
    leaks = [name for name, dtype in written.items() if dtype == "float64"]
    leaks += [f"{name} (inside the graph)" for name in others] + [f"{name} (an output)" for name in outputs]
    if leaks and not meant:
        return Check("no float64", "fail", f"float64 in {', '.join(leaks[:_SHOWN])} ({len(leaks)} in all)")
    if leaks:
        return Check("no float64", "warn", f"{len(leaks)} tensors are float64, as they were trained or asked for")
    return Check("no float64", "pass", "no tensor is float64")


# ---------------------------------------------------------------- the model


def in_eval_mode(module: nn.Module, run: Run, inputs: Inputs, random_nodes: Sequence[str] = ()) -> Check:
    """Prove that dropout is off: no part is in training mode, and two calls give the same bits."""
    training = [name or "the model" for name, part in module.named_modules() if part.training]
    if training:
        return Check("dropout off", "fail", f"in training mode: {', '.join(training[:_SHOWN])}")
    if random_nodes:
        return Check("dropout off", "fail", f"the graph draws random numbers: {', '.join(sorted(set(random_nodes)))}")
    first, second = run(inputs), run(inputs)
    other = [name for name in first if not torch.equal(first[name].nan_to_num(), second[name].nan_to_num())]
    if other:
        return Check(
            "dropout off", "fail", f"two calls on the same rows give different {other[0]}: forward draws random numbers "
            "in eval mode (functional.dropout without training=self.training?)"
        )  # fmt: skip
    return Check("dropout off", "pass", "every part is in eval mode; two calls give equal bits")


def buffers_outside(module: nn.Module, unstable: Sequence[str]) -> Check:
    """Say what the model's code fills in that no checkpoint has."""
    names = list(fleeting_buffers(module))
    if unstable:
        return Check(
            "buffers outside the checkpoint", "fail", f"{', '.join(unstable[:_SHOWN])}: not saved (persistent=False), and "
            "another build fills it differently, so what was trained is lost; make it persistent and save again"
        )  # fmt: skip
    if names:
        evidence = f"{', '.join(names[:_SHOWN])} ({len(names)}): made by the model's code, equal in two builds"
        return Check("buffers outside the checkpoint", "pass", evidence)
    return Check("buffers outside the checkpoint", "pass", "none")


def ties(other: Sequence[str], aliases: Mapping[str, str]) -> Check:
    """Say whether tensors that the model ties were equal in the checkpoint."""
    if other:
        return Check(
            "tied weights", "fail", f"{other[0]} are one tensor in the model and two different ones in the checkpoint"
        )
    told = ", ".join(f"{alias} = {name}" for alias, name in list(aliases.items())[:_SHOWN])
    return Check("tied weights", "pass", told or "none")


def unused_parameters(module: nn.Module, run_with_grad: Any) -> Check:
    """Find parameters that no output depends on: layers that could be removed."""
    try:
        with torch.enable_grad():
            outputs = run_with_grad()
            total = sum(value.float().sum() for value in outputs.values() if value.is_floating_point())
            parameters = dict(module.named_parameters())
            wanted = {name: p for name, p in parameters.items() if p.requires_grad}
            grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, TypeError, AttributeError) as cause:
        return Check("unused layers", "skip", f"no gradients through this model: {' '.join(str(cause).split())[:160]}")
    idle = {name: p.numel() for (name, p), grad in zip(wanted.items(), grads, strict=True) if grad is None}
    if not idle:
        return Check("unused layers", "pass", f"every one of {len(wanted)} parameters reaches an output")
    share = sum(idle.values()) / max(1, sum(p.numel() for p in parameters.values()))
    return Check(
        "unused layers", "warn", f"{len(idle)} parameters ({share:.1%} of all) reach no output: {', '.join(list(idle)[:_SHOWN])}",
        {"names": list(idle)},
    )  # fmt: skip


# ---------------------------------------------------------------- behaviour


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest and mean absolute difference of the outputs, relative to the reference's largest value (at least 1)."""

    largest: float
    mean: float
    flips: int
    choices: int


def difference(reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]) -> Difference | str:
    """Compare named outputs; a text says what makes them incomparable."""
    largest = mean = 0.0
    flips = choices = 0
    if list(reference) != list(candidate):
        return f"outputs {list(candidate)} instead of {list(reference)}"
    for name, mine in floats(reference).items():
        other = candidate[name].detach().double().cpu()
        if mine.shape != other.shape:
            return f"{name} has shape {list(other.shape)} instead of {list(mine.shape)}"
        if not torch.equal(torch.isnan(mine), torch.isnan(other)):
            return f"{name} has NaN where the trained model has none, or the reverse"
        mine, other = mine.nan_to_num(), other.nan_to_num()
        if not mine.numel():
            continue
        apart = (mine - other).abs() / max(1.0, float(mine.abs().max()))
        largest, mean = max(largest, float(apart.max())), max(mean, float(apart.mean()))
        if mine.ndim > 1 and mine.shape[-1] > 1:
            chosen = mine.argmax(-1), other.argmax(-1)
            flips += int((chosen[0] != chosen[1]).sum())
            choices += chosen[0].numel()
    for name, value in reference.items():
        if not value.is_floating_point() and not torch.equal(value.cpu(), candidate[name].cpu()):
            return f"{name} differs (whole numbers have to be equal)"
    return Difference(largest, mean, flips, choices)


def same_outputs(reference: Run, candidate: Run, batches: Batches, limits: Limits) -> list[Check]:
    """Compare outputs on real rows at several shapes, then predictions."""
    worst, total, flips, choices, shapes = 0.0, 0.0, 0, 0, []
    for label, inputs in batches.named.items():
        shapes.append(shape_text(inputs))
        try:
            found = difference(reference(inputs), candidate(inputs))
        except Exception as cause:  # a runtime's own kinds of error
            found = f"it fails: {type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
        if isinstance(found, str):
            return [Check("outputs on real rows", "fail", f"{label} ({shapes[-1]}): {found}")]
        if found.largest > limits.outputs:
            evidence = f"{label} ({shapes[-1]}): largest difference {found.largest:.2g}, allowed {limits.outputs:.2g}"
            return [Check("outputs on real rows", "fail", evidence, {"largest": found.largest, "mean": found.mean})]
        worst, total = max(worst, found.largest), max(total, found.mean)
        flips, choices = flips + found.flips, choices + found.choices
    at = ", ".join(dict.fromkeys(shapes))
    told = f"largest difference {worst:.2g}, mean {total:.2g} (allowed {limits.outputs:.2g}) at {at}"
    values = {"largest": worst, "mean": total, "shapes": shapes}
    checks = [Check("outputs on real rows", "pass", told, values)]
    if not choices:
        return [*checks, Check("same predictions", "skip", "the outputs choose nothing")]
    share = 1 - flips / choices
    status: Any = "pass" if share >= limits.agreement else "fail"
    evidence = f"{choices - flips} of {choices} equal ({share:.2%}, wanted {limits.agreement:.0%})"
    return [*checks, Check("same predictions", status, evidence, {"share": share})]


def edge_cases(reference: Run, candidate: Run, batches: Batches, limits: Limits) -> list[Check]:
    """Compare the two at the edges. Where the trained model itself refuses, a refusal is what is wanted.

    A batch of no rows may be refused by the export alone: that is a warning, for a graph may be made for one row or more.
    """
    found = []
    for label, inputs in {"batch of one": batches.named["batch of one"], **batches.edges}.items():
        name = f"edge: {label}"
        mine, theirs = _outcome(reference, inputs), _outcome(candidate, inputs)
        at = shape_text(inputs)
        if isinstance(mine, str):
            said, both = f"{at}: the trained model refuses it ({mine})", isinstance(theirs, str)
            answer = "and so does the export" if both else "the export answers"
            found.append(Check(name, "pass" if both else "warn", f"{said}, {answer}"))
        elif isinstance(theirs, str):
            status: Any = "warn" if label == "zero rows" else "fail"
            found.append(Check(name, status, f"{at}: the trained model takes it, the export does not ({theirs})"))
        else:
            apart = difference(mine, theirs)
            if isinstance(apart, str):
                found.append(Check(name, "fail", f"{at}: {apart}"))
            else:
                status = "pass" if apart.largest <= limits.outputs else "fail"
                found.append(Check(name, status, f"{at}: largest difference {apart.largest:.2g}"))
    return found


def _outcome(run: Run, inputs: Inputs) -> dict[str, torch.Tensor] | str:
    try:
        return run(inputs)
    except Exception as cause:  # whatever it raises is the answer
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:60]}"


def same_metrics(
    reference: Mapping[str, float | None], candidate: Mapping[str, float | None], limits: Limits, where: str
) -> Check:
    """Compare the metrics on the whole data; losses relative to their size."""
    if not reference:
        return Check("same metric", "skip", "no metric: give data with labels and an evaluator")
    wrong, shown = [], []
    for name, mine in reference.items():
        other = candidate.get(name)
        if mine is None or other is None or mine != mine or other != other:
            if (mine is None or mine != mine) != (other is None or other != other):
                wrong.append(f"{name} {mine} became {other}")
            continue
        if abs(mine - other) > limits.metric * max(1.0, abs(mine)):
            wrong.append(f"{name} {mine:.6g} became {other:.6g}")
        shown.append(f"{name} {mine:.4g} and {other:.4g}")
    if wrong:
        return Check("same metric", "fail", f"on {where}: {'; '.join(wrong[:_SHOWN])}; allowed {limits.metric:.2g}")
    return Check("same metric", "pass", f"on {where}: {'; '.join(shown[:_SHOWN])} ({len(shown)} metrics compared)")


def dtypes_of(weights: Weights) -> dict[str, str]:
    """Return each tensor's dtype by name."""
    return {name: stream.dtype for name, stream in weights.tensors.items()}


def main_dtype(weights: Weights) -> str:
    """Return the dtype of most bytes of floating tensors."""
    totals: dict[str, int] = {}
    for stream in weights.tensors.values():
        if is_float(stream.dtype):
            totals[stream.dtype] = totals.get(stream.dtype, 0) + stream.nbytes
    return max(totals, key=totals.__getitem__, default="float32")
