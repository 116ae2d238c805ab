"""Converting takes a bounded amount of memory, whatever the size of the model."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from distckpt.export import stream
from distckpt.importers import stream_shard
from distckpt.importers.convert import convert

CHUNK = 1 << 20
MODEL = 48 << 20
BOUND = 12 << 20
"""Two threads with about three chunks each, and what Python itself takes."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", CHUNK)
    monkeypatch.setattr(stream_shard, "CHUNK", CHUNK)


def weights() -> dict[str, torch.Tensor]:
    """Two large tensors, one of them transposed, so that no source can be bounded by its largest tensor."""
    each = MODEL // 8
    return {"a": torch.arange(each, dtype=torch.float32), "b": torch.arange(each).float().reshape(-1, 1024).t()}


def peak(source: Path, target: Path, to: str) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        convert(source, target, to=to, threads=2)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["torch", "legacy", "dcp"])
def test_in_and_out(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "dcp":
        dcp.save({"model": weights()}, checkpoint_id=source, no_dist=True)
    else:
        torch.save(weights(), source, _use_new_zipfile_serialization=kind == "torch")
    assert peak(source, tmp_path / "out", "distckpt") < BOUND
    if kind == "torch":
        assert peak(tmp_path / "out", tmp_path / "out.pt", "torch") < BOUND
        assert peak(tmp_path / "out", tmp_path / "hf", "huggingface") < BOUND


PROGRAM = """
import json, resource, sys
from distckpt.importers.convert import convert
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = convert(sys.argv[1], sys.argv[2], threads=2)
print(json.dumps([base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, report.nbytes >> 10]))
"""


def test_resident_memory_of_a_process(tmp_path: Path) -> None:
    nbytes = 256 << 20
    entries = {"w": {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}
    header = json.dumps(entries).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model.safetensors"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    base, most, size = json.loads(done.stdout.splitlines()[-1])
    assert size == nbytes >> 10
    assert most - base < size // 3
