"""From rows to what a model takes: batches of several shapes, which axes may have any length, and the edge cases."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from distckpt.errors import ConfigError, optional

Inputs = dict[str, torch.Tensor]
_PROBED: Final = 64
"""Rows that are encoded one by one to find short and long ones."""
_LARGEST: Final = 8


class Feed(ABC):
    """Encodes rows. ``keywords``: the model is called by names, not by position."""

    keywords: bool = True

    @abstractmethod
    def encode(self, rows: Sequence[Any]) -> Inputs:
        """Return the inputs of a batch by name, in the model's order; the first axis counts rows."""

    def edges(self, rows: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """Return rows at the edges: what is empty, and what is longer than any real row."""
        return {}


@dataclass(slots=True)
class TextFeed(Feed):
    """Texts through a tokenizer, padded to the longest of a batch, cut to ``limit`` tokens."""

    tokenizer: Any
    names: tuple[str, ...]
    limit: int
    text: str = "text"
    text_pair: str = "text_pair"
    keywords: bool = True

    def encode(self, rows: Sequence[Any]) -> Inputs:
        """Return token ids, mask and what else the model takes, int64 (rows, tokens)."""
        if rows and all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
            ids = [torch.as_tensor(row["input_ids"])[: self.limit] for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = (torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]).long()
            return {k: v for k, v in {"input_ids": padded, "attention_mask": mask}.items() if k in self.names}
        texts = [self._field(row) for row in rows]
        pairs = [row.get(self.text_pair) if isinstance(row, Mapping) else None for row in rows]
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        more = {} if not pairs or pairs[0] is None else {"text_pair": pairs}
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt", **more)
        return {name: found[name] for name in self.names if name in found}

    def _field(self, row: Any) -> str:
        if isinstance(row, str):
            return row
        value = row.get(self.text) if isinstance(row, Mapping) else row[0]
        if not isinstance(value, str):
            raise ConfigError(f"a row has no text under {self.text!r}; give inputs= (--inputs), a function of rows")
        return value

    def edges(self, rows: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """Return an empty text, and one longer than the model takes."""
        if rows and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
            return {"longest": [{"input_ids": torch.as_tensor(rows[0]["input_ids"]).repeat(self.limit)[: self.limit]}]}
        words = " ".join(self._field(row) for row in rows[:_LARGEST]).split() or ["a"]
        return {"empty text": [""], "longest": [" ".join(words * (1 + self.limit // len(words)))]}


@dataclass(slots=True)
class ArrayFeed(Feed):
    """Rows of numbers. ``function``: the user's own ``rows -> inputs``; else fields that the model's ``forward`` names.

    A row that is no dict is the first input itself; of a pair it is the first half, the other is the label.
    """

    names: tuple[str, ...]
    required: tuple[str, ...] = ()
    function: Callable[[Sequence[Any]], Any] | None = None
    keywords: bool = False
    _order: tuple[str, ...] = field(default=(), repr=False)

    def encode(self, rows: Sequence[Any]) -> Inputs:
        """Return tensors, stacked along a new first axis; numbers that are fractions become float32."""
        if self.function is not None:
            return self._named(self.function(rows))
        if rows and isinstance(rows[0], Mapping):
            names = [name for name in self.names if name in rows[0]]
            if not names or not set(self.required) <= set(names):
                raise ConfigError(
                    f"a row has {', '.join(map(str, rows[0]))}, the model takes {', '.join(self.names)}; "
                    "give inputs= (--inputs), a function of rows"
                )
            return {name: _stacked([row[name] for row in rows]) for name in names}
        return {self.names[0]: _stacked([row[0] if isinstance(row, tuple) else row for row in rows])}

    def _named(self, found: Any) -> Inputs:
        if isinstance(found, Mapping):
            named = dict(found)
        else:
            several = found if isinstance(found, (tuple, list)) else (found,)
            named = dict(zip(self.names, several, strict=False))
        if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
            raise ConfigError("inputs= must return a tensor, a tuple of tensors, or a dict of tensors by input name")
        return named


def _stacked(values: Sequence[Any]) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if len({tuple(tensor.shape) for tensor in tensors}) > 1:
        raise ConfigError("rows have different shapes; give inputs= (--inputs), a function of rows that pads them")
    found = torch.stack(tensors)
    return found.float() if found.dtype == torch.float64 else found


def feed_of(
    module: nn.Module, config: Any, *, huggingface: bool, tokenizer: Any, inputs: Any, max_length: int | None, text: str
) -> Feed:
    """Return what encodes rows for a model: the user's function, a tokenizer, or the rows' own numbers."""
    parameters = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    names = tuple(p.name for p in parameters)
    if inputs is None and tokenizer is not None:
        said = (
            config.get("max_position_embeddings") or config.get("n_positions") if isinstance(config, Mapping) else None
        )
        limits = (max_length, said, getattr(tokenizer, "model_max_length", None), 1 << 14)
        return TextFeed(tokenizer, names, min(limit for limit in limits if limit), text)
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return ArrayFeed(names or ("input",), required, inputs, keywords=huggingface)


def open_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a folder; nothing is fetched. Raises ``ConfigError`` for a folder without one."""
    if not Path(folder).is_dir():
        raise ConfigError(f"tokenizer {os.fspath(folder)}: no such folder; nothing is ever fetched")
    try:
        return optional("transformers", "eval").AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as cause:
        raise ConfigError(f"tokenizer {os.fspath(folder)}: cannot be loaded: {cause}") from cause


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Real rows, encoded in batches of several shapes. ``named``: label to inputs; ``trace``: what to record a graph with.

    ``axes[input]`` has a name for each axis that may have any length, None for the others. ``single``: one row of middle
    length; ``lengths``: elements of each probed row.
    """

    named: Mapping[str, Inputs]
    edges: Mapping[str, Inputs]
    trace: Inputs
    single: Inputs
    several: Inputs
    axes: Mapping[str, tuple[str | None, ...]]
    lengths: tuple[int, ...]


def make_batches(feed: Feed, rows: Sequence[Any]) -> Batches:
    """Return batches of real rows: the shortest, the longest, two, three mixed, eight; and the edge cases.

    A graph is recorded with at least two rows, for an axis of size 1 is taken as always 1.
    """
    probed = [rows[index] for index in range(min(len(rows), _PROBED))]
    alone = [feed.encode([row]) for row in probed]
    lengths = [max(value.numel() for value in one.values()) for one in alone]
    order = sorted(range(len(probed)), key=lambda index: lengths[index])
    short, middle, long = order[0], order[len(order) // 2], order[-1]
    several = [probed[i % len(probed)] for i in range(max(_LARGEST, 2))]
    groups = {
        "batch of one": [probed[short]],
        "longest row": [probed[long]],
        "two rows": [probed[short], probed[long]],
        "three rows": [probed[middle], probed[short], probed[long]],
        "eight rows": several,
    }
    named = {label: feed.encode(group) for label, group in groups.items()}
    observed = [(1, one) for one in alone] + [(len(groups[label]), one) for label, one in named.items()]
    edges = {label: feed.encode(group) for label, group in feed.edges(probed).items()}
    edges["zero rows"] = {name: value[:0] for name, value in named["two rows"].items()}
    observed += [(1, one) for label, one in edges.items() if label != "zero rows"]
    return Batches(
        named, edges, named["three rows"], alone[middle], named["eight rows"], axes_of(observed), tuple(lengths)
    )


def axes_of(observed: Sequence[tuple[int, Inputs]]) -> dict[str, tuple[str | None, ...]]:
    """Return names of the axes that vary: ``batch`` where the size is that of the batch, others by which vary together.

    Raises ``ConfigError`` for an input without a batch axis or with another number of axes in another batch.
    """
    names: dict[tuple[int, ...], str] = {}
    found: dict[str, tuple[str | None, ...]] = {}
    counts = tuple(count for count, _ in observed)
    for name in observed[0][1]:
        shapes = [tuple(inputs[name].shape) for _, inputs in observed]
        if len({len(shape) for shape in shapes}) != 1 or not shapes[0]:
            raise ConfigError(
                f"input {name!r}: want the same number of axes, at least one, in every batch; got {shapes[:3]}"
            )
        axes: list[str | None] = []
        for sizes in zip(*shapes, strict=True):
            if sizes == counts:
                axes.append("batch")
            elif len(set(sizes)) == 1:
                axes.append(None)
            else:
                axes.append(names.setdefault(sizes, "sequence" if not names else f"axis_{len(names) + 1}"))
        if axes[0] != "batch":
            raise ConfigError(f"input {name!r}: its first axis does not count rows; shapes {shapes[:3]}")
        found[name] = tuple(axes)
    return found
