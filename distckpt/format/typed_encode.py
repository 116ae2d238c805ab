"""Typed JSON, the writing half: containers, limits and the key path in every refusal.

Each container notes how many levels of JSON its tag adds, so that what is written can be read within the
limit.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final

from distckpt.errors import UnserializableState
from distckpt.format import typed_arrays, typed_leaves
from distckpt.format.plain_json import canonical
from distckpt.format.typed_leaves import Refused, is_plain_text

MAX_DEPTH: Final = 180
"""Deepest nesting of the written JSON: ``plain_json.MAX_DEPTH`` less the frame that a manifest adds."""

MAX_VALUES: Final = 4_000_000
"""Most values in one call: a graph that shares its nodes can have 2**60 paths and no cycle."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """A leaf that stands for the tensor stored under ``name`` elsewhere in the checkpoint."""

    name: str


_HINTS: Final[tuple[tuple[Callable[[Any], bool], str], ...]] = (
    (dataclasses.is_dataclass, "store dataclasses.asdict(it)"),
    (lambda value: isinstance(value, tuple) and hasattr(value, "_asdict"), "store it._asdict() or tuple(it)"),
    (lambda value: isinstance(value, (dict, list, set, frozenset, tuple)), "convert it to its builtin base"),
    (lambda value: isinstance(value, (str, int, float, bytes)), "convert it to its builtin base"),
    (callable, "code is not state: store its name"),
    (lambda value: hasattr(value, "state_dict"), "store its state_dict()"),
)


def advice(value: Any) -> str:
    """Say what to store instead of a value that has no form of its own."""
    return next((hint for fits, hint in _HINTS if fits(value)), "store plain values, arrays or tensors of it")


def key_path(where: str, key: Any) -> str:
    """Return the path of a dict's item for messages: ``$.optim``, ``$[3]``; odd keys are not shown."""
    if type(key) is str and key.isidentifier() and len(key) < 200:
        return f"{where}.{key}"
    return f"{where}[{key!r:.200}]" if type(key) in (str, int, float, bool, type(None)) else f"{where}[<key>]"


class Encoder:
    """One call of ``encode``: how many values were seen, and which containers are being written."""

    def __init__(self) -> None:
        self.count = 0
        self.open: set[int] = set()

    def value(self, value: Any, where: str, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH:
            raise UnserializableState(f"{where}: nested deeper than {MAX_DEPTH} levels of JSON; flatten it")
        if self.count > MAX_VALUES:
            raise UnserializableState(f"{where}: more than {MAX_VALUES} values; store big data as tensors")
        kind = type(value)
        if value is None or kind is bool:
            return value
        try:
            if kind is int:
                return typed_leaves.integer(value)
            if kind is float:
                return typed_leaves.real(value)
            if kind is str:
                return typed_leaves.text(value)
            if kind in _CONTAINERS:
                return self.container(value, where, depth)
            return self.leaf(value, where)
        except Refused as cause:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise UnserializableState(f"{where}: a {name} can't be stored without pickle: {cause}") from None

    def container(self, value: Any, where: str, depth: int) -> Any:
        if id(value) in self.open:
            raise UnserializableState(f"{where}: a {type(value).__qualname__} that contains itself can't be stored")
        self.open.add(id(value))
        try:
            return _CONTAINERS[type(value)](self, value, where, depth)
        finally:
            self.open.discard(id(value))

    def leaf(self, value: Any, where: str) -> Any:
        if isinstance(value, enum.Enum):
            return {"$enum": typed_leaves.write_enum(value)}
        row = typed_leaves.WRITERS.get(type(value))
        if row is not None:
            return {row[0]: row[1](value)}
        if type(value) is Ref:
            if type(value.name) is not str or not value.name or not is_plain_text(value.name):
                raise Refused(f"{value.name!r:.200} is not a tensor's name")
            return {"$tensor": value.name}
        written = typed_arrays.write(value)
        if written is None:
            raise Refused(advice(value))
        return written

    def items(self, values: Iterable[Any], where: str, depth: int) -> list[Any]:
        return [self.value(item, f"{where}[{index}]", depth) for index, item in enumerate(values)]

    def tuple_(self, value: tuple[Any, ...], where: str, depth: int) -> Any:
        return {"$tuple": self.items(value, where, depth + 2)}

    def list_(self, value: list[Any], where: str, depth: int) -> Any:
        return self.items(value, where, depth + 1)

    def set_(self, value: set[Any] | frozenset[Any], where: str, depth: int) -> Any:
        # Sets have no order of their own; a canonical one makes equal sets equal bytes on every rank.
        written = [self.key(item, f"{where}{{...}}", depth + 2) for item in value]
        return {f"${type(value).__name__}": sorted(written, key=canonical)}

    def slice_(self, value: slice, where: str, depth: int) -> Any:
        return {"$slice": self.items((value.start, value.stop, value.step), where, depth + 2)}

    def deque(self, value: collections.deque[Any], where: str, depth: int) -> Any:
        return {"$deque": [value.maxlen, self.items(value, where, depth + 3)]}

    def key(self, key: Any, where: str, depth: int) -> Any:
        """Write a dict key or an item of a set. Not a tensor: its hash is its identity, which no copy has."""
        if hasattr(key, "untyped_storage"):
            raise UnserializableState(f"{where}: a tensor as a key or in a set can't be stored; use a name")
        return self.value(key, where, depth)

    def pairs(self, value: dict[Any, Any], where: str, depth: int) -> list[Any]:
        return [
            [self.key(key, f"{where}<key>", depth + 2), self.value(item, key_path(where, key), depth + 2)]
            for key, item in value.items()
        ]

    def dict_(self, value: dict[Any, Any], where: str, depth: int) -> Any:
        keys = list(value)
        plain = all(type(key) is str and not key.startswith("$") and is_plain_text(key) for key in keys)
        if plain and all(first < second for first, second in itertools.pairwise(keys)):
            return {key: self.value(item, key_path(where, key), depth + 1) for key, item in value.items()}
        return {"$dict": self.pairs(value, where, depth + 1)}

    def ordered(self, value: dict[Any, Any], where: str, depth: int) -> Any:
        return {f"${type(value).__name__}": self.pairs(value, where, depth + 1)}

    def defaultdict(self, value: collections.defaultdict[Any, Any], where: str, depth: int) -> Any:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and typed_leaves.FACTORIES.get(name) is not factory:
            allowed = ", ".join(sorted(typed_leaves.FACTORIES))
            raise Refused(f"its factory {factory!r:.100} is not None or one of {allowed}; store dict(it)")
        return {"$defaultdict": [name, self.pairs(value, where, depth + 2)]}


_CONTAINERS: Final[dict[type, Callable[[Encoder, Any, str, int], Any]]] = {
    list: Encoder.list_,
    tuple: Encoder.tuple_,
    dict: Encoder.dict_,
    set: Encoder.set_,
    frozenset: Encoder.set_,
    slice: Encoder.slice_,
    collections.deque: Encoder.deque,
    collections.OrderedDict: Encoder.ordered,
    collections.Counter: Encoder.ordered,
    collections.defaultdict: Encoder.defaultdict,
}
