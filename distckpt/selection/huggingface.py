"""Evaluators for models of the transformers library: sequence classification, language models, translation.

Nothing is fetched: models and tokenizers come from folders. A distckpt checkpoint holds weights alone, so it needs a
``config`` (a folder with ``config.json``, or the ``model_config`` that ``save`` was given) and a ``tokenizer`` folder.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from distckpt.engines.base import clean_fqn
from distckpt.errors import ConfigError, IncompatibleState, optional
from distckpt.format.digest import digest
from distckpt.selection.data import Rows
from distckpt.selection.predictions import Predictions
from distckpt.selection.subjects import Subject, folder_digest

_CODE: Final = 1
"""Counts the changes to this file after which results differ."""


@dataclass(slots=True, kw_only=True)
class HuggingFaceEvaluator(ABC):
    """What the three have in common. ``tokenizer``, ``config``: folders (default: the checkpoint's own, where it is one).

    ``max_length``: tokens of a row, the rest is cut off (default: what the model can take). ``device``: default CUDA if
    there is one. ``dtype``: of the weights while they run (default: as they were saved).
    """

    tokenizer: str | os.PathLike[str] | None = None
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None
    max_length: int | None = None
    device: str | None = None
    dtype: str | None = None
    name: str = ""
    auto: ClassVar[str]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        self.name = self.name or self.kind

    @property
    def version(self) -> str:
        """Changes with this code, the libraries, the options and the content of the tokenizer and config folders."""
        folders = [p for p in (self.tokenizer, self.config) if isinstance(p, (str, os.PathLike))]
        content = [folder_digest(_folder(folder))[0] for folder in folders]
        libraries = [optional("transformers", "eval").__version__, torch.__version__]
        return f"{self.kind}-{_CODE}-{digest(repr([content, libraries, *self._options()]).encode())[:12]}"

    def _options(self) -> list[Any]:
        config = sorted(self.config.items()) if isinstance(self.config, Mapping) else None
        return [self.max_length, self.device, self.dtype, config]

    def load(self, subject: Subject) -> tuple[Any, Any]:
        """Return (model in eval mode, tokenizer). Raises ``IncompatibleState`` unless every weight was in the checkpoint."""
        transformers = optional("transformers", "eval")
        auto = getattr(transformers, self.auto)
        if subject.id.kind == "huggingface":
            model, told = auto.from_pretrained(
                subject.path, local_files_only=True, output_loading_info=True, dtype=self.dtype or "auto"
            )
            _complete(subject, set(told["missing_keys"]) | {str(one) for one in told.get("mismatched_keys", ())})
        else:
            model = auto.from_config(self._config(subject))
            weights = {clean_fqn(name): tensor for name, tensor in subject.state_dict().items()}
            load_weights(subject, model, weights)
            model = model if self.dtype is None else model.to(getattr(torch, self.dtype))
        folder = self.tokenizer or (subject.path if subject.id.kind == "huggingface" else None)
        if folder is None:
            raise ConfigError(f"{subject.path}: there is no tokenizer in it; name a folder (tokenizer=, --tokenizer)")
        tokenizer = transformers.AutoTokenizer.from_pretrained(_folder(folder), local_files_only=True)
        return model.to(self._device()).eval(), tokenizer

    def _device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _config(self, subject: Subject) -> Any:
        auto = optional("transformers", "eval").AutoConfig
        if isinstance(self.config, (str, os.PathLike)):
            return auto.from_pretrained(_folder(self.config), local_files_only=True)
        config = self.config if self.config is not None else subject.config
        if not isinstance(config, Mapping) or "model_type" not in config:
            raise ConfigError(
                f"{subject.path}: no transformers config is in it; save with model_config=model.config.to_dict(), or name a "
                "folder with config.json (config=, --config)"
            )
        return auto.for_model(**config)

    def evaluate(self, model: tuple[Any, Any], rows: Rows) -> Predictions:
        """Run the model over the rows, batch by batch, without gradients; a row beside always the same rows."""
        network, tokenizer = model
        parts: list[dict[str, Any]] = []
        with torch.inference_mode():
            for batch in rows.batches():
                parts.append(self.run(network, tokenizer, batch))
        joined: dict[str, Any] = {"ids": rows.ids}
        for name in parts[0] if parts else ():
            values = [part[name] for part in parts]
            joined[name] = torch.cat(values) if torch.is_tensor(values[0]) else [one for v in values for one in v]
        return Predictions(**joined, **self.facts(network))

    @abstractmethod
    def run(self, network: Any, tokenizer: Any, batch: Rows) -> dict[str, Any]:
        """Return one batch's fields of ``Predictions``: tensors, or lists of text."""

    def facts(self, network: Any) -> dict[str, Any]:
        """Return fields that belong to the model and not to rows."""
        return {}

    def encode(self, network: Any, tokenizer: Any, texts: Sequence[Any], **more: Any) -> dict[str, torch.Tensor]:
        """Tokenize a batch: padded to its longest row, cut to what the model takes, on the model's device."""
        limits = [self.max_length, getattr(network.config, "max_position_embeddings", None), tokenizer.model_max_length]
        limit = min(limit for limit in (*limits, 1 << 20) if limit)
        found = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt", **more)
        return {name: tensor.to(network.device) for name, tensor in found.items()}


@dataclass(slots=True, kw_only=True)
class SequenceClassification(HuggingFaceEvaluator):
    """Texts to classes. Rows are dicts with ``text``, perhaps ``text_pair``, and ``label`` (number or name), or pairs."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    auto = "AutoModelForSequenceClassification"
    kind = "sequence-classification"

    def _options(self) -> list[Any]:
        return [*HuggingFaceEvaluator._options(self), self.text, self.text_pair, self.label]

    def run(self, network: Any, tokenizer: Any, batch: Rows) -> dict[str, Any]:
        """Return labels and logits."""
        ids = {str(name).lower(): int(number) for number, name in network.config.id2label.items()}
        texts, pairs, labels = [], [], []
        for row in batch:
            found = row if isinstance(row, Mapping) else {self.text: row[0], self.label: row[1]}
            texts.append(_field(found, self.text))
            pairs.append(found.get(self.text_pair))
            labels.append(_label(_field(found, self.label), ids))
        both = [texts] if pairs[0] is None else [texts, pairs]
        logits = network(
            **self.encode(network, tokenizer, *both[:1], **({"text_pair": pairs} if both[1:] else {}))
        ).logits
        return {"labels": torch.tensor(labels), "logits": logits.float().cpu()}

    def facts(self, network: Any) -> dict[str, Any]:
        """Return the classes' names in the order of the model's outputs."""
        names = network.config.id2label
        return {"classes": [str(names[number]) for number in sorted(names)]}


@dataclass(slots=True, kw_only=True)
class LanguageModel(HuggingFaceEvaluator):
    """Next-token loss and perplexity. Rows are texts, dicts with ``text``, or dicts with ``input_ids``."""

    text: str = "text"
    auto = "AutoModelForCausalLM"
    kind = "language-model"

    def _options(self) -> list[Any]:
        return [*HuggingFaceEvaluator._options(self), self.text]

    def run(self, network: Any, tokenizer: Any, batch: Rows) -> dict[str, Any]:
        """Return each target token's log-probability, and how many each row has (its length less one)."""
        rows = [row if isinstance(row, Mapping) else {self.text: row} for row in batch]
        if all("input_ids" in row for row in rows):
            ids = [torch.as_tensor(row["input_ids"]) for row in rows]
            tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(network.device)
            lengths = torch.tensor([len(one) for one in ids], device=network.device)
            mask = (torch.arange(tokens.shape[1], device=network.device) < lengths[:, None]).long()
        else:
            tokenizer.padding_side = "right"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            found = self.encode(network, tokenizer, [_field(row, self.text) for row in rows])
            tokens, mask = found["input_ids"], found["attention_mask"]
        logits = network(input_ids=tokens, attention_mask=mask).logits
        real = mask[:, 1:].bool()
        logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])
        return {"terms": real.sum(dim=1).cpu(), "token_logprobs": logprobs[real].cpu()}


@dataclass(slots=True, kw_only=True)
class Translation(HuggingFaceEvaluator):
    """Generated text against a reference, by BLEU. Rows are dicts with ``source`` and ``target``, or pairs of texts."""

    source: str = "source"
    target: str = "target"
    max_new_tokens: int = 128
    beams: int = 1
    auto = "AutoModelForSeq2SeqLM"
    kind = "translation"

    def _options(self) -> list[Any]:
        return [*HuggingFaceEvaluator._options(self), self.source, self.target, self.max_new_tokens, self.beams]

    def run(self, network: Any, tokenizer: Any, batch: Rows) -> dict[str, Any]:
        """Return the generated texts and the references; nothing is sampled."""
        rows = [row if isinstance(row, Mapping) else {self.source: row[0], self.target: row[1]} for row in batch]
        inputs = self.encode(network, tokenizer, [_field(row, self.source) for row in rows])
        wanted = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # generate refuses token types
        made = network.generate(**wanted, max_new_tokens=self.max_new_tokens, num_beams=self.beams, do_sample=False)
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        return {"texts": texts, "references": [_field(row, self.target) for row in rows]}


BUILT_IN: Final = {kind.kind: kind for kind in (SequenceClassification, LanguageModel, Translation)}
"""Evaluators that the command line knows by name."""


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return ln p of each target, float32; logits (..., vocabulary), targets (...)."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def load_weights(subject: Subject, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a model; what is tied to a loaded tensor may be absent.

    Raises ``IncompatibleState`` where the model lacks a weight, or the checkpoint has one that the model has not.
    """
    told = model.load_state_dict(weights, strict=False)
    state = model.state_dict(keep_vars=True)
    loaded = {state[name].data_ptr() for name in weights if name in state}
    _complete(
        subject, {name for name in told.missing_keys if state[name].data_ptr() not in loaded}, told.unexpected_keys
    )


def _complete(subject: Subject, missing: set[str], unexpected: Sequence[str] = ()) -> None:
    if missing or unexpected:
        what = (
            f"no weights for {sorted(missing)[:3]}" if missing else f"weights {sorted(unexpected)[:3]} without a place"
        )
        raise IncompatibleState(
            f"{subject.path}: {what} in this model: it would be evaluated with random weights or in part; check config and prefix"
        )


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; models and tokenizers are never fetched")
    return folder


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ConfigError(f"a row has {', '.join(map(str, row))} and no {name!r}; name the evaluator's fields")
    return row[name]


def _label(label: Any, ids: Mapping[str, int]) -> int:
    """Return a class number from a number or a name, however a file spells it."""
    text = str(label).strip().lower()
    if text in ids:
        return ids[text]
    if text.isdigit() and int(text) < len(ids):
        return int(text)
    raise ConfigError(f"label {label!r}: the model's classes are {', '.join(ids)}")
