"""Typed JSON refuses at save time, by key path and type, what it could not give back."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from distckpt.errors import UnserializableState
from distckpt.format.typed_json import Ref, dumps, encode, loads


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class StrictDict(dict[str, int]):
    pass


def local_enum_member() -> enum.Enum:
    class Local(enum.Enum):
        A = 1

    return Local.A


def refusal(value: Any) -> str:
    with pytest.raises(UnserializableState) as caught:
        encode({"optim": {"foo": [0, 1, 2, value]}})
    message = str(caught.value)
    assert message.startswith("$.optim.foo[3]"), message
    return message


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "builtins.object"),
        (lambda: 0, "builtins.function"),
        (print, "builtin_function_or_method"),
        (int, "builtins.type"),
        (Point(1), "Point"),
        (Settings(), "Settings"),
        (StrictDict(a=1), "StrictDict"),
        (type("Name", (str,), {})("a"), "Name"),
        (type("Count", (int,), {})(1), "Count"),
        (type("Rows", (list,), {})(), "Rows"),
        (type("Subclass", (torch.Tensor,), {})(), "Subclass"),
        (type("Stamp", (datetime.datetime,), {})(2020, 1, 1), "Stamp"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.Generator(), "Generator"),
        (torch.max(torch.ones(1, 1), 0), "max"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty((1 << 18) + 1), "register it as a tensor"),
        (np.zeros((1 << 20) + 1, np.uint8), "register it as a tensor"),
        (np.array([object()]), "object"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.zeros(2, [("a", "f4")])[0], "dtype"),
        (np.longdouble(1), "dtype"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (memoryview(b"a"), "memoryview"),
        (collections.defaultdict(lambda: 0), "factory"),
        (datetime.datetime(2020, 1, 1, tzinfo=type("Zone", (datetime.tzinfo,), {})()), "Zone"),
        (local_enum_member(), "Local"),
        (iter([]), "list_iterator"),
        ({torch.ones(1): 1}, "tensor as a key"),
        ({torch.ones(1)}, "tensor as a key"),
        ({"deep": object()}, ".deep: "),
        ({4: object()}, "[4]: "),
        ({"a b": object()}, "['a b']: "),
        ((1, object()), "[3][1]: "),
        ({object()}, "{...}: "),
        (1 << (1 << 23), "bits"),
        (Ref(""), "name"),
        (..., "ellipsis"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_needs_pickle_is_refused_by_path_and_type(value: Any, name: str) -> None:
    assert name in refusal(value)


def test_cycles_and_depth_are_refused_not_crashed_into() -> None:
    row: list[Any] = []
    row.append({"again": (row,)})
    assert "contains itself" in _fails(row)
    table: dict[str, Any] = {}
    table["self"] = table
    assert "$.self" in _fails(table)
    queue: collections.deque[Any] = collections.deque()
    queue.append([queue])
    assert "contains itself" in _fails(queue)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    assert "nested" in _fails(deep)
    while deep:
        deep = deep[0]


def test_shared_parts_are_no_cycle_but_can_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    part: list[Any] = [1]
    assert loads(dumps([part, part, (part,)])) == [[1], [1], ([1],)]
    monkeypatch.setattr("distckpt.format.typed_encode.MAX_VALUES", 1000)
    for _ in range(60):
        part = [part, part]
    assert "more than" in _fails(part)


def _fails(value: Any) -> str:
    with pytest.raises(UnserializableState) as caught:
        encode(value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {1: v}, lambda v: {"a": v}])
def test_whatever_is_written_can_be_read(wrap: Any) -> None:
    value: Any = 0
    for _ in range(300):
        try:
            data = dumps(value)
        except UnserializableState:
            break
        assert dumps(loads(data)) == data
        value = wrap(value)
    else:
        pytest.fail("no limit on depth")
