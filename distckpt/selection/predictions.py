"""What a model said about every row: kept, so that statistics can be paired and nothing has to be run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distckpt.errors import ConfigError, CorruptCheckpoint, IncompatibleState

Array: TypeAlias = NDArray[Any]
_DTYPES: Final[dict[str, tuple[Any, int]]] = {
    "ids": (np.int64, 1),
    "labels": (np.int64, 1),
    "predicted": (np.int64, 1),
    "logits": (np.float32, 2),
    "probabilities": (np.float64, 2),
    "losses": (np.float64, 1),
    "terms": (np.int64, 1),
    "token_logprobs": (np.float32, 1),
    "content": (np.uint64, 1),
}
_TEXTS: Final = ("texts", "references", "classes")


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One entry per row in every field that is there, in the order of ``ids`` (positions in the data).

    ``labels``, ``predicted``: class numbers. ``logits`` or ``probabilities``: (rows, classes); either is enough.
    ``losses``: a row's summed loss in nats, over ``terms`` (tokens; one if that is absent). ``token_logprobs``: of each
    target token, rows one after the other (as many as ``terms`` says). ``texts``, ``references``: for BLEU.
    ``classes``: the classes' names. ``content``: digests of the rows, which ``evaluate_checkpoints`` fills in.
    Takes NumPy arrays, torch tensors on any device, and sequences; raises ``ConfigError`` where lengths disagree.
    """

    ids: Array
    labels: Array | None = None
    predicted: Array | None = None
    logits: Array | None = None
    probabilities: Array | None = None
    losses: Array | None = None
    terms: Array | None = None
    token_logprobs: Array | None = None
    texts: tuple[str, ...] | None = None
    references: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    content: Array | None = None

    def __post_init__(self) -> None:
        for name, (dtype, ndim) in _DTYPES.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _array(value, dtype, ndim, name))
        for name in _TEXTS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        self._check()

    def _check(self) -> None:
        wrong = [f"{name} has {size}" for name, size in self._sizes().items() if size != len(self)]
        if wrong:
            raise ConfigError(f"predictions of {len(self)} rows (ids): {', '.join(wrong)}; give one entry for each row")
        if len(np.unique(self.ids)) != len(self):
            raise ConfigError("predictions: an id stands twice; give each row once (merging drops duplicates)")
        if self.token_logprobs is not None and (
            self.terms is None or int(self.terms.sum()) != len(self.token_logprobs)
        ):
            raise ConfigError(
                "predictions: token_logprobs needs terms, each row's number of tokens, which add up to it"
            )
        for name in ("labels", "predicted"):
            found = getattr(self, name)
            if found is not None and len(found) and not 0 <= int(found.min()) <= int(found.max()) < self.class_count:
                raise ConfigError(
                    f"predictions: {name} from {found.min()} to {found.max()}, but there are {self.class_count} classes"
                )

    def _sizes(self) -> dict[str, int]:
        skipped = ("token_logprobs", "classes")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {name: len(value) for name, value in found.items() if value is not None}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def class_count(self) -> int:
        """How many classes there are: by their names, the scores, or the highest number."""
        if self.classes is not None:
            return len(self.classes)
        for scores in (self.logits, self.probabilities):
            if scores is not None:
                return int(scores.shape[1])
        numbers = [part for part in (self.labels, self.predicted) if part is not None and len(part)]
        return max((int(part.max()) + 1 for part in numbers), default=0)

    def class_names(self) -> tuple[str, ...]:
        """Return the classes' names; ``0``, ``1``, ... where none were given."""
        return self.classes if self.classes is not None else tuple(map(str, range(self.class_count)))

    def scores(self) -> Array | None:
        """Return the probabilities (rows, classes), float64; from the logits if those are there. None for neither."""
        if self.probabilities is not None or self.logits is None:
            return self.probabilities
        return np.exp(log_softmax(self.logits))

    def chosen(self) -> Array | None:
        """Return the predicted classes; the highest score, of equals the first, where none were given."""
        if self.predicted is not None:
            return self.predicted
        scores = self.logits if self.logits is not None else self.probabilities
        return None if scores is None else scores.argmax(axis=1)

    def row_losses(self) -> Array | None:
        """Return each row's loss in nats; from scores and labels where none were given."""
        if self.losses is not None:
            return self.losses
        if self.token_logprobs is not None and self.terms is not None:
            owner = np.repeat(np.arange(len(self)), self.terms)
            return np.bincount(owner, weights=-self.token_logprobs.astype(np.float64), minlength=len(self))
        if self.labels is None or (self.logits is None and self.probabilities is None):
            return None
        if self.logits is not None:
            logs = log_softmax(self.logits)
        else:
            assert self.probabilities is not None
            with np.errstate(divide="ignore"):
                logs = np.log(self.probabilities)
        picked: Array = -logs[np.arange(len(self)), self.labels]
        return picked

    def take(self, rows: Array, *, renumber: bool = False) -> Predictions:
        """Return these rows (positions here, not ids) in this order; ``renumber`` gives new ids, so rows may repeat."""
        tokens = self.token_logprobs
        if tokens is not None and self.terms is not None:
            ends = np.cumsum(self.terms)
            parts = [tokens[ends[row] - self.terms[row] : ends[row]] for row in rows]
            tokens = np.concatenate(parts) if parts else tokens[:0]
        found: dict[str, Any] = {"token_logprobs": tokens, "classes": self.classes}
        for name in _DTYPES:
            if name != "token_logprobs" and getattr(self, name) is not None:
                found[name] = getattr(self, name)[rows]
        for name in ("texts", "references"):
            if getattr(self, name) is not None:
                found[name] = [getattr(self, name)[row] for row in rows]
        return Predictions(**found | ({"ids": np.arange(len(rows))} if renumber else {}))

    # ------------------------------------------------------------ bytes

    def to_bytes(self) -> bytes:
        """Return a safetensors file; texts are UTF-8 bytes and their lengths."""
        from safetensors.numpy import save

        arrays = {name: getattr(self, name) for name in _DTYPES if getattr(self, name) is not None}
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None:
                parts = [text.encode("utf-8", "surrogatepass") for text in value]
                arrays[f"{name}.utf8"] = np.frombuffer(b"".join(parts), np.uint8)
                arrays[f"{name}.lengths"] = np.array([len(part) for part in parts], np.int64)
        return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Predictions:
        """Return what ``to_bytes`` gave; ``CorruptCheckpoint`` for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            found: dict[str, Any] = {name: arrays[name] for name in _DTYPES if name in arrays}
            for name in _TEXTS:
                if f"{name}.utf8" in arrays:
                    octets, ends = arrays[f"{name}.utf8"].tobytes(), np.cumsum(arrays[f"{name}.lengths"])
                    starts = ends - arrays[f"{name}.lengths"]
                    found[name] = [
                        octets[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)
                    ]
            return cls(**found)
        except (SafetensorError, ConfigError, KeyError, TypeError, ValueError) as cause:
            raise CorruptCheckpoint(f"{where}: not predictions as they were written: {cause}") from cause


def log_softmax(logits: Array) -> Array:
    """Return the natural logarithms of the softmax along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def merge(parts: Sequence[Predictions], rows: int) -> tuple[Predictions, int]:
    """Return the predictions of all ``rows`` rows in the order of their ids, and how many duplicates were dropped.

    Samplers repeat rows so that every rank has as many; the first part that has a row counts. Raises
    ``IncompatibleState`` where a row is missing, unknown, or parts have different fields.
    """
    kept = [part for part in parts if len(part)] or list(parts[:1])
    if not kept:
        raise IncompatibleState("no predictions to merge")
    shapes = {tuple(f.name for f in fields(part) if getattr(part, f.name) is not None) for part in kept}
    if len(shapes) > 1 or len({part.classes for part in kept}) > 1:
        raise IncompatibleState(f"ranks returned different fields or classes: {sorted(shapes)}")
    seen = np.zeros(rows, np.bool_)
    pieces = []
    for part in kept:
        foreign = part.ids[(part.ids < 0) | (part.ids >= rows)]
        if len(foreign):
            raise IncompatibleState(f"predictions of row {foreign[0]}, but the data has rows 0 to {rows - 1}")
        pieces.append(part.take(np.flatnonzero(~seen[part.ids])))
        seen[part.ids] = True
    missing = np.flatnonzero(~seen)
    if len(missing):
        raise IncompatibleState(
            f"predictions cover {rows - len(missing)} of {rows} rows; row {missing[0]} is missing: return every row given"
        )
    joined = _concatenate(pieces)
    return joined.take(np.argsort(joined.ids)), sum(map(len, kept)) - rows


def concatenated(a: Predictions, b: Predictions) -> Predictions:
    """Return the rows of a, then those of b, with new ids.

    Where they kept different things (one its logits, the other an ensemble's probabilities), both have what follows from
    either: chosen classes, probabilities, losses.
    """
    if _kept(a) != _kept(b):
        a, b = _derived(a), _derived(b)
        apart = dict.fromkeys(_kept(a) ^ _kept(b))
        a, b = replace(a, **apart), replace(b, **apart)  # type: ignore[arg-type]
    return _concatenate([a, b], renumber=True)


def _kept(one: Predictions) -> set[str]:
    return {f.name for f in fields(one) if getattr(one, f.name) is not None} - {"classes"}


def _derived(one: Predictions) -> Predictions:
    losses = None if one.token_logprobs is not None else one.row_losses()
    return replace(one, predicted=one.chosen(), probabilities=one.scores(), logits=None, losses=losses)


def _concatenate(parts: Sequence[Predictions], *, renumber: bool = False) -> Predictions:
    first = parts[0]
    found: dict[str, Any] = {}
    for name in _DTYPES:
        if getattr(first, name) is not None:
            found[name] = np.concatenate([getattr(part, name) for part in parts])
    for name in ("texts", "references"):
        if getattr(first, name) is not None:
            found[name] = [text for part in parts for text in getattr(part, name)]
    if renumber:
        found["ids"] = np.arange(len(found["ids"]))
    return Predictions(**found, classes=first.classes)


def _array(value: Any, dtype: Any, ndim: int, name: str) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.ndim != ndim or (array.size and array.dtype.kind not in "biuf"):
        raise ConfigError(
            f"predictions: {name} has shape {array.shape}, dtype {array.dtype}; want {ndim} axes of numbers"
        )
    rounded = array.dtype.kind == "f" and np.dtype(dtype).kind in "iu"
    if rounded and not np.array_equal(array, np.rint(array)):
        raise ConfigError(f"predictions: {name} has fractions; want whole numbers")
    return np.ascontiguousarray(array.astype(dtype))
