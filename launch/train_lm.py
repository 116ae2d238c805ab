"""Train a small byte-level GPT on the Python standard library's own source text, on any number of processes.

    python launch/train_lm.py                                               one process
    torchrun --standalone --nproc-per-node 2 launch/train_lm.py             two processes, FSDP2
    torchrun --standalone --nproc-per-node 3 launch/train_lm.py             goes on where those two stopped

Kill it whenever you like and start it again: on as many processes as before, every loss is the same bit for bit; on
another number, every step sees the same windows, with other dropout. Lines marked #! are what distckpt adds.
"""

import argparse
import json
import logging
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import CheckpointConfig, CheckpointManager, ResumableSampler  #!

WINDOW = 128  # bytes that the model sees at once


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and with dropout on its way back."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Bytes in, the mean loss of predicting each next byte out."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, dim), nn.Embedding(WINDOW, dim)
        self.blocks = nn.ModuleList(Block(dim, heads=dim // 32) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        x = self.byte(window[:, :-1]) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), window[:, 1:].flatten())


def stdlib_windows() -> torch.Tensor:
    """Return the standard library's source as int64 [windows, WINDOW + 1]; the last byte of one begins the next."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return text.unfold(0, WINDOW + 1, WINDOW).long()


def global_mean(value: torch.Tensor) -> float:
    """Return the mean over ranks, added up in the order of ranks, so that it is the same each time."""
    values = [torch.empty_like(value, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.detach().double())
    return sum(v.item() for v in values) / len(values)


@torch.no_grad()
def validate(model: nn.Module, windows: torch.Tensor) -> float:
    """Return the mean loss without dropout; each rank takes its share of the windows."""
    model.eval()
    loss = global_mean(model(windows[dist.get_rank() :: dist.get_world_size()]))
    model.train()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/lm", help="folder of the checkpoints, which all processes see")
    parser.add_argument("--load", type=int, metavar="STEP", help="go on from this step, not from the newest")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=12, help="windows per step, over all processes together")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--losses", help="file to which rank 0 adds a line of JSON per step")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # plain python
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the next but one line asks for
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True)
    if args.batch % world:
        parser.error(f"--batch {args.batch} cannot be split evenly over {world} processes")

    torch.manual_seed(args.seed)  # the same initial weights on every rank ...
    shape = {"dim": args.dim, "layers": args.layers}
    model = GPT(**shape).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    torch.manual_seed(args.seed + 1 + rank)  # ... but each its own dropout

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps, eta_min=5e-5)
    windows, held_out = stdlib_windows().to(device).tensor_split([-2 * args.batch])
    sampler = ResumableSampler(windows, seed=args.seed, uneven="drop")  #!
    loader = torch.utils.data.DataLoader(windows, batch_size=args.batch // world, sampler=sampler, drop_last=True)

    def log(step: int, **values: float) -> None:
        if rank == 0:
            print(f"step {step}/{args.steps}", *(f" {k} {v:.4f}" for k, v in values.items()), flush=True)
        if rank == 0 and args.losses:
            with open(args.losses, "a") as file:
                print(json.dumps({"step": step, **values}), file=file)  # floats with all their digits

    config = CheckpointConfig(args.dir, save_every_steps=args.save_every, async_save=True, metric_name="val_loss")  #!
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "stateful": {"sampler": sampler}}  #!
    with CheckpointManager(config, **parts) as manager:  #!
        report = manager.resume() if args.load is None else manager.load(args.load)  #!
        step = report.step if report else 0  #!
        if report:
            log(step, val_loss_after_load=validate(model, held_out))
        while step < args.steps:
            for batch in sampler.track(loader):  #!
                optimizer.zero_grad()
                loss = model(batch)
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                metrics = {"loss": global_mean(loss)}
                if step % args.save_every == 0:
                    metrics["val_loss"] = validate(model, held_out)  # draws no random numbers
                log(step, **metrics)
                state = {"step": step, "epoch": sampler.epoch, "metrics": metrics, "model_config": shape}
                if step == args.steps:
                    manager.save(**state)  #!
                    break
                manager.step(**state)  #!
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
