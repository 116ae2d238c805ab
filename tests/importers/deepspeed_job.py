"""A DeepSpeed training of a tiny model that saves native checkpoints: ``python deepspeed_job.py RANK WORLD FOLDER``.

Every configuration of ``CONFIGS`` is trained for two steps and saved to ``FOLDER/<name>``. Rank 0 writes what to compare
with to ``FOLDER/<name>.live.pt``: what the live engine says of itself, and what DeepSpeed's own ``zero_to_fp32`` makes of
the files. Those of ``UNIVERSAL`` are converted by DeepSpeed to ``FOLDER/<name>-universal`` too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import nn

CONFIGS: dict[str, dict[str, Any]] = {
    "z1": {"stage": 1},
    "z2": {"stage": 2, "round_robin_gradients": True},
    "z3": {"stage": 3, "stage3_param_persistence_threshold": 10, "sub_group_size": 100},
    "z1-elastic": {"stage": 1, "elastic_checkpoint": True},
}
UNIVERSAL = ("z1", "z3")
CLIENT = {"note": "hello", "epoch": 3, "pair": (1, 2.5)}


class Tiny(nn.Module):
    """Odd sizes (padding everywhere), a tied weight, a frozen parameter, a buffer, a parameter smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.layer = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(5, 3)
        self.back = nn.Linear(3, 7, bias=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("mean", torch.linspace(0, 1, 3))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(self.embed(tokens))) * self.scale
        return self.head(self.back(self.frozen(hidden)))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def train(name: str, zero: dict[str, Any], folder: Path) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(5)
    model = Tiny()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(2):
        logits = engine(torch.randint(0, 11, (2, 4), generator=generator))
        engine.backward(logits.float().square().mean())
        engine.step()
    engine.save_checkpoint(str(folder / name), client_state=dict(CLIENT))
    live: dict[str, Any] = {"weights": {}, "state": {}}
    for fqn, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            live["weights"][fqn] = safe_get_full_fp32_param(parameter).clone()
            if zero["stage"] == 3:  # stages 1 and 2 offer it only for DeepSpeed's own optimizers
                live["state"][fqn] = {
                    key: safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")
                }
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        live["fp32"] = get_fp32_state_dict_from_zero_checkpoint(str(folder / name))
        if name in UNIVERSAL:
            universal(folder / name / "global_step2", folder / f"{name}-universal" / "global_step2")
        torch.save(live, folder / f"{name}.live.pt")
    torch.distributed.barrier()


def universal(native: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as convert

    convert(
        argparse.Namespace(
            input_folder=str(native), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state="z1" in str(native),
        )
    )  # fmt: skip


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    names = sys.argv[4:] or list(CONFIGS)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from deepspeed_support import deepspeed  # nothing is compiled

    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for name in names:
        train(name, CONFIGS[name], folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
