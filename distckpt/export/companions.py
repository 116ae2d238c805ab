"""What lies beside the weights: the config and the tokenizer, which a Hugging Face folder promises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distckpt.errors import ConfigError
from distckpt.export.artefact import copy_tokenizer, write_config
from distckpt.export.feeds import open_tokenizer
from distckpt.export.outcome import Check
from distckpt.export.plan import Plan, Proof, Trained


def companions(plan: Plan, proof: Proof, draft: Path, trained: Trained | None) -> None:
    """Write config and tokenizer into a folder; of a Hugging Face folder they are part of the promise."""
    hugging = plan.target.format == "huggingface"
    usable = isinstance(plan.config, Mapping) and "model_type" in plan.config
    kind = trained.builder.huggingface if trained is not None else None
    if not plan.target.file and isinstance(plan.config, Mapping):
        write_config(draft, plan.config, dtype=proof.dtype, architecture=None if kind is None else kind.__name__)
    if hugging and not usable and plan.model is None:
        told = "no transformers config (with model_type): name a folder with config.json (config=, --config)"
        proof.checks.append(Check("config", "fail", told))
        return
    if plan.tokenizer is not None and not plan.target.file:
        copied = copy_tokenizer(plan.tokenizer, draft)
        proof.checks.append(_tokenizer(plan, draft, copied))


def _tokenizer(plan: Plan, draft: Path, copied: list[str]) -> Check:
    try:
        mine, source = open_tokenizer(draft), open_tokenizer(plan.tokenizer or draft)
    except ConfigError as cause:
        return Check("tokenizer", "fail", f"does not load from the export: {cause}")
    size = plan.config.get("vocab_size") if isinstance(plan.config, Mapping) else None
    if size is not None and len(mine) > size:
        return Check(
            "tokenizer", "fail", f"it has {len(mine)} tokens, the model's embedding {size}: it is another model's"
        )
    rows = plan.data.rows[:64] if plan.data is not None else []
    texts = [row if isinstance(row, str) else row.get(plan.text) for row in rows if isinstance(row, (str, Mapping))]
    texts = [one for one in texts if isinstance(one, str)]
    if any(mine(one)["input_ids"] != source(one)["input_ids"] for one in texts):
        return Check("tokenizer", "fail", "the copy gives other tokens than the original")
    return Check("tokenizer", "pass", f"{len(mine)} tokens, {len(copied)} files; same tokens on {len(texts)} texts")
