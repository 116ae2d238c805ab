"""Dtypes: the table holds for the installed torch, safetensors, and torch's Hugging Face reader."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from distckpt.errors import IncompatibleState
from distckpt.format import dtypes

TORCH = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
QUANTIZED = {"qint8", "qint32", "quint8", "quint2x4", "quint4x2"}


def test_every_torch_dtype_is_covered() -> None:
    assert set(TORCH) - QUANTIZED == set(dtypes.ITEMSIZES)


@pytest.mark.parametrize("name", sorted(dtypes.ITEMSIZES))
def test_item_size_is_torchs_and_bytes_come_back(name: str) -> None:
    size = dtypes.itemsize(name)
    assert size == TORCH[name].itemsize
    octets = torch.arange(6 * size, dtype=torch.uint8)
    tensor = octets.view(TORCH[name])
    assert tensor.shape == (6,)
    assert torch.equal(tensor.view(torch.uint8), octets)


@pytest.mark.parametrize("name", sorted(dtypes.ITEMSIZES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (2, 0)])
def test_safetensors_reads_the_stored_form(name: str, shape: tuple[int, ...]) -> None:
    tag, stored = dtypes.stored_form(name, shape)
    nbytes = torch.Size(shape).numel() * dtypes.itemsize(name)
    data = bytes(index % 2 for index in range(nbytes))
    entry = {"dtype": tag, "shape": list(stored), "data_offsets": [0, nbytes]}
    header = json.dumps({"x": entry}).encode()
    loaded = safetensors.torch.load(struct.pack("<Q", len(header)) + header + data)["x"]
    assert loaded.shape == stored
    assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == data
    if dtypes.safetensors_tag(name) is None:
        assert loaded.dtype == torch.uint8
    else:
        assert loaded.dtype == TORCH[name]


@pytest.mark.parametrize("name", sorted(dtypes.ITEMSIZES))
def test_torchs_reader_knows_the_tag(name: str) -> None:
    tag = dtypes.safetensors_tag(name)
    if tag is not None:
        assert safetensors.torch._getdtype(tag) == TORCH[name]
        assert dtypes.from_tag(tag) == name


@pytest.mark.parametrize("name", ["", "float", "torch.float32", "Float32", "qint8", "float31"])
def test_unknown_dtypes_are_named(name: str) -> None:
    assert not dtypes.is_known(name)
    for ask in (dtypes.itemsize, dtypes.safetensors_tag):
        with pytest.raises(IncompatibleState, match=repr(name)):
            ask(name)
    with pytest.raises(IncompatibleState, match=repr(name)):
        dtypes.from_tag(name)
    assert not dtypes.is_known(["float32"])
