"""When do averages help? Five recipes on handwritten digits (scikit-learn's, 8 × 8), a small CNN with BatchNorm, one CPU.

    python launch/recipes.py swa          a cyclical schedule and its average, beside a constant rate and a cosine to zero
    python launch/recipes.py lawa         the mean of the last five checkpoints, at every fifth epoch of training
    python launch/recipes.py ema          decays 0.99, 0.999, 0.9999, and lengths that were chosen after training
    python launch/recipes.py top5         the best checkpoint against the mean of the best five, and a greedy soup
    python launch/recipes.py ensemble     weight averages against averaged predictions, within a run and across runs
    python launch/recipes.py all --seeds 8

600 rows train, 400 choose, 797 test. Images are shifted and noised anew in each batch, and a part of the training labels
(--noise 0.2) is wrong, so that steps stay noisy and little is learnt by heart. Every line is the mean over seeds of accuracy
and of loss on the test rows, which choose nothing, with the standard error of its difference to the first line of its
table: seeds are paired. Needs distckpt[eval].
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, EMAModel, average_checkpoints, open_checkpoint
from distckpt.averaging.average import RecomputeBatchNorm
from distckpt.averaging.posthoc import PostHocEMA, synthesise
from distckpt.averaging.schedules import CountRatio

BATCH, CLASSES = 50, 10
Rows = tuple[torch.Tensor, torch.Tensor]
Score = tuple[float, float]
"""Accuracy and loss."""
Table = dict[str, Score]


class Net(nn.Module):
    """Two convolutions with BatchNorm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).flatten(1))


def data(seed: int, noise: float) -> tuple[Rows, Rows, Rows]:
    """Return rows to train, to choose and to test on, another split for each seed; some training labels are wrong."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    labels = y.clone()
    wrong = torch.rand(len(y), generator=generator) < noise
    labels[wrong] = torch.randint(CLASSES, (int(wrong.sum()),), generator=generator)
    return (x[:600], labels[:600]), (x[600:1000], y[600:1000]), (x[1000:], y[1000:])


@torch.no_grad()
def logits_of(model: nn.Module, rows: Rows) -> torch.Tensor:
    model.eval()
    found = model(rows[0])
    model.train()
    return found


def score(logits: torch.Tensor, rows: Rows) -> Score:
    return float((logits.argmax(1) == rows[1]).float().mean()), float(F.cross_entropy(logits, rows[1]))


Rate = Callable[[float], float]
"""Learning rate by the part of the training that is over, 0 to 1."""


def constant(part: float) -> float:
    return 0.05


def cosine(part: float) -> float:
    return 0.025 * (1 + float(torch.cos(torch.tensor(torch.pi * part))))


def cyclical(cycles: int) -> Rate:
    """Return a rate that falls from 0.05 to a twentieth of it, again and again; checkpoints are taken at each end."""
    return lambda part: 0.05 * (1 - 0.95 * (part * cycles % 1.0))


def batches(rows: Rows, seed: int) -> Iterator[Rows]:
    generator = torch.Generator().manual_seed(seed)
    for chosen in torch.randperm(len(rows[0]), generator=generator).split(BATCH):
        yield rows[0][chosen], rows[1][chosen]


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images moved by up to a pixel each way, with noise."""
    right, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return x.roll((down, right), (2, 3)) + 0.2 * torch.randn(x.shape, generator=generator)


def train(
    root: Path, seed: int, rows: tuple[Rows, Rows, Rows], rate: Rate, epochs: int, *,
    stateful: Callable[[Net], dict[str, object]] = lambda model: {},
) -> Net:  # fmt: skip
    """Train a model and save it after every epoch, with its accuracy on the rows that choose."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    parts = stateful(model)
    averages = [part for part in parts.values() if isinstance(part, EMAModel)]
    config = CheckpointConfig(root, save_total_limit=None, preemption_signals=(), control_file=None, verbose=False)
    steps = len(rows[0][0]) // BATCH
    generator = torch.Generator().manual_seed(seed)
    with CheckpointManager(config, model=model, stateful=parts) as manager:
        for epoch in range(1, epochs + 1):
            for number, (x, y) in enumerate(batches(rows[0], 1000 * seed + epoch)):
                for group in optimizer.param_groups:
                    group["lr"] = rate(((epoch - 1) + number / steps) / epochs)
                optimizer.zero_grad()
                F.cross_entropy(model(augmented(x, generator)), y).backward()
                optimizer.step()
                for average in averages:
                    average.update()
            accuracy, loss = score(logits_of(model, rows[1]), rows[1])
            manager.save(step=epoch, metrics={"accuracy": accuracy, "loss": loss})
    return model


def loaded(path: Path | str) -> Net:
    model = Net()
    model.load_state_dict(open_checkpoint(path).state_dict("model."))
    return model


def averaged(root: Path, rows: Rows, **how: object) -> Net:
    """Return the mean of a root's checkpoints, BatchNorm statistics counted anew on the training rows."""
    with tempfile.TemporaryDirectory() as out:
        recompute = RecomputeBatchNorm(Net(), list(batches(rows, 0)))
        return loaded(average_checkpoints(root, Path(out) / "mean", batchnorm=recompute, **how).path)  # type: ignore[arg-type]


def refreshed(state: dict[str, torch.Tensor], rows: Rows) -> Net:
    """Return a model of these weights, BatchNorm statistics counted anew (torch's update_bn)."""
    model = Net()
    model.load_state_dict(state)
    torch.optim.swa_utils.update_bn(list(batches(rows, 0)), model)
    return model


# ---------------------------------------------------------------------- recipes: a table for one seed


def swa(seed: int, noise: float, folder: Path) -> Table:
    rows, epochs, cycles = data(seed, noise), 40, 8
    train_rows, _, test = rows
    found = {}
    for name, rate in (("constant rate", constant), ("cosine to zero", cosine), ("cyclical rate", cyclical(cycles))):
        model = train(folder / name, seed, rows, rate, epochs)
        found[name] = score(logits_of(model, test), test)
    ends = {"steps": [epochs * n // cycles for n in range(cycles // 2 + 1, cycles + 1)]}
    for name, how in (("constant rate", {"method": "last", "k": 20}), ("cyclical rate", ends)):
        mean = averaged(folder / name, train_rows, **how)
        found[f"{name}, SWA of the second half"] = score(logits_of(mean, test), test)
    return found


def lawa(seed: int, noise: float, folder: Path) -> Table:
    rows, epochs = data(seed, noise), 30
    train_rows, _, test = rows
    train(folder / "run", seed, rows, constant, epochs)
    found = {}
    for epoch in (5, 10, 20, 30):
        single = loaded(folder / "run" / f"step-{epoch:010}")
        mean = averaged(folder / "run", train_rows, method="last", k=5, window=(None, epoch))
        found[f"epoch {epoch}"] = score(logits_of(single, test), test)
        found[f"epoch {epoch}, LAWA of 5"] = score(logits_of(mean, test), test)
    return found


def ema(seed: int, noise: float, folder: Path) -> Table:
    rows, epochs = data(seed, noise), 40
    train_rows, _, test = rows
    kept: dict[str, EMAModel] = {}

    def make(model: Net) -> dict[str, object]:
        kept["decays"], kept["ema"] = EMAModel(model, decay=[0.99, 0.999, 0.9999]), PostHocEMA(model)
        kept["warm"] = EMAModel(model, decay=[0.9999], warmup=CountRatio())
        return dict(kept)

    model = train(folder / "run", seed, rows, constant, epochs, stateful=make)
    found = {"last weights": score(logits_of(model, test), test)}
    for decay in kept["decays"].names:
        with kept["decays"].averaged(decay) as shadow:
            if decay == "0.99":
                found["EMA 0.99, BatchNorm of the last weights"] = score(logits_of(shadow, test), test)
            mean = refreshed(shadow.state_dict(), train_rows)
        found[f"EMA {decay}"] = score(logits_of(mean, test), test)
    with kept["warm"].averaged("0.9999") as shadow:
        mean = refreshed(shadow.state_dict(), train_rows)
    found["EMA 0.9999, warm-up (1 + t) / (10 + t)"] = score(logits_of(mean, test), test)
    for width in (0.02, 0.05, 0.10, 0.20):
        state, _ = synthesise(folder / "run", width)
        name = f"post-hoc EMA, width {width:.2f}"
        found[name] = score(logits_of(refreshed(state, train_rows), test), test)
    return found


def top5(seed: int, noise: float, folder: Path) -> Table:
    rows, epochs = data(seed, noise), 30
    train_rows, choose, test = rows
    found = {}
    for name, rate in (("constant", constant), ("cosine", cosine)):
        root = folder / name
        train(root, seed, rows, rate, epochs)
        best = {"metric": "loss", "mode": "min", "method": "best"}
        found[f"{name}: last"] = score(logits_of(loaded(root / f"step-{epochs:010}"), test), test)
        found[f"{name}: best single"] = score(logits_of(averaged(root, train_rows, k=1, **best), test), test)
        found[f"{name}: mean of the best 5"] = score(logits_of(averaged(root, train_rows, k=5, **best), test), test)

        def held_out(blend: object) -> float:
            model = Net()
            blend.load_into(model)  # type: ignore[attr-defined]
            return score(logits_of(model, choose), choose)[1]

        soup = averaged(
            root, train_rows, method="greedy", evaluate=held_out, mode="min", steps=list(range(11, epochs + 1))
        )
        found[f"{name}: greedy soup of 20"] = score(logits_of(soup, test), test)
    return found


def ensemble(seed: int, noise: float, folder: Path) -> Table:
    rows, epochs = data(seed, noise), 30
    train_rows, _, test = rows
    for run in range(5):
        train(folder / f"run-{run}", 100 * seed + run, rows, constant, epochs)
    last = [folder / "run-0" / f"step-{epoch:010}" for epoch in range(epochs - 4, epochs + 1)]
    apart = [folder / f"run-{run}" / f"step-{epochs:010}" for run in range(5)]
    found = {"one model": score(logits_of(loaded(last[-1]), test), test)}
    for name, paths in (("5 checkpoints of one run", last), ("5 runs", apart)):
        probabilities = torch.stack([logits_of(loaded(path), test).softmax(1) for path in paths]).mean(0)
        found[f"{name}: averaged predictions (5 × the cost)"] = score(probabilities.log(), test)
        with tempfile.TemporaryDirectory() as out:
            recompute = RecomputeBatchNorm(Net(), list(batches(train_rows, 0)))
            mean = loaded(average_checkpoints([*map(str, paths)], out + "/mean", batchnorm=recompute, step=1).path)
        found[f"{name}: averaged weights"] = score(logits_of(mean, test), test)
    return found


RECIPES = {"swa": swa, "lawa": lawa, "ema": ema, "top5": top5, "ensemble": ensemble}


def show(name: str, tables: list[Table]) -> None:
    """Print the mean over seeds, and how far from the first line, in pairs."""
    first = next(iter(tables[0]))
    width = max(map(len, tables[0]))
    print(f"\n{f'{name}: {len(tables)} seeds':{width + 2}} {'accuracy':28} loss")
    for line in tables[0]:
        texts = []
        for part, digits in ((0, 4), (1, 3)):
            mean = statistics.fmean(table[line][part] for table in tables)
            apart = [table[line][part] - table[first][part] for table in tables]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
            told = "" if line == first else f" ({statistics.fmean(apart):+.{digits}f} ± {error:.{digits}f})"
            texts.append(f"{mean:.{digits}f}{told}")
        print(f"  {line:{width}} {texts[0]:28} {texts[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=[*RECIPES, "all"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.2, help="part of the training labels that is wrong")
    args = parser.parse_args()
    for name in RECIPES if args.recipe == "all" else [args.recipe]:
        tables = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                tables.append(RECIPES[name](seed, args.noise, Path(folder)))
        show(name, tables)


if __name__ == "__main__":
    main()
