"""Train a small BERT-type classifier from scratch on rows of text and label, with a checkpoint and an EMA each epoch.

    torchrun --standalone --nproc-per-node 2 launch/train_classifier.py --data DATA --dir runs/reviews

DATA is what launch/demo_reviews.py writes: train.jsonl and tokenizer/. Lines marked #! are what distckpt adds.
"""

import argparse
import json
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from distckpt import CheckpointConfig, CheckpointManager, EMAModel, ResumableSampler  #!

CLASSES = ("other", "negative")
LENGTH = 48  # tokens of a row; the rest is cut off


def load(data: Path) -> tuple[TensorDataset, int]:
    """Return tokens, masks and class numbers of the training rows, and the size of the vocabulary."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    texts = [row["text"] for row in rows]
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    return TensorDataset(found["input_ids"], found["attention_mask"], labels), len(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dir", required=True, help="folder of the checkpoints, which all processes see")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64, help="rows per step, over all processes together")
    parser.add_argument("--lr", type=float, default=1e-3, help="constant")
    parser.add_argument("--decay", type=float, default=0.99, help="of the EMA")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # plain python
    dist.init_process_group("gloo", **alone)
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rows, vocabulary = load(args.data)

    torch.manual_seed(args.seed)
    shape = BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)}, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    model = DistributedDataParallel(BertForSequenceClassification(shape))
    torch.manual_seed(args.seed + 1 + rank)  # each rank its own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    ema = EMAModel(model, decay=args.decay)  #!
    sampler = ResumableSampler(rows, seed=args.seed, uneven="drop")  #!
    loader = sampler.track(DataLoader(rows, batch_size=args.batch // world, sampler=sampler, drop_last=True))  #!
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows):,} rows, {world} processes")

    config = CheckpointConfig(args.dir, save_total_limit=None)  #!
    parts = {"model": model, "optimizer": optimizer, "stateful": {"sampler": sampler, "ema": ema}}  #!
    with CheckpointManager(config, **parts) as manager:  #!
        report = manager.resume()  #!
        step = report.step if report else 0  #!
        for index in range(sampler.epoch, args.epochs):
            epoch, losses = index + 1, []
            model.train()
            for tokens, mask, labels in loader:
                loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update()  #!
                step += 1
                losses.append(loss.detach())
                manager.step(step, metrics={"loss": loss.item()}, epoch=epoch)  #!
            mean = torch.stack(losses).mean()
            dist.all_reduce(mean)
            metrics = {"train_loss": mean.item() / world}
            manager.save(epoch=epoch, step=step, metrics=metrics, model_config=shape.to_dict())  #!
            if rank == 0:
                print(f"epoch {epoch}, step {step}: training loss {metrics['train_loss']:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
