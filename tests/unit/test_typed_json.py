"""Typed JSON: values come back exactly, with their types, their bits and the order of their keys."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.format import dtypes, typed_json
from distckpt.format.typed_json import Ref, canonical, decode, dumps, encode, loads, strict_loads


class Colour(enum.Enum):
    RED = 1
    ROUGE = 1  # noqa: PIE796 - an alias, on purpose
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


def same(first: Any, second: Any) -> bool:
    """Equal in type, value, bits and order, all the way down."""
    if type(first) is not type(second):
        return False
    if isinstance(first, float) and type(first) is float:
        return (math.isnan(first) and math.isnan(second)) or struct.pack("d", first) == struct.pack("d", second)
    if type(first) is complex:
        return same(first.real, second.real) and same(first.imag, second.imag)
    if isinstance(first, dict):
        factory = getattr(first, "default_factory", None) is getattr(second, "default_factory", None)
        return factory and same(list(first.items()), list(second.items()))
    if isinstance(first, collections.deque):
        return first.maxlen == second.maxlen and same(list(first), list(second))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, (set, frozenset)):
        return len(first) == len(second) and all(any(same(a, b) for b in second) for a in first)
    if isinstance(first, slice):
        return same((first.start, first.stop, first.step), (second.start, second.stop, second.step))
    if isinstance(first, np.ndarray):
        return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())
    if isinstance(first, np.generic):
        return bool(first.dtype == second.dtype and first.tobytes() == second.tobytes())
    if isinstance(first, torch.Tensor):
        return bool(first.dtype == second.dtype and first.shape == second.shape and bits(first) == bits(second))
    if isinstance(first, (datetime.datetime, datetime.time)):
        return bool(first.isoformat() == second.isoformat() and first.fold == second.fold)
    if isinstance(first, decimal.Decimal):
        return str(first) == str(second)
    return bool(first == second)


def bits(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg()
    if dense.element_size() == 1:
        dense = dense.view(torch.uint8)
    return bytes(dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def through(value: Any) -> Any:
    return loads(dumps(value))


text = st.text(st.characters(), max_size=8) | st.sampled_from(["$", "$int", "$tuple", "$dict", "\ud800", "a\udcff"])
number = st.integers() | st.integers(2**53 - 2, 2**53 + 2) | st.integers(-(2**70), 2**2000)
hashable = (
    st.none()
    | st.booleans()
    | number
    | st.floats()
    | text
    | st.binary(max_size=8)
    | st.complex_numbers()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.times()
    | st.dates()
    | st.timedeltas()
    | st.decimals().filter(lambda value: not value.is_snan())
    | st.fractions()
    | st.uuids()
    | st.sampled_from([Colour.RED, Colour.ROUGE, Colour.BLUE, Level.LOW, Access.READ, Access(3), Access(0)])
    | st.sampled_from([torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 0]), np.float32(1.5), range(1, 9, 3)])
    | st.sampled_from([pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:\\x"), pathlib.Path("x")])
    | st.sampled_from([Ref("model.weight"), Ref("$"), np.dtype(">f4")])
)
keys = hashable | st.tuples(hashable, st.tuples(hashable)) | st.frozensets(text, max_size=3)
values = st.recursive(
    hashable
    | st.just(decimal.Decimal("-sNaN12"))
    | st.binary(max_size=8).map(bytearray)
    | st.builds(slice, number, st.none(), number),
    lambda child: (
        st.lists(child, max_size=4)
        | st.lists(child, max_size=4).map(tuple)
        | st.dictionaries(keys, child, max_size=4)
        | st.dictionaries(text, child, max_size=4)
        | st.dictionaries(text, child, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(keys, child, max_size=4).map(lambda d: collections.defaultdict(list, d))
        | st.lists(child, max_size=3).map(lambda items: collections.deque(items, 5))
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(values)
def test_every_value_comes_back_exactly(value: Any) -> None:
    plain = encode(value)
    assert same(decode(plain), value)
    data = dumps(value)
    assert same(loads(data), value)
    # Any other writer of the same JSON, in whatever order, means the same.
    assert same(loads(json.dumps(plain).encode()), value)
    assert canonical(strict_loads(data, where="x", max_bytes=1 << 20)) == data


@given(st.sets(keys, max_size=6))
def test_sets_come_back_and_have_one_form(value: set[Any]) -> None:
    again = through(value)
    assert same(again, value)
    assert dumps(frozenset(again)) == dumps(frozenset(value))
    assert dumps(dict.fromkeys(sorted(value, key=repr)).keys() | set()) == dumps(value)


@given(st.dictionaries(text, st.integers(), max_size=6))
def test_dict_order_survives(value: dict[str, int]) -> None:
    assert list(through(value).items()) == list(value.items())
    backwards = dict(reversed(value.items()))
    assert list(through(backwards)) == list(backwards)


def test_ordinary_state_stays_readable() -> None:
    assert dumps({"epoch": 3, "lr": 0.1}) == b'{"epoch":3,"lr":0.1}'
    assert dumps({"lr": 0.1, "epoch": 3}) == b'{"$dict":[["lr",0.1],["epoch",3]]}'
    assert dumps({"$tensor": "x"}) == b'{"$dict":[["$tensor","x"]]}'
    assert dumps(Ref("x")) == b'{"$tensor":"x"}'
    assert dumps([True, 1, 1.0, -0.0, None, "é"]) == '[true,1,1.0,-0.0,null,"é"]'.encode()
    assert dumps(2**53 - 1) == b"9007199254740991"
    assert dumps(2**53) == b'{"$int":"0x20000000000000"}'


def test_bool_int_float_and_str_keys_stay_apart() -> None:
    for value in ({1: "a", "1": "b"}, {True: 1}, {1: True}, {1.0: 1}, {None: 0, "None": 1}, {(1, (2.0,)): 3}):
        assert same(through(value), value)


ARRAYS = [
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(10)[::3],
    np.array(3.5, dtype=np.float16),
    np.zeros((0, 3), np.complex64),
    np.array(["a", "ü\0b", ""]),
    np.array([b"a", b""]),
    np.array(["2020-01-01", "NaT"], dtype="M8[ns]"),
    np.array([1, 2], dtype="m8[25s]"),
    np.array([True, False]),
    np.array([], dtype="U"),
    np.array([np.nan, -0.0, np.inf]),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_numpy_arrays(value: Any) -> None:
    again = through({"a": value})["a"]
    assert same(again, value)
    assert again.flags.writeable


SCALARS = [
    *(np.dtype(code).type(1) for code in "?bBhHiIlLefdFD"),
    np.str_("a\0"),
    np.str_(""),
    np.bytes_(b"a\0"),
    np.datetime64("2020-01-01T00:00:00.5"),
    np.timedelta64(3, "D"),
    np.float64(-0.0),
]


@pytest.mark.parametrize("value", SCALARS, ids=repr)
def test_numpy_scalars(value: Any) -> None:
    again = through(value)
    assert type(again) is type(value)
    assert again.dtype == value.dtype
    if isinstance(value, (str, bytes)):
        assert len(again) == len(value)
        assert again == value
    else:
        assert again.tobytes() == value.tobytes()


@pytest.mark.parametrize("name", sorted(dtypes.ITEMSIZES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_tensors_of_every_dtype_keep_their_bits(name: str, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * dtypes.itemsize(name)
    octets = torch.randint(0, 2 if name == "bool" else 256, (max(count, 16),), dtype=torch.uint8)[:count]
    value = octets.view(getattr(torch, name)).reshape(shape)
    again = through([value])[0]
    assert same(again, value)
    assert again.is_contiguous()


def test_tensor_views_and_parameters() -> None:
    base = torch.randn(4, 6)
    complex_view = torch.view_as_complex(torch.randn(3, 2)).conj()
    for value in (base.t(), base[:, ::2], base[1:, 3], base.expand(2, 4, 6), complex_view, complex_view.imag):
        assert same(through(value), value)
    parameter = torch.nn.Parameter(base)
    again = through(parameter)
    assert type(again) is torch.Tensor
    assert not again.requires_grad
    assert bits(again) == bits(base)
    again += 1


def test_random_states_come_back() -> None:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    again = through(states)
    assert same(again, states)
    random.setstate(again["python"])
    np.random.set_state(again["numpy"])
    torch.set_rng_state(again["torch"])


def test_scheduler_and_counters_come_back() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    multi = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    for state in (
        schedule.state_dict(),
        multi.state_dict(),
        optimizer.state_dict(),
        collections.Counter("abca"),
    ):
        assert same(through(state), state)
    value = collections.defaultdict(None, {"b": 1, "a": 2})
    assert same(through(value), value)


def test_neither_numpy_nor_torch_is_imported_for_plain_values() -> None:
    """In a fresh interpreter: the offline tools must start at once."""
    program = (
        "import sys\n"
        "from distckpt.format import names, digest, dtypes, typed_json as t\n"
        "assert t.loads(t.dumps({'b': (1, 2), 'a': {3}})) == {'b': (1, 2), 'a': {3}}\n"
        "loaded = {'numpy', 'torch', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    folder = pathlib.Path(typed_json.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder)
    assert uuid.UUID(int=5) == through(uuid.UUID(int=5))
    assert fractions.Fraction(1, 3) == through(fractions.Fraction(1, 3))
