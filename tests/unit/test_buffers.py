"""Tensors as bytes: where they are if they lie in order, else as a copy that lives with its source."""

from __future__ import annotations

import gc

import pytest
import torch

from distckpt.dcp.buffers import HostBytes

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_elements_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    wanted = bytes(tensor.contiguous().view(torch.uint8).reshape(-1).tolist())
    source = HostBytes([tensor, tensor.t().contiguous().t(), tensor.t()[2:3]])
    assert bytes(source(0)) == bytes(source(1)) == wanted
    assert bytes(source(2)) == bytes(tensor[:, 2].contiguous().view(torch.uint8).tolist())


def test_what_lies_in_order_is_used_where_it_is_and_other_things_are_resolved() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    source = HostBytes([tensor, tensor.conj(), torch.zeros(0, 3), torch.tensor(7)])
    tensor[0] = 5
    assert torch.frombuffer(source(0), dtype=torch.complex64).tolist() == [5, 3 - 4j]
    assert torch.frombuffer(source(1), dtype=torch.complex64).tolist() == [1 - 2j, 3 + 4j]
    assert (len(source(2)), len(source(3))) == (0, 8)


def test_tensors_live_as_long_as_their_source() -> None:
    source = HostBytes([torch.full((1 << 20,), 3, dtype=torch.uint8)])
    gc.collect()
    torch.zeros(1 << 20, dtype=torch.uint8)  # would take the place of what was let go
    assert set(source(0)) == {3}
