"""What runs a model over rows: the user's function, wrapped; the Hugging Face ones are in ``huggingface.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distckpt.errors import ConfigError
from distckpt.format.digest import digest
from distckpt.selection.data import Rows, import_object
from distckpt.selection.predictions import Predictions
from distckpt.selection.subjects import Subject

Outcome = Predictions | Mapping[str, Any]
"""One entry for each row, or (where the function alone can tell) finished metrics of all rows."""


@runtime_checkable
class Evaluator(Protocol):
    """Runs a model. ``version``: changes whenever results might; None: results are never reused."""

    @property
    def name(self) -> str:
        """What results are called after."""

    @property
    def version(self) -> str | None:
        """What results are found by."""

    def load(self, subject: Subject) -> Any:
        """Return the model of a checkpoint."""

    def evaluate(self, model: Any, rows: Rows) -> Outcome:
        """Return what the model says about these rows, under their ids.

        Finished metrics are only possible where one rank sees all rows: they cannot be merged.
        """


@dataclass(frozen=True, slots=True)
class FunctionEvaluator:
    """``function(model, rows)`` as an evaluator; the model is what ``build`` makes, without it the state dict.

    ``build(state_dict, config)`` returns a model; ``config`` is the ``model_config`` that ``save`` was given.
    """

    function: Callable[[Any, Rows], Outcome]
    build: Callable[[dict[str, Any], Any], Any] | None
    name: str
    version: str | None

    def load(self, subject: Subject) -> Any:
        """Return the built model, or the state dict."""
        weights = subject.state_dict()
        return weights if self.build is None else self.build(weights, subject.config)

    def evaluate(self, model: Any, rows: Rows) -> Outcome:
        """Call the function."""
        return self.function(model, rows)


def evaluator_of(
    evaluator: Evaluator | Callable[[Any, Rows], Outcome] | str,
    *,
    build: Callable[[dict[str, Any], Any], Any] | str | None = None,
    name: str | None = None,
    version: str | None = None,
) -> Evaluator:
    """Return an evaluator: one that is given, a function, or the import path of either.

    A function's version is by default the digest of the source file that it is in; that of a closure, a lambda's
    captured values or another file's code is not seen, so give ``version`` where those matter. Raises ``ConfigError``.
    """
    found: Any = import_object(evaluator) if isinstance(evaluator, str) else evaluator
    if isinstance(found, Evaluator) and not inspect.isclass(found):
        if build is not None:
            raise ConfigError(f"evaluator {found.name}: build= is for functions; this evaluator loads models itself")
        return found
    if not callable(found):
        raise ConfigError(
            f"evaluator {evaluator!r}: want a function of (model, rows), or an object with load and evaluate"
        )
    builder: Any = import_object(build) if isinstance(build, str) else build
    versions = [code_version(part) for part in (found, builder) if part is not None]
    if version is None and all(one is not None for one in versions):
        version = ".".join(map(str, versions))
    return FunctionEvaluator(found, builder, name or str(getattr(found, "__name__", "evaluator")), version)


def code_version(function: Any) -> str | None:
    """Return a version of a function: its ``version``, else the digest of its source file; None if there is none to tell.

    Closures, bound methods and callable objects depend on more than source, so they need a ``version`` attribute.
    """
    own = getattr(function, "version", None)
    if own is not None:
        return str(own)
    if not inspect.isfunction(function) or function.__closure__:
        return None
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return None
    return f"{function.__qualname__}-{digest(source)[:12]}"
