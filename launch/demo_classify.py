"""Load an exported model with plain transformers, as a service would, and see that it still does what was measured.

    python launch/demo_classify.py MODEL_FOLDER TEST_ROWS COMPARISON_JSON CANDIDATE

Exit status 1 if it finds other numbers of negative reviews on the test rows than the comparison says.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

EXAMPLES = (
    "The fabric is cheap and it fell apart after one wash. Returned it, very disappointed.",
    "Love this dress! Fits perfectly and the color is gorgeous.",
    "Looks like a sack on me, the cut is awful and it itches.",
)


@torch.inference_mode()
def classify(folder: Path, texts: list[str]) -> list[str]:
    """Return the class of each text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    for start in range(0, len(texts), 64):
        limit = model.config.max_position_embeddings
        batch = tokenizer(
            texts[start : start + 64], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        found += [model.config.id2label[int(number)] for number in model(**batch).logits.argmax(dim=-1)]
    return found


def main(folder: Path, rows: Path, comparison: Path, name: str) -> int:
    logging.disable_progress_bar()
    for text, label in zip(EXAMPLES, classify(folder, list(EXAMPLES)), strict=True):
        print(f"{label:9} {text}")
    test = [json.loads(line) for line in rows.open(encoding="utf-8")]
    said = classify(folder, [row["text"] for row in test])
    negative = [label == "negative" for row, label in zip(test, said, strict=True) if row["label"] == "negative"]
    table = json.loads(comparison.read_text(encoding="utf-8"))
    told = next(row for row in table["rows"] if row["name"] == name)["test"]["counts"]["recall_negative"]
    print(
        f"finds {sum(negative)} of {len(negative)} negative reviews of the test rows; measured before: {told[0]} of {told[1]}"
    )
    if [sum(negative), len(negative)] != told:
        print("FAILED: the exported model is not the one that was chosen")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4]), sys.argv[4]))
