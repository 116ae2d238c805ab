"""Writes the files of one format into a folder, and reads them back: the six formats side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from distckpt.errors import ConfigError
from distckpt.export.huggingface import by_element_size, export_huggingface, write_safetensors
from distckpt.export.stream import Progress, Recorder
from distckpt.export.torch_file import export_torch_file
from distckpt.export.weights import Weights
from distckpt.format.typed_json import Ref

FILES: Final = {
    "huggingface": "model.safetensors",
    "safetensors": "model.safetensors",
    "torch": "model.pt",
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "torchscript": "model.ts",
}
"""Every format, and what its file is called in a folder."""
GRAPHS: Final = ("pt2", "onnx", "torchscript")
"""Formats that hold the computation too, so need the model and rows to record it with."""
_SUFFIXES: Final = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".pt2": "pt2", ".onnx": "onnx",
    ".ts": "torchscript",
}  # fmt: skip
_TOKENIZER: Final = re.compile(
    r"tokenizer.*\.(json|model)|vocab\.(txt|json)|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.spm|spiece\.model"
    r"|sentencepiece.*\.model|.*\.tiktoken|chat_template\.\w+|(pre)?processor_config\.json|generation_config\.json"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an export goes: a folder, or (``file``) one file with its report and card beside it."""

    path: Path
    format: str
    file: bool

    @property
    def main(self) -> str:
        """The name of the model's file."""
        return self.path.name if self.file else FILES[self.format]

    @property
    def report(self) -> str:
        """The name of the JSON report."""
        return f"{self.path.name}.json" if self.file else "export.json"

    @property
    def card(self) -> str:
        """The name of the model card."""
        return f"{self.path.name}.md" if self.file else "README.md"


def target_of(path: Path, to: str | None) -> Target:
    """Return what a path and a format mean: a path that ends as a format's files do is a file, any other a folder.

    ``to`` may be left out for a file. Raises ``ConfigError`` for an unknown or contradicting format.
    """
    said = _SUFFIXES.get(path.suffix)
    if to is None:
        to = said or "huggingface"
    if to not in FILES:
        raise ConfigError(f"to={to!r}: choose one of {', '.join(FILES)}")
    if said is not None and said != to and to != "huggingface":
        raise ConfigError(f"{path}: ends like a {said} file, but {to} was asked for; name another target")
    return Target(path, to, said == to)


def write_weights(
    target: Target, folder: Path, weights: Weights, stamp: Mapping[str, str], most: int, progress: Progress
) -> dict[str, str]:
    """Write one of the formats that hold weights alone, streamed; returns the fingerprint of each tensor written.

    ``most``: bytes of tensors in one file of a Hugging Face folder.
    """
    recorder = Recorder(weights.tensors)
    streams = recorder.streams
    if target.format == "huggingface":
        export_huggingface(streams, folder, aliases=weights.aliases, max_shard_size=most, progress=progress)
    elif target.format == "safetensors":
        metadata = {**weights.aliases, **{f"distckpt.{name}": value for name, value in stamp.items()}}
        write_safetensors(folder / target.main, by_element_size(streams), metadata, progress)
    else:
        tree = {name: Ref(weights.aliases.get(name, name)) for name in weights.names}
        export_torch_file(tree, streams, folder / target.main, progress)
    return {name: recorder.fingerprint(stream) for name, stream in streams.items()}


def write_config(folder: Path, config: Any, *, dtype: str, architecture: str | None) -> None:
    """Write ``config.json`` for what was exported: with the dtype that it has now and the class that loads it."""
    told = {**config, "dtype": dtype}
    if "torch_dtype" in told:
        told["torch_dtype"] = dtype
    if architecture is not None:
        told["architectures"] = [architecture]
    text = json.dumps(told, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the files of a tokenizer or processor; returns their names."""
    names = sorted(file.name for file in source.iterdir() if file.is_file() and _TOKENIZER.fullmatch(file.name))
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
    return names
