"""One awkward model under every ZeRO stage and under torch's own layouts, with one view of each for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed_support
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.tensor_fragment import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from layout_models import reference, same_bits, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt import CheckpointConfig, CheckpointManager
from distckpt.engines.base import clean_fqn

BATCH = 12
"""Global batch: every world size from 1 to 4 divides it."""
WIDTH = 6


class Net(nn.Module):
    """Tied and frozen weights, odd sizes, a parameter smaller than the world, buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, width)
        nn.init.normal_(self.emb.weight, std=0.3)
        self.up = nn.Linear(width, 9)
        self.norm = nn.LayerNorm(9)
        self.one = nn.Parameter(torch.ones(1))
        self.odd = nn.Parameter(torch.randn(5, 9) * 0.2)
        self.frozen = nn.Linear(9, width)
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("wave", torch.linspace(-1, 1, width))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.up(self.emb(tokens)))) * self.one
        hidden = hidden + (hidden @ self.odd.t()) @ self.odd
        return self.head(self.frozen(hidden) + self.wave.to(hidden.dtype))


def build_net(seed: int = 3, width: int = WIDTH) -> Net:
    """Return the model with the same values on every rank."""
    torch.manual_seed(seed)
    return Net(width)


def groups_of(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Return one or two param groups without the frozen weights; with ``count=0`` one of everything."""
    if count == 0:
        return [{"params": list(model.parameters())}]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if count == 1:
        return [{"params": [p for _, p in named]}]
    matrices = ("emb.weight", "up.weight", "odd")
    return [
        {"params": [p for n, p in named if clean_fqn(n) in matrices], "weight_decay": 0.1},
        {"params": [p for n, p in named if clean_fqn(n) not in matrices], "weight_decay": 0.0, "lr": 0.02},
    ]


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-4),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.02),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}


class Job:
    """One training job on this rank, of any kind: ``one``, ``ddp``, ``fsdp2``, or ``z0`` to ``z3``."""

    def __init__(
        self, kind: str, *, optimizer: str = "adamw", groups: int = 2, scheduled: bool = True, seed: int = 3,
        width: int = WIDTH, fused: bool = False, zero: dict[str, Any] | None = None, **config: Any,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.accumulate = config.get("gradient_accumulation_steps", 1)
        self.net = build_net(seed, width)
        self.model: nn.Module = self.net
        if kind == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif kind == "fsdp2":
            fully_shard(self.net.up, mesh=init_device_mesh("cpu", (self.world,)))
            fully_shard(self.net, mesh=init_device_mesh("cpu", (self.world,)))
        self.optimizer = OPTIMIZERS[optimizer](groups_of(self.model, groups))
        self.scheduler = (
            torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (1 + 0.1 * s)) if scheduled else None
        )
        self.engine: Any = None
        if kind.startswith("z"):
            if fused:  # the wrapper for DeepSpeed's FusedAdam, which needs a GPU, around torch's AdamW
                deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
            self.engine = deepspeed_support.initialize(
                self.net, self.optimizer, {"stage": int(kind[1]), **(zero or {})}, lr_scheduler=self.scheduler,
                micro_batch=BATCH // self.world // self.accumulate, **config,
            )  # fmt: skip

    def manager(self, root: Path, **options: Any) -> CheckpointManager:
        config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, threads=2,
                                  max_consecutive_failures=0, **options)  # fmt: skip
        if self.engine is not None:
            return CheckpointManager(config, engine=self.engine)
        return CheckpointManager(config, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)

    def step(self, number: int) -> float:
        """Train on global batch ``number``; returns the global mean loss as float32."""
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 13, (BATCH, 2), generator=generator)
        mine = tokens[self.rank * BATCH // self.world : (self.rank + 1) * BATCH // self.world]
        losses = []
        for part in mine.chunk(self.accumulate):
            logits = (self.engine if self.engine is not None else self.model)(part[:, 0])
            loss = nn.functional.cross_entropy(logits.float(), part[:, 1])
            losses.append(loss.detach())
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                (loss / self.accumulate).backward()
        if self.engine is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
        mean = torch.stack(losses).mean()
        if dist.is_initialized():
            dist.all_reduce(mean)
        return float(mean / self.world)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield clean_fqn(name), parameter

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Return masters and optimizer state, whole and in float32, as DeepSpeed or torch itself puts them together."""
        out: dict[str, torch.Tensor] = {}
        for fqn, parameter in self.named():
            out[f"model.{fqn}"] = self._whole_parameter(parameter).float().clone()
            if parameter.requires_grad:
                for key in self.state_keys():
                    out[f"optim.state.{fqn}.{key}"] = self._whole_state(parameter, key).float().clone()
        return out

    def link_all_groups(self) -> None:
        """Finish what DeepSpeed 0.19.8 leaves undone: its first step links only the first group's optimizer state."""
        wrapper = self.engine.optimizer if self.engine is not None else None
        if hasattr(wrapper, "_hp_optimizer_states_linked"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def state_keys(self) -> list[str]:
        """Return the names of the optimizer's per-element states."""
        for state in self.basic.state.values():
            return sorted(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim())
        return []

    @property
    def basic(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic."""
        wrapper = self.engine.optimizer if self.engine is not None else self.optimizer
        return getattr(wrapper, "optimizer", wrapper)

    def steps(self) -> set[float]:
        return {float(state["step"]) for state in self.basic.state.values() if "step" in state}

    def _whole_parameter(self, parameter: Any) -> torch.Tensor:
        if self.engine is None:
            return whole(parameter.detach())
        if parameter.requires_grad:
            found = safe_get_full_fp32_param(parameter)
            return self._unpartitioned(parameter) if found is None else found
        if hasattr(parameter, "ds_tensor"):
            with deepspeed_support.gathered(parameter):
                return parameter.detach().clone()
        return parameter.detach()

    def _whole_state(self, parameter: Any, key: str) -> torch.Tensor:
        if self.engine is None:
            return whole(self.optimizer.state[parameter][key])
        found = safe_get_full_optimizer_state(parameter, key)
        return self._unpartitioned(parameter, key) if found is None else found

    def _unpartitioned(self, parameter: Any, key: str | None = None) -> torch.Tensor:
        """Return the master of a parameter at stage 0, or one of its states."""
        wrapper = self.engine.optimizer
        for params, flat in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups_flat", ()), strict=False):
            shapes = [p.shape for p in params]
            whole_flat = flat if key is None else self.basic.state[flat][key]
            for param, piece in zip(params, whole_flat.split([s.numel() for s in shapes]), strict=True):
                if param is parameter:
                    return piece.view(param.shape)
        master = self._unfused(parameter)
        return master if key is None else self.basic.state[master][key]

    def _unfused(self, parameter: Any) -> torch.Tensor:
        wrapper = self.engine.optimizer
        if not hasattr(wrapper, "fp32_groups"):
            return parameter
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return next(m for lps, hps in pairs for p, m in zip(lps, hps, strict=True) if p is parameter)

    @torch.no_grad()
    def fill(self, salt: int) -> None:
        """Put ``salted`` values in place, by DeepSpeed's or torch's own means; needs one step before."""
        self.link_all_groups()
        keys = self.state_keys()
        for fqn, parameter in self.named():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            ref = salted(salt, f"model.{fqn}", shape)
            if not parameter.requires_grad:
                self._set_frozen(parameter, ref)
                continue
            self._set(parameter, None, ref)
            for key in keys:
                self._set(parameter, key, salted(salt, f"optim.state.{fqn}.{key}", shape))
        self.net.wave.copy_(salted(salt, "model.wave", (WIDTH,)))
        for state in self.basic.state.values():
            state["step"].fill_(float(salt))
        for number, group in enumerate(self.basic.param_groups):
            group["lr"] = salt + number / 8

    def differences(self, salt: int, *, rounded: bool) -> list[str]:
        """Return the names of what is not as ``fill(salt)`` left it; ``rounded``: frozen weights went through bfloat16."""
        wrong = []
        for name, value in self.whole_state().items():
            ref = salted(salt, name, tuple(value.shape))
            if rounded and ".frozen." in name:
                ref = ref.bfloat16().float()
            if not same_bits(value, ref):
                wrong.append(name)
        wrong += [] if same_bits(self.net.wave, salted(salt, "model.wave", (WIDTH,))) else ["model.wave"]
        wrong += [f"low-precision {name}" for name in self.stale_weights()]
        wrong += [] if self.steps() == {float(salt)} else [f"steps {self.steps()}"]
        lrs = [group["lr"] for group in self.basic.param_groups]
        wrong += [] if lrs == [salt + number / 8 for number in range(len(lrs))] else [f"learning rates {lrs}"]
        return wrong

    def stale_weights(self) -> list[str]:
        """Return the names of weights that are not their masters, rounded."""
        wrong = []
        for fqn, parameter in self.named():
            if parameter.requires_grad and self.engine is not None:
                master = self._whole_parameter(parameter)
                with deepspeed_support.gathered(parameter):
                    if not same_bits(parameter.detach(), master.to(parameter.dtype).view(parameter.shape)):
                        wrong.append(fqn)
        return wrong

    def _set_frozen(self, parameter: Any, ref: torch.Tensor) -> None:
        if hasattr(parameter, "ds_tensor"):
            with deepspeed_support.gathered(parameter, modifier_rank=0):
                parameter.copy_(ref)
            return
        _copy(parameter, ref)

    def _set(self, parameter: Any, key: str | None, ref: torch.Tensor) -> None:
        if hasattr(parameter, "ds_tensor"):
            # safe_set_full_fp32_param of DeepSpeed 0.19.8 fails where the last partition has padding: set it by hand.
            size = parameter.ds_tensor.ds_numel
            mine = nn.functional.pad(ref.flatten(), (0, size * self.world - ref.numel())).split(size)[self.rank]
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
            return
        if self.engine is not None and hasattr(parameter, "_hp_mapping"):
            if key is None:
                safe_set_full_fp32_param(parameter, ref)
            else:
                safe_set_full_optimizer_state(parameter, ref, key)
            return
        if self.engine is not None:
            _copy(self._unpartitioned(parameter, key), ref)
        else:
            _copy(parameter if key is None else self.basic.state[parameter][key], ref)


def salted(salt: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 values that depend on salt and name alone; alike for the two names of the tied weight."""
    return reference(f"{salt}/{name}", shape, torch.float32)


def _copy(target: torch.Tensor, ref: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        from torch.distributed.tensor import distribute_tensor

        target.copy_(distribute_tensor(ref, target.device_mesh, target.placements))
    else:
        target.copy_(ref)
