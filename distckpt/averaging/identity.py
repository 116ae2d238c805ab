"""Do models mean the same by the same numbers? Heads, label orders and vocabularies, compared before weights are mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from distckpt.averaging.sources import Member
from distckpt.errors import CorruptCheckpoint, IncompatibleState
from distckpt.format.digest import digest

FACTS: Final = (
    "model_type", "architectures", "num_labels", "num_classes", "id2label", "label2id", "problem_type", "vocab_size",
    "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
"""Keys of a model's config that decide what its outputs and rows stand for."""
_VOCABULARIES: Final = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def check_identity(members: Sequence[Member]) -> list[str]:
    """Compare what configs and vocabularies say; ``IncompatibleState`` names key, values and checkpoints.

    Only what two members both state is compared. Returns notes: who states nothing while others do.
    """
    stated = [_facts(member) for member in members]
    problems: list[str] = []
    for key in dict.fromkeys(key for facts in stated for key in facts):
        having = [(m, facts[key]) for m, facts in zip(members, stated, strict=True) if key in facts]
        (first, expected), others = having[0], having[1:]
        problems += [
            f"{key} is {_short(expected)} in {first.label}, {_short(value)} in {member.label}"
            for member, value in others
            if value != expected
        ]
    if problems:
        raise IncompatibleState(
            f"these are different models, averaging them makes no sense: {'; '.join(problems[:5])}. Average checkpoints of "
            "one model, with one head, label order and vocabulary"
        )
    silent = [member.label for member, facts in zip(members, stated, strict=True) if not facts]
    if silent and len(silent) < len(members):
        return [f"no config to compare in {', '.join(silent[:5])}"]
    return []


def _facts(member: Member) -> dict[str, Any]:
    config = member.source.config
    facts = {key: _plain(config[key]) for key in FACTS if key in config} if isinstance(config, Mapping) else {}
    if member.source.kind == "huggingface":
        path = Path(member.source.path)
        facts |= vocabulary(path if path.is_dir() else path.parent)
    return facts


def vocabulary(folder: Path) -> dict[str, str]:
    """Return file name to digest of a tokenizer's vocabulary; of ``tokenizer.json`` only tokens, not its settings."""
    found = {name: digest((folder / name).read_bytes()) for name in _VOCABULARIES if (folder / name).is_file()}
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            content = json.loads(file.read_bytes())
            tokens = [content["model"].get("vocab"), [[t["id"], t["content"]] for t in content.get("added_tokens", ())]]
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise CorruptCheckpoint(f"{os.fspath(file)}: is no tokenizer ({cause})") from cause
        found["tokenizer.json"] = digest(json.dumps(tokens, sort_keys=True).encode())
    return found


def _plain(value: Any) -> Any:
    """Return a value with text keys, as JSON has them: ``{0: "a"}`` and ``{"0": "a"}`` are the same label order."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
