"""Runs to evaluate: linear classifiers in a root, a tiny BERT from scratch, and predictions with known counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import numpy as np

from distckpt.format.lineage import create_generation, ensure_root
from distckpt.selection.evaluation import CheckpointId, DataId, Evaluation, EvaluatorId
from distckpt.selection.metrics import measure
from distckpt.selection.predictions import Predictions
from distckpt.storage import open_store

CLASSES = ("negative", "positive")
_TEXT = "good bad fine poor great awful dress shirt fits runs small large love hate color the and it is very"
WORDS = _TEXT.split()


def linear_root(folder: Path, steps: tuple[int, ...] = (100, 200, 300), metrics: dict[int, Any] | None = None) -> Path:
    """Commit one (4, 2) weight for each step."""
    store = open_store(folder)
    ensure_root(store)
    create_generation(store, resumed_from=None)
    for step in steps:
        weight = np.random.default_rng(step).standard_normal((4, 2)).astype(np.float32)
        told = (metrics or {}).get(step, {"loss": 1.0 / step})
        builders.build_checkpoint(store, step, tensors={"model.w": weight}, metrics=told, epoch=step // 100)
    return folder


def linear_rows(count: int = 101, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(4).tolist(), "y": int(rng.random() < 0.3)} for _ in range(count)]


CALLS: list[int] = []


def linear(model: Any, rows: Any) -> Predictions:
    """An evaluator function: one product for each batch."""
    CALLS.append(len(rows))
    weight = model["w"].numpy()
    logits = [np.array([row["x"] for row in batch]) @ weight for batch in rows.batches()]
    return Predictions(ids=rows.ids, labels=[row["y"] for row in rows], logits=np.concatenate(logits), classes=CLASSES)


def zeros_share(predictions: Predictions) -> float:
    """A metric of one's own."""
    chosen = predictions.chosen()
    assert chosen is not None
    return float((chosen == 0).mean())


def binary(hits: int, misses: int, false_alarms: int, correct: int) -> Predictions:
    """Predictions with this confusion of class 0 ("negative"): found, missed, called so wrongly, rightly not."""
    labels = [0] * (hits + misses) + [1] * (false_alarms + correct)
    predicted = [0] * hits + [1] * misses + [0] * false_alarms + [1] * correct
    return Predictions(ids=range(len(labels)), labels=labels, predicted=predicted, classes=CLASSES)


def evaluation(
    name: str, step: int, predictions: Predictions | None = None, data: str = "validation", **metrics: Any
) -> Evaluation:
    """An evaluation that is not on storage."""
    found = measure(predictions) if predictions is not None else None
    return Evaluation(
        CheckpointId(name, f"/{name}", f"{step:032x}", step), DataId(data, f"digest of {data}", len(predictions or ())),
        EvaluatorId("test", "1"), {**(found.metrics if found else {}), **metrics}, found.counts if found else {},
        found.n if found else {}, found.classes if found else None, found.confusion if found else None,
    )  # fmt: skip


def tiny_tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer of twenty words, in a folder of its own."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def tiny_bert(seed: int) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
        max_position_embeddings=16, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 1 to 20 words (some longer than the model takes), labels as names and as numbers."""
    rng = np.random.default_rng(seed)
    names = ["negative", 1, "POSITIVE", "0"]
    return [
        {"text": " ".join(rng.choice(WORDS, rng.integers(1, 21))), "label": names[rng.integers(0, 4)]}
        for _ in range(count)
    ]
