"""Typed JSON, the reading half: containers. Whatever it is given, it returns a value or raises ``error``."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Final

from distckpt.errors import DistckptError
from distckpt.format import typed_arrays, typed_leaves
from distckpt.format.typed_encode import Ref, key_path
from distckpt.format.typed_leaves import expect, expect_list


class Decoder:
    """One call of ``decode``; errors of payloads become ``error`` at the path of their tag."""

    def __init__(self, error: type[DistckptError]) -> None:
        self.error = error

    def value(self, jsonable: Any, where: str) -> Any:
        kind = type(jsonable)
        if jsonable is None or kind in (bool, int, float, str):
            return jsonable
        if kind is list:
            return self.items(jsonable, where)
        if kind is not dict:
            raise self.error(f"{where}: a {kind.__qualname__} is not JSON")
        if any(type(key) is not str for key in jsonable):
            raise self.error(f"{where}: an object has a key that is not a string")
        if any(key.startswith("$") for key in jsonable):
            return self.tagged(jsonable, where)
        # Only dicts in sorted order are written as objects, whatever order a rewriter of the file left.
        return {key: self.value(jsonable[key], key_path(where, key)) for key in sorted(jsonable)}

    def tagged(self, jsonable: dict[str, Any], where: str) -> Any:
        if len(jsonable) != 1:
            raise self.error(f"{where}: an object with a key that starts with $ must have no other key")
        ((tag, payload),) = jsonable.items()
        try:
            builder = _BUILDERS.get(tag)
            if builder is not None:
                return builder(self, payload, where)
            reader = typed_leaves.READERS.get(tag) or typed_arrays.READERS.get(tag)
            if reader is not None:
                return reader(payload)
        except (ValueError, TypeError, OverflowError, ArithmeticError) as cause:
            raise self.error(f"{where}: {tag}: {cause}") from cause
        raise self.error(f"{where}: unknown tag {tag[:60]!r}; it is damaged or needs a newer distckpt")

    def items(self, payload: Any, where: str) -> list[Any]:
        expect(payload, list, "items")
        return [self.value(item, f"{where}[{index}]") for index, item in enumerate(payload)]

    def set_(self, payload: Any, where: str) -> set[Any]:
        members = self.items(payload, where)
        found = set(members)
        if len(found) != len(members):
            raise ValueError("an item stands twice")
        return found

    def pairs(self, payload: Any, where: str) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        for pair in expect(payload, list, "pairs"):
            key, item = expect_list(pair, 2)
            restored = self.value(key, f"{where}<key>")
            found.append((restored, self.value(item, key_path(where, restored))))
        if len(dict(found)) != len(found):
            raise ValueError("a key stands twice")
        return found

    def counter(self, payload: Any, where: str) -> collections.Counter[Any]:
        found: collections.Counter[Any] = collections.Counter()
        # ``Counter(pairs)`` would count the pairs.
        dict.update(found, self.pairs(payload, where))
        return found

    def defaultdict(self, payload: Any, where: str) -> collections.defaultdict[Any, Any]:
        name, pairs = expect_list(payload, 2)
        if name is not None and (type(name) is not str or name not in typed_leaves.FACTORIES):
            raise ValueError(f"unknown factory {name!r:.100}")
        factory = None if name is None else typed_leaves.FACTORIES[name]
        return collections.defaultdict(factory, self.pairs(pairs, where))

    def deque(self, payload: Any, where: str) -> collections.deque[Any]:
        maxlen, items = expect_list(payload, 2)
        if maxlen is not None and (type(maxlen) is not int or maxlen < len(expect(items, list, "items"))):
            raise ValueError("maxlen must be None or an int no smaller than the number of items")
        return collections.deque(self.items(items, where), maxlen)

    def tensor(self, payload: Any, where: str) -> Ref:
        if not expect(payload, str, "a tensor's name"):
            raise ValueError("a tensor's name is empty")
        return Ref(payload)


_BUILDERS: Final[dict[str, Callable[[Decoder, Any, str], Any]]] = {
    "$tuple": lambda self, payload, where: tuple(self.items(payload, where)),
    "$set": Decoder.set_,
    "$frozenset": lambda self, payload, where: frozenset(self.set_(payload, where)),
    "$dict": lambda self, payload, where: dict(self.pairs(payload, where)),
    "$OrderedDict": lambda self, payload, where: collections.OrderedDict(self.pairs(payload, where)),
    "$Counter": Decoder.counter,
    "$defaultdict": Decoder.defaultdict,
    "$deque": Decoder.deque,
    "$slice": lambda self, payload, where: slice(*self.items(expect_list(payload, 3), where)),
    "$tensor": Decoder.tensor,
}
