"""Print the loss curve of a training that went through several engines, and check that each went on where the last was.

    python launch/demo_curve.py ROOT "ZeRO-3 on 2=FIRST.jsonl" "FSDP2 on 2=SECOND.jsonl" ...

ROOT: the checkpoints. The files: what the jobs wrote, in order. For each hand-over this process reads the checkpoint's
fp32 masters on its own and computes the held-out loss from them in float32; exit 1 if a claim does not hold.
"""

import argparse

import torch
from demo_compare import DROPOUT, ROUNDING, need, rows
from train_lm import GPT, stdlib_windows

from distckpt import CheckpointConfig, CheckpointManager, list_checkpoints, open_checkpoint

# Held-out loss of the same weights, computed with weights and activations in bfloat16 (8 significant bits).
BF16 = 2e-3
Run = dict[int, dict[str, float]]


def held_out_loss(root: str, step: int, batch: int) -> tuple[float, int]:
    """Load a checkpoint into a plain model; return its held-out loss, and how many bytes of weights were compared."""
    where = f"{root}/step-{step:010}"
    saved = open_checkpoint(where)
    model = GPT(**saved.config)
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False)
    with CheckpointManager(config, model=model) as manager:
        manager.load(where, load_optimizer=False, load_rng_state=False, exclude=("sampler", "scheduler"))
    nbytes = 0
    for name, weight in model.state_dict().items():
        master = saved.read(f"model.{name}")
        same = master.dtype == weight.dtype == torch.float32 and torch.equal(
            master.view(torch.int32), weight.view(torch.int32)
        )
        need(same, f"{name} is an fp32 master, and loaded as it is")
        nbytes += weight.nbytes
    model.eval()
    with torch.no_grad():
        return float(model(stdlib_windows()[-2 * batch :]).double()), nbytes


def table(names: list[str], runs: list[Run], starts: list[int]) -> None:
    """Print every step that was trained, in the order in which that happened."""
    print(f"   {'step':>4}  {'leg':<14}{'loss':>9}{'held-out':>11}")
    for name, run, start, after in zip(names, runs, starts, [*starts[1:], None], strict=True):
        if start:
            print(f"   {start:>4}  {name:<14}{'loaded':>9}{run[start]['val_loss_after_load']:>11.4f}")
        for step in sorted(step for step in run if "loss" in run[step]):
            held = f"{run[step]['val_loss']:>11.4f}" if "val_loss" in run[step] else " " * 11
            lost = "   lost with the kill, done again below" if after is not None and step > after else ""
            print(f"   {step:>4}  {name:<14}{run[step]['loss']:>9.4f}{held}{lost}")


def hand_over(root: str, step: int, names: tuple[str, str], before: Run, after: Run, batch: int) -> float:
    """Check one hand-over and print what was found; return the held-out loss of the masters."""
    saved, loaded = before[step]["val_loss"], after[step]["val_loss_after_load"]
    masters, nbytes = held_out_loss(root, step, batch)
    print(f"   step {step}, {names[0]} -> {names[1]}: held-out loss of these weights")
    for who, loss in (("before the save", saved), ("after the load", loaded)):
        name = names[who == "after the load"]
        bound = BF16 if name.startswith("ZeRO") else ROUNDING
        how = "bf16" if bound == BF16 else "fp32"
        print(f"     {loss:.6f} {who}, by {name} in {how}: {abs(loss - masters):.1e} from the next line (<= {bound:g})")
        need(abs(loss - masters) <= bound, f"held-out loss {loss} {who}, {masters} from the masters")
    proved = after[step].get("proved_tensors")
    told = f"; {names[1]} compared {proved} tensors of weights and optimizer bit for bit" if proved else ""
    print(
        f"     {masters:.6f} from the checkpoint's fp32 masters ({nbytes:,} bytes), by this process{told}", flush=True
    )
    again = [step for step in before if "loss" in before[step] and "loss" in after.get(step, {})]
    if again:
        apart = max(abs(before[s]["loss"] - after[s]["loss"]) for s in again)
        need(apart <= DROPOUT, f"the losses of the steps that were done again differ by {apart}")
        print(
            f"     {len(again)} steps lost and done again: losses at most {apart:.1e} apart (other ranks, other dropout)"
        )
    return masters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("legs", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--batch", type=int, default=12)
    args = parser.parse_args()
    names, files = zip(*(leg.split("=", 1) for leg in args.legs), strict=True)
    runs = [rows(file) for file in files]
    starts = [min((step for step in run if "val_loss_after_load" in run[step]), default=0) for run in runs]
    table(list(names), runs, starts)
    print()
    last, held_out = 0, []
    for number, (run, start) in enumerate(zip(runs, starts, strict=True)):
        steps = sorted(step for step in run if "loss" in run[step])
        need(steps == list(range(start + 1, steps[-1] + 1)), f"{names[number]} trained from step {start} without a gap")
        need(start <= last, f"{names[number]} began at step {start}, not after {last}, where the run before it was")
        if number:
            need(start > 0, f"{names[number]} loaded a checkpoint")
            pair = (names[number - 1], names[number])
            held_out.append(hand_over(args.root, start, pair, runs[number - 1], run, args.batch))
        last = steps[-1]
    need(last in [entry.step for entry in list_checkpoints(args.root)], f"step {last} has a checkpoint")
    held_out.append(held_out_loss(args.root, last, args.batch)[0])
    need(held_out == sorted(held_out, reverse=True), f"the held-out loss falls from piece to piece: {held_out}")
    falls = ", ".join(f"{loss:.4f}" for loss in held_out)
    print(f"   {last} steps without a gap; held-out loss of the masters after each piece: {falls}", flush=True)


if __name__ == "__main__":
    main()
