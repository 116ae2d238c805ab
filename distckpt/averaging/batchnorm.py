"""BatchNorm after averaging: the statistics of averaged weights, counted over data, not averaged.

As ``torch.optim.swa_utils.update_bn`` (train mode, no gradients, every sample weighs the same), with two differences: the
model that is given is never touched, and counts, means and squared deviations are pooled over batches and ranks (Chan,
Golub, LeVeque 1983), so that the result is the variance of all data and not the mean of batches' variances.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from distckpt.averaging.structure import statistics
from distckpt.averaging.write import together
from distckpt.dcp.agreement import Agreement
from distckpt.engines.base import MODEL, clean_fqn
from distckpt.engines.deepspeed_guard import is_deepspeed
from distckpt.engines.rng import capture_rng, restore_rng
from distckpt.errors import ConfigError

if TYPE_CHECKING:
    from distckpt.averaging.blend import Blend


@dataclass(frozen=True, eq=False)
class RecomputeBatchNorm:
    """Data to recompute running statistics on: on each rank its own share, as in training.

    ``model``: of the averaged kind, not sharded; a copy of it is used, on ``device`` if one is named. ``batches`` are fed
    as ``forward(model, batch)``: by default the batch, or its first item where it is a list or tuple.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Callable[[nn.Module, Any], Any] | None = None
    device: str | torch.device | None = None

    @property
    def name(self) -> str:
        """What names of results call it: the same in every run. Which data the batches hold, it cannot say."""
        try:
            count = f"{len(self.batches)} batches"  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # a generator, or a loader that does not know its length
            count = "batches"
        forward = self.forward
        by = "" if forward is None else f" by {getattr(forward, '__qualname__', type(forward).__qualname__)}"
        return f"recompute on {count}{by}"


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, fp64, of everything seen."""

    count: int
    mean: torch.Tensor
    squares: torch.Tensor
    batches: int = 0

    def merge(self, other: Moments) -> None:
        """Take in the moments of other data."""
        total = self.count + other.count
        if not total:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.squares = self.squares + other.squares + delta.square() * (self.count * other.count / total)
        self.count = total
        self.batches += other.batches


class _LocalBatchNorm(_BatchNorm):
    """A SyncBatchNorm's stand-in: no collective in the middle of a pass over data of another length on every rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def refresh(data: RecomputeBatchNorm, blend: Blend, *, agreement: Agreement, timeout_s: float) -> None:
    """Give a blend the statistics of its own weights, on all ranks; ``ConfigError`` if a layer's cannot be counted."""
    values = recompute_batchnorm(data, blend, agreement=agreement, timeout_s=timeout_s)
    left = [name for name in statistics(list(blend.tensors)) if name.removeprefix(MODEL) not in values]
    if left:
        raise ConfigError(
            f"the model has no BatchNorm for {', '.join(left[:5])}, whose statistics would stay the newest's"
        )
    blend.replace(values)
    blend.notes = [note for note in blend.notes if not note.startswith("BatchNorm")]


def recompute_batchnorm(
    data: RecomputeBatchNorm, blend: Blend | None = None, *, agreement: Agreement, timeout_s: float
) -> dict[str, torch.Tensor]:
    """Return FQN to value of every BatchNorm buffer, for a copy of the model that holds the blend's weights.

    All ranks call it together and get the same values. Without ``blend`` the copy keeps the model's own weights. RNG
    states are as before. Raises ``ConfigError`` on all ranks where nothing was counted.
    """
    answer = together(agreement, timeout_s, "batchnorm", lambda: _encode(_counted(data, blend)), _merged)
    return {f"{name}.{part}" if name else part: value for name, moments in _decode(answer).items()
            for part, value in _buffers(moments).items()}  # fmt: skip


def _counted(data: RecomputeBatchNorm, blend: Blend | None) -> dict[str, Moments]:
    """Feed this rank's batches through a copy and return each layer's moments."""
    model = copy.deepcopy(_unwrapped(data.model))
    if data.device is not None:
        model.to(data.device)
    if blend is not None:
        blend.load_into(model)
    layers = {
        clean_fqn(name): module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not layers:
        raise ConfigError("the model has no BatchNorm with running statistics; is it the model that was averaged?")
    moments: dict[str, Moments] = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = _LocalBatchNorm  # type: ignore[assignment]
        width = layer.num_features
        moments[name] = Moments(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        layer.register_forward_pre_hook(_counter(moments[name]))
    model.train()
    forward = data.forward or _first_item
    with _same_rng(), torch.no_grad():
        for batch in data.batches:
            forward(model, _moved(batch, data.device))
    return moments


def _unwrapped(model: Any) -> Any:
    """Take off what only wraps a model. Told by its type: a model's own child may be called ``module`` too."""
    if "_orig_mod" in model._modules:  # torch.compile's
        return _unwrapped(model._orig_mod)
    if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)) or is_deepspeed(model):
        return _unwrapped(model.module)
    return model


@contextmanager
def _same_rng() -> Iterator[None]:
    """Leave every generator of this process as it was: dropout, shuffles and augmentations draw from any of them."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)


def _counter(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach().double()
        others = [dim for dim in range(values.dim()) if dim != 1]
        here = values.numel() // values.shape[1]
        mean = values.mean(others)
        shape = [1, -1] + [1] * (values.dim() - 2)
        squares = (values - mean.reshape(shape)).square().sum(others)
        moments.merge(Moments(here, mean.cpu(), squares.cpu(), 1))

    return count


def _first_item(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _moved(batch: Any, device: str | torch.device | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(item, device) for item in batch) if isinstance(batch, (list, tuple)) else batch


def _encode(found: Mapping[str, Moments]) -> bytes:
    rows = {name: [m.count, m.mean.tolist(), m.squares.tolist(), m.batches] for name, m in found.items()}
    return msgspec.msgpack.encode(rows)


def _decode(data: bytes) -> dict[str, Moments]:
    return {
        name: Moments(
            count, torch.tensor(mean, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64), batches
        )
        for name, (count, mean, squares, batches) in msgspec.msgpack.decode(data).items()
    }


def _merged(payloads: list[bytes]) -> bytes:
    """Merge all ranks' moments in rank order (leader only)."""
    total = _decode(payloads[0])
    for rank, payload in enumerate(payloads[1:], 1):
        other = _decode(payload)
        if other.keys() != total.keys():
            raise ConfigError(
                f"rank {rank} has other BatchNorm layers than rank 0: {sorted(other.keys() ^ total.keys())[:5]}"
            )
        for name, moments in total.items():
            moments.merge(other[name])
    empty = sorted(name for name, moments in total.items() if moments.count < 2)
    if empty:
        raise ConfigError(
            f"no data reached BatchNorm {', '.join(empty[:5])}: give batches that run through the whole model"
        )
    return _encode(total)


def _buffers(moments: Moments) -> dict[str, torch.Tensor]:
    return {
        "running_mean": moments.mean,
        "running_var": moments.squares / (moments.count - 1),
        "num_batches_tracked": torch.tensor(moments.batches),
    }
