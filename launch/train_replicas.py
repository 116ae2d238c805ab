"""Train replicas of a small GPT, each on data of its own, and average them every so many steps (local SGD, DiLoCo).

    torchrun --standalone --nproc-per-node 2 launch/train_replicas.py                    the mean every 20 steps
    torchrun --standalone --nproc-per-node 2 launch/train_replicas.py --outer diloco     an outer step with momentum
    python launch/train_replicas.py                                                      one replica, to compare with

No gradient crosses processes: what is sent in 20 steps is one copy of the weights. Each process is a replica here; with a mesh of
its own for fully_shard it could be many. Start it again and it goes on from the newest checkpoint, on any number of replicas;
the inner optimizers, which are each replica's own, begin anew then. Lines marked #! are what distckpt adds.
"""

import argparse
import logging
import os

import torch
import torch.distributed as dist
from train_lm import GPT, global_mean, stdlib_windows

from distckpt import CheckpointConfig, CheckpointManager  #!
from distckpt.averaging.outer import OuterStep  #!

OUTER = {"mean": {"lr": 1.0, "momentum": 0.0}, "diloco": {"lr": 0.7, "momentum": 0.9}}


def my_batch(windows: torch.Tensor, size: int, seed: int, step: int) -> torch.Tensor:
    """Return windows of this replica's own contiguous part of the text; the same ones whenever a step is done again."""
    own = windows.tensor_split(dist.get_world_size())[dist.get_rank()]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return own[torch.randint(len(own), (size,), generator=generator)]


@torch.no_grad()
def validate(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return this replica's own loss without dropout on windows that no replica trains on."""
    model.eval()
    loss = model(windows)
    model.train()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/replicas", help="folder of the checkpoints, which all processes see")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--every", type=int, default=20, metavar="STEPS", help="steps of a replica between two averages"
    )
    parser.add_argument("--outer", choices=sorted(OUTER), default="mean")
    parser.add_argument("--batch", type=int, default=6, help="windows per step of each replica")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # plain python
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    rank = dist.get_rank()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(args.seed)  # all replicas begin with the same weights ...
    shape = {"dim": args.dim, "layers": args.layers}
    model = GPT(**shape).to(device)
    torch.manual_seed(args.seed + 1 + rank)  # ... and have dropout and data of their own
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    windows, held_out = stdlib_windows().tensor_split([-24])
    held_out = held_out.to(device)

    outer = OuterStep(model, **OUTER[args.outer])  #!
    config = CheckpointConfig(args.dir, metric_name="val_loss")  #!
    with CheckpointManager(config, model=model, stateful={"outer": outer}) as manager:  #!
        report = manager.resume()  #!
        for step in range(report.step + 1 if report else 1, args.steps + 1):
            loss = model(my_batch(windows, args.batch, args.seed, step).to(device))
            inner.zero_grad()
            loss.backward()
            inner.step()
            if step % args.every == 0 or step == args.steps:
                alone_loss = global_mean(validate(model, held_out))  # of replicas on their own, on average
                outer.step()  #!
                metrics = {"loss": global_mean(loss), "val_loss_alone": alone_loss,
                           "val_loss": global_mean(validate(model, held_out))}  # fmt: skip
                if rank == 0:
                    print(f"step {step}/{args.steps}", *(f" {k} {v:.4f}" for k, v in metrics.items()), flush=True)
                manager.save(step=step, metrics=metrics, model_config=shape)  #! now all replicas are the same
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
