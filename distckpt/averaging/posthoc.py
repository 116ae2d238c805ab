"""Any EMA length after training: two power-function averages are tracked, and their snapshots combined afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. The
snapshots are ordinary checkpoints with a ``PostHocEMA`` among their statefuls: keep enough of them
(``CheckpointConfig(keep_policy=...)``). What is synthesised weighs step s of n by ``s ** gamma``, as near as a linear
combination of the snapshots can come; how near is the fit error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch

from distckpt.averaging.arithmetic import AVERAGEABLE
from distckpt.averaging.average import AverageReport, Options, combine_checkpoints
from distckpt.averaging.ema import EMAModel
from distckpt.averaging.schedules import PowerFunction, Schedule, gamma_of
from distckpt.averaging.sources import Term
from distckpt.averaging.structure import statistics
from distckpt.averaging.write import joined, together
from distckpt.boxes import Box, flat_range_to_boxes
from distckpt.engines.base import MODEL
from distckpt.errors import CheckpointNotFound, ConfigError, IncompatibleState
from distckpt.format.checkpoint import Checkpoint, list_checkpoints, open_checkpoint

log = logging.getLogger("distckpt")

BLOCK = 1 << 22
"""Elements that are combined at a time: 64 MiB with float64 sums and what is read."""


class PostHocEMA(EMAModel):
    """Averages with power-function profiles, to be saved with checkpoints and combined by ``synthesise``.

    ``sigma_rel``: their relative widths; two suffice, and 0.05 and 0.10 are EDM2's. Everything else is as in ``EMAModel``;
    ``apply`` and ``averaged`` take a width. In a checkpoint they lie under ``ema.0.05.`` and ``ema.0.1.``.
    """

    def __init__(
        self,
        model: Any,
        sigma_rel: Sequence[float] = (0.05, 0.10),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        every: int = 1,
        buffers: str = "copy",
        optimizer: Any = None,
    ) -> None:
        profiles: dict[str, Schedule] = {repr(float(width)): PowerFunction(float(width)) for width in sigma_rel}
        if len(profiles) != len(sigma_rel):
            raise ConfigError(f"sigma_rel={sigma_rel!r}: want different widths")
        self._set_up(model, profiles, device, dtype, start, every, buffers, optimizer)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One average in one checkpoint: what ``open_checkpoint`` takes, the prefix of its tensors, its profile.

    ``count``: optimizer steps that are in it, which is the time of its profile. ``updates``: with those that came since the
    average last moved (``every``); 0 where it is not known.
    """

    path: str
    step: int
    prefix: str
    sigma_rel: float
    count: int
    updates: int = 0


@dataclass(frozen=True, slots=True)
class Synthesis:
    """A combination of snapshots; ``weights`` belong to ``snapshots`` and sum to 1.

    ``fit_error``: distance of the combined profile from the wanted one over the wanted one's length, in the L2 norm: 0.01
    means that a hundredth of the weighting is elsewhere than asked for. ``left_out``: steps of earlier snapshots that it
    could not use, as the averages began again after them.
    """

    snapshots: tuple[Snapshot, ...]
    weights: tuple[float, ...]
    sigma_rel: float
    count: int
    fit_error: float
    left_out: tuple[int, ...] = ()


def snapshots(root: str | os.PathLike[str], *, name: str = "ema") -> list[Snapshot]:
    """Return every power-function average in the checkpoints of a root (its lineage), oldest first.

    Raises ``CheckpointNotFound`` where there is none.
    """
    found = []
    for info in reversed(list_checkpoints(root)):
        record: Any = open_checkpoint(info.path).objects.get(name)
        averages = record.get("averages", {}) if isinstance(record, dict) else {}
        for label, average in averages.items():
            if "sigma_rel" in average["schedule"] and record["updates"] >= record["every"]:
                count = record["updates"] // record["every"] * record["every"]
                prefix = f"{name}.{label}."
                sigma_rel = average["schedule"]["sigma_rel"]
                found.append(Snapshot(info.path, info.step, prefix, sigma_rel, count, record["updates"]))
    if not found:
        raise CheckpointNotFound(
            f"{root}: no checkpoint has power-function averages called {name!r}; train with stateful={{{name!r}: "
            "PostHocEMA(model)}}"
        )
    return found


def solve_weights(found: Sequence[Snapshot], sigma_rel: float, *, step: int | None = None) -> Synthesis:
    """Return the weights whose combination of snapshots comes nearest to the profile of width ``sigma_rel``.

    Least squares over the profiles as functions of time, with weights that sum to 1 (averages of constant weights stay
    what they are). ``step``: of the checkpoint at which the wanted average ends, by default the newest; later snapshots
    are left out. So are those from before the averages last began again (``reset``, a resume without their state), as
    counts that fall tell: they have another time axis; a warning says so.

    Raises ``ConfigError`` for a width or a step that cannot be.
    """
    if step is None:
        step = max((s.step for s in found), default=0)
    until = [s for s in found if s.step <= step]
    if not any(s.step == step for s in until):
        raise ConfigError(f"step={step}: snapshots are at steps {sorted({s.step for s in found})}")
    began = _beginning(until)
    used = tuple(s for s in until if s.step >= began)
    left_out = tuple(sorted({s.step for s in until if s.step < began}))
    if left_out:
        log.warning(
            "the averages began again between steps %d and %d: snapshots at %d earlier steps are left out of the average "
            "that ends at step %d; for one that ends before, name its step", left_out[-1], began, len(left_out), step,
        )  # fmt: skip
    count = max(s.count for s in used)
    times = np.array([s.count for s in used], dtype=np.float64)
    gammas = np.array([gamma_of(s.sigma_rel) for s in used])
    wanted = gamma_of(sigma_rel)
    gram = profile_products(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    target = profile_products(times, gammas, float(count), wanted)
    norm = float(profile_products(float(count), wanted, float(count), wanted))
    weights = _nearest(gram, target)
    excess = norm - 2 * float(target @ weights) + float(weights @ gram @ weights)
    return Synthesis(used, tuple(weights.tolist()), sigma_rel, count, float(np.sqrt(max(0.0, excess) / norm)), left_out)


def _beginning(found: Sequence[Snapshot]) -> int:
    """Return the first step whose snapshots count on to the newest ones."""
    # Not by the count alone: that falls a little where a job goes on with a larger ``every``.
    ordered = sorted((s.step, max(s.count, s.updates), s.prefix) for s in found)
    began, last = ordered[0][0], dict.fromkeys((prefix for _, _, prefix in ordered), 0)
    for step, counted, prefix in ordered:
        if counted < last[prefix]:
            began = step
        last[prefix] = counted
    return began


def profile_products(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Return the inner product over time of two profiles, ``(gamma + 1) / t**(gamma + 1) * s**gamma`` for s in [0, t].

    Arguments broadcast. In powers of the ratio of times alone, as times to the power of gamma would overflow.
    """
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    power = np.where(np.asarray(t_a) < t_b, gamma_b, gamma_a)  # the longer profile's, over the shorter one's time
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _nearest(gram: Any, target: Any) -> Any:
    """Minimise ``x @ gram @ x - 2 * target @ x`` with ``sum(x) == 1``.

    Profiles of neighbouring snapshots are nearly alike, so that the matrix is nearly singular: variables are scaled to
    profiles of length 1, and directions that only rounding could tell apart get no weight.
    """
    scale = 1 / np.sqrt(np.diag(gram))
    n = len(scale)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram * scale[:, None] * scale[None, :]
    ones = scale / np.linalg.norm(scale)
    system[:n, n] = system[n, :n] = ones
    right = np.append(target * scale, 1 / np.linalg.norm(scale))
    solution = np.linalg.lstsq(system, right, rcond=1e-13)[0][:n] * scale
    return solution / solution.sum()


def synthesise(
    root: str | os.PathLike[str], sigma_rel: float, *, step: int | None = None, name: str = "ema"
) -> tuple[dict[str, torch.Tensor], Synthesis]:
    """Return the averaged model's state dict for a width chosen now (float32, tied weights shared), and how it was made.

    Raises as ``snapshots`` and ``solve_weights``, ``IncompatibleState`` where the snapshots hold different models, and
    ``ShardError`` for damage.
    """
    how = solve_weights(snapshots(root, name=name), sigma_rel, step=step)
    out: dict[str, torch.Tensor] = {}
    newest, _ = _newest(how, {})
    prefix = how.snapshots[-1].prefix
    for fqn, box, values in combined(how):
        if fqn not in out:
            out[fqn] = torch.empty(newest.manifest.tensors[prefix + fqn].shape, dtype=values.dtype)
        out[fqn][box.slices] = values
    for alias, target in newest.manifest.aliases.items():
        if alias.startswith(prefix):
            known = out.get(target.removeprefix(prefix)) if target.startswith(prefix) else None
            out[alias.removeprefix(prefix)] = newest.read(target) if known is None else known
    return out, how


def average_posthoc(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sigma_rel: float,
    *,
    at: int | None = None,
    name: str = "ema",
    options: Options | None = None,
) -> AverageReport:
    """Write the EMA of a width chosen now as a new committed checkpoint under the root ``out``: its tensors are the model's.

    ``at``: step of the checkpoint at which it ends (default: the newest). ``options``: as of ``combine_checkpoints``; shared
    over the ranks of a process group, streamed, with the same bits on any number of them. What averages only follow
    (frozen parameters, buffers) is the newest snapshot's; BatchNorm statistics are refused unless the options say what to do.

    The report's ``fit`` has ``sigma_rel``, the ``count`` of steps in it, ``fit_error``, and ``left_out`` if there is any,
    see ``Synthesis``. Raises as ``synthesise`` and ``combine_checkpoints``, on all ranks.
    """
    options = options or Options()

    def decide(_: list[bytes]) -> bytes:
        how = solve_weights(snapshots(root, name=name), sigma_rel, step=at)
        followed = _followed(*_newest(how, {}))
        terms = [[s.path, w, s.prefix] for s, w in zip(how.snapshots, how.weights, strict=True)]
        fit: dict[str, Any] = {"sigma_rel": how.sigma_rel, "count": how.count, "fit_error": how.fit_error}
        fit |= {"left_out": how.left_out} if how.left_out else {}
        return msgspec.json.encode([terms, followed, fit])

    with joined(options.agreement, options.timeout_s) as group:
        answer = together(group, options.timeout_s, "posthoc", lambda: b"", decide)
        found, followed, fit = msgspec.json.decode(answer)
        terms = [Term(*term) for term in found]
        options = replace(options, agreement=group, rules=replace(options.rules, followed=frozenset(followed)))
        return combine_checkpoints(terms, out, method="posthoc", options=options, fit=fit)


def _followed(newest: Checkpoint, last: Snapshot) -> list[str]:
    """Return what the average only follows, as the result calls it: names that stand for tensors outside of the average.

    Integers are left to ``Rules.integers``, and BatchNorm statistics to ``Rules.batchnorm``.
    """
    tensors = newest.manifest.tensors
    outside = {
        alias.removeprefix(last.prefix): tensors[target].dtype
        for alias, target in newest.manifest.aliases.items()
        if alias.startswith(last.prefix) and not target.startswith(last.prefix)
    }
    left = set(statistics(list(outside)))
    return [MODEL + fqn for fqn, dtype in outside.items() if dtype in AVERAGEABLE and fqn not in left]


def combined(how: Synthesis, *, block: int = BLOCK) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """Yield (FQN, box, values) of the averaged tensors, block by block: float64 sums, rounded once to what is stored.

    Memory: about 16 bytes for each of ``block`` elements, whatever the model's size. Tied weights come once, under their
    first name; what the average only followed (frozen parameters, buffers) is not among them.
    """
    opened: dict[str, Checkpoint] = {}
    newest, last = _newest(how, opened)
    entries = {n: e for n, e in newest.manifest.tensors.items() if n.startswith(last.prefix)}
    for name, entry in entries.items():
        fqn, shape = name.removeprefix(last.prefix), tuple(entry.shape)
        numel = Box.whole(shape).numel
        for start in range(0, max(numel, 1), block):
            for box in flat_range_to_boxes(shape, start, min(start + block, numel)) or [Box.whole(shape)]:
                total = torch.zeros(box.sizes, dtype=torch.float64)
                for snapshot, weight in zip(how.snapshots, how.weights, strict=True):
                    total.add_(_piece(_opened(snapshot, opened), snapshot, fqn, shape, box), alpha=weight)
                yield fqn, box, total.to(getattr(torch, entry.dtype))


def _piece(source: Checkpoint, snapshot: Snapshot, fqn: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    entry = source.manifest.tensors.get(snapshot.prefix + fqn)
    if entry is None or tuple(entry.shape) != shape:
        found = "no such tensor" if entry is None else f"shape {list(entry.shape)}"
        raise IncompatibleState(
            f"{snapshot.path}: {snapshot.prefix}{fqn} has {found}, the newest snapshot has shape {list(shape)}; choose "
            "snapshots of one model"
        )
    return source.read_box(snapshot.prefix + fqn, box)


def _newest(how: Synthesis, opened: dict[str, Checkpoint]) -> tuple[Checkpoint, Snapshot]:
    return _opened(how.snapshots[-1], opened), how.snapshots[-1]


def _opened(snapshot: Snapshot, opened: dict[str, Checkpoint]) -> Checkpoint:
    if snapshot.path not in opened:
        opened[snapshot.path] = open_checkpoint(snapshot.path)
    return opened[snapshot.path]
