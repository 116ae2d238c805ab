"""Weights alone are streamed: however large the model, a few chunks are in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import builders
import numpy as np
import pytest

from distckpt import export_inference_checkpoint
from distckpt.export import stream
from distckpt.format.lineage import create_generation, ensure_root
from distckpt.storage import open_store

MIB = 1 << 20


@pytest.mark.parametrize(("to", "dtype"), [("safetensors", None), ("torch", "bfloat16")])
def test_memory_is_that_of_a_few_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, dtype: str | None
) -> None:
    store = open_store(tmp_path / "run")
    ensure_root(store)
    create_generation(store, resumed_from=None)
    tensors = {f"model.{i}.weight": np.full((MIB // 8, 4), i, np.float32) for i in range(6)}  # 12 MiB
    builders.build_checkpoint(store, 1, tensors=tensors, metrics={})
    del tensors
    monkeypatch.setattr(stream, "CHUNK", MIB)
    tracemalloc.start()
    try:
        report = export_inference_checkpoint(tmp_path / "run", tmp_path / "out", to=to, dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.sizes.kept == 12 * MIB
    assert peak < 8 * MIB
