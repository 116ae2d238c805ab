"""Compare what runs of the demo left behind; exit 1 if a claim does not hold.

python launch/demo_compare.py equal REFERENCE.jsonl OTHER.jsonl --until STEP     losses, bit for bit
python launch/demo_compare.py close REFERENCE.jsonl OTHER.jsonl --until STEP     losses on other numbers of ranks
python launch/demo_compare.py state REFERENCE_ROOT OTHER_ROOT --until STEP       all tensors of that checkpoint
"""

import argparse
import json
import sys
from pathlib import Path

# Held-out loss right after a load: the same weights and windows, float32 sums in another order.
ROUNDING = 1e-5
# Training losses further on: other dropout on top of that (each rank has its own stream).
DROPOUT = 0.1


def rows(path: str) -> dict[int, dict[str, float]]:
    """Return a run's values by step; ``float`` reads back exactly what ``json`` wrote."""
    found: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row.pop("step"), {}).update(row)
    return found


def need(true: bool, claim: str) -> None:
    if not true:
        print(f"   FAILED: {claim}")
        sys.exit(1)


def trained(run: dict[int, dict[str, float]], until: int) -> list[int]:
    """Return the steps that a run trained, which must be without a gap and, if it ended well, reach ``until``."""
    steps = sorted(step for step in run if "loss" in run[step])
    need(bool(steps) and steps == list(range(steps[0], steps[-1] + 1)), f"steps {steps} have no gap")
    need(until in (0, steps[-1]), f"the run reached step {until}, its last is {steps[-1]}")
    return steps


def equal(reference: str, other: str, until: int) -> str:
    first, second = rows(reference), rows(other)
    steps = trained(second, until)
    for step in steps:
        a, b = first.get(step), {k: v for k, v in second[step].items() if k != "val_loss_after_load"}
        need(a == b, f"step {step}: reference {a}, this run {b}")
    return f"losses of steps {steps[0]} to {steps[-1]} ({len(steps)}): equal bit for bit"


def close(reference: str, other: str, until: int) -> str:
    first, second = rows(reference), rows(other)
    steps = trained(second, until)
    loaded = steps[0] - 1
    before, after = first[loaded]["val_loss"], second[loaded]["val_loss_after_load"]
    need(abs(before - after) <= ROUNDING, f"held-out loss at step {loaded}: saved {before}, loaded {after}")
    apart = max(abs(first[step]["loss"] - second[step]["loss"]) for step in steps)
    need(apart <= DROPOUT, f"training losses of steps {steps[0]} to {steps[-1]} differ by {apart}")
    return (
        f"held-out loss at step {loaded}: saved as {before!r}, loaded as {after!r}:\n"
        f"   {abs(before - after):.1e} apart; same weights and no dropout, so only the order of summation can differ\n"
        f"   losses of steps {steps[0]} to {steps[-1]}: at most {apart:.1e} apart; other ranks draw other dropout"
    )


def state(reference: str, other: str, until: int) -> str:
    import torch

    from distckpt import list_checkpoints, open_checkpoint

    need(until in [entry.step for entry in list_checkpoints(other)], f"{other} has a checkpoint of step {until}")
    first, second = open_checkpoint(f"{reference}/step-{until:010}"), open_checkpoint(f"{other}/step-{until:010}")
    need(set(first.tensors) == set(second.tensors), "both have the same tensors")
    nbytes = 0
    for name in first.tensors:
        if name.startswith("rng"):
            continue  # stored per rank; the losses above depend on them
        a, b = first.read(name), second.read(name)
        same = a.dtype == b.dtype and a.shape == b.shape
        need(
            same and bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))),
            f"{name} is equal",
        )
        nbytes += a.nbytes
    return f"weights and optimizer at step {until}: {len(first.tensors)} tensors, {nbytes:,} bytes: equal bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "close", "state"])
    parser.add_argument("reference")
    parser.add_argument("other")
    parser.add_argument("--until", type=int, default=0, help="the step that the run must have reached")
    args = parser.parse_args()
    compare = {"equal": equal, "close": close, "state": state}[args.what]
    print("   " + compare(args.reference, args.other, args.until), flush=True)


if __name__ == "__main__":
    main()
