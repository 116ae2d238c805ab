"""Train the GPT of train_lm.py with DeepSpeed ZeRO, on any number of processes; stages and engines may change on the way.

    deepspeed --num_gpus 2 launch/train_zero.py --zero launch/zero3.json                ZeRO-3 on two processes
    deepspeed --num_gpus 3 launch/train_zero.py --zero launch/zero2.json                goes on as ZeRO-2 on three
    torchrun --standalone --nproc-per-node 2 launch/train_lm.py --dir runs/zero         goes on as FSDP2 on two

Every step sees the same windows wherever it runs. Lines marked #! are what distckpt adds.
"""

import argparse
import json
import logging
import os

import torch
import torch.distributed as dist
from train_lm import GPT, global_mean, stdlib_windows, validate

from distckpt import CheckpointConfig, CheckpointManager, ResumableSampler  #!

CUDA = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
if not CUDA:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
import deepspeed  # noqa: E402

if not CUDA:
    # On a CPU DeepSpeed would compile a collective when it starts: minutes, and a compile that is killed leaves a lock
    # on which every later start waits for ever. It does not where the op counts as incompatible; gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--zero", required=True, metavar="FILE", help="DeepSpeed's configuration, e.g. launch/zero3.json"
    )
    parser.add_argument("--dir", default="runs/zero", help="folder of the checkpoints, which all processes see")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--losses", help="file to which rank 0 adds a line of JSON per step")
    parser.add_argument("--local_rank", help="the deepspeed launcher gives it; LOCAL_RANK says the same")
    args = parser.parse_args()
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with open(args.zero) as file:
        batch = json.load(file)["train_batch_size"]  # windows per step, over all processes together
    if batch % world:
        parser.error(f"train_batch_size {batch} cannot be split evenly over {world} processes")

    torch.manual_seed(args.seed)  # the same initial weights on every rank ...
    shape = {"dim": args.dim, "layers": args.layers}
    model = GPT(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps, eta_min=5e-5)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=args.zero, dist_init_required=False
    )
    torch.manual_seed(args.seed + 1 + rank)  # ... but each its own dropout
    windows, held_out = stdlib_windows().to(engine.device).tensor_split([-2 * batch])
    sampler = ResumableSampler(windows, seed=args.seed, uneven="drop")  #!
    loader = torch.utils.data.DataLoader(windows, batch_size=batch // world, sampler=sampler, drop_last=True)

    def log(step: int, **values: float) -> None:
        if rank == 0:
            print(f"step {step}/{args.steps}", *(f" {k} {v:.4f}" for k, v in values.items()), flush=True)
        if rank == 0 and args.losses:
            with open(args.losses, "a") as file:
                print(json.dumps({"step": step, **values}), file=file)  # floats with all their digits

    config = CheckpointConfig(args.dir, save_every_steps=args.save_every, async_save=True, metric_name="val_loss")  #!
    with CheckpointManager(config, engine=engine, stateful={"sampler": sampler}) as manager:  #!
        report = manager.resume(prove=True)  #! prove: compare what was loaded with the checkpoint, bit for bit
        step = report.step if report else 0  #!
        if report:
            log(step, val_loss_after_load=validate(engine, held_out), proved_tensors=report.proved)
        while step < args.steps:
            for window in sampler.track(loader):  #!
                loss = engine(window)
                engine.backward(loss)
                engine.step()  # the scheduler's step too
                step += 1
                metrics = {"loss": global_mean(loss)}
                if step % args.save_every == 0:
                    metrics["val_loss"] = validate(engine, held_out)  # draws no random numbers
                log(step, **metrics)
                state = {"step": step, "epoch": sampler.epoch, "metrics": metrics, "model_config": shape}
                if step == args.steps:
                    manager.save(**state)  #!
                    break
                manager.step(**state)  #!
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
