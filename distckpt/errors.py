"""One exception tree. Every message says what happened, where (file, FQN, rank) and what to do next."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def first_names(names: Sequence[str], most: int) -> str:
    """Return the first ``most`` names as text for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class DistckptError(Exception):
    """Base of every error that distckpt raises on purpose."""


class CheckpointNotFound(DistckptError):
    """No committed checkpoint where one was asked for."""


class CorruptCheckpoint(DistckptError):
    """Bytes on storage are not the bytes that were saved: damaged, truncated, swapped, missing or hostile."""


class ShardError(CorruptCheckpoint):
    """A shard file or its header is not what its manifest promises."""


class ManifestError(CorruptCheckpoint):
    """A manifest does not parse, does not match its digest, or contradicts itself."""


class UnsupportedVersion(DistckptError):
    """The checkpoint was written by a newer major version of the format."""


class IncompatibleState(DistckptError):
    """The live state and the saved state do not fit: names, shapes, dtypes, or layouts differ."""


class UnserializableState(DistckptError):
    """A value cannot be stored without pickle; the message names its key path and type."""


class ForbiddenPickle(DistckptError):
    """A pickled file names something that importing does not allow; the message says what, and nothing of it was run."""


class ReplicasDiffer(DistckptError):
    """State that is declared replicated is not the same on every rank."""


class SaveFailed(DistckptError):
    """A save was not committed; lists every failed rank with host and cause."""


class StaleGeneration(SaveFailed):
    """A newer job owns this root; this job may no longer commit."""


class SnapshotFailed(SaveFailed):
    """The copy that a save was to write is not one moment's state: it broke off, or what it copies was changed."""


class CommitInDoubt(SaveFailed):
    """Whether the commit took place could not be found out in time; the next start resolves it."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What one rank raised: the exception's class name and text, and where it ran."""

    rank: int
    host: str
    kind: str
    message: str


class AgreementError(DistckptError):
    """Ranks did not reach a common verdict: a rank failed or is missing.

    ``failures`` lists the ranks that raised, first cause first; ``missing`` the ranks that were not heard
    from. ``in_doubt``: the verdict may have been taken without this rank learning it, so storage has to
    be asked.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str = "",
        failures: tuple[RankFailure, ...] = (),
        missing: tuple[int, ...] = (),
        in_doubt: bool = False,
    ) -> None:
        super().__init__(message)
        self.key = key
        self.failures = failures
        self.missing = missing
        self.in_doubt = in_doubt


class AgreementTimeout(AgreementError):
    """A rank was not heard from before the deadline; the message names it."""


class LayoutChanged(SaveFailed):
    """Some ranks' tensors changed since the cached plan; the next save plans afresh."""


class ConfigError(DistckptError, ValueError):
    """A setting is wrong; the message names the setting, the value and what is allowed."""


class ExportRefused(DistckptError):
    """An export failed a check, so nothing was published; ``checks`` has every answer, those that passed too."""

    def __init__(self, message: str, checks: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.checks = checks


class StoreError(DistckptError, OSError):
    """Storage refused an operation; the message names the operation and the path."""


class NotFound(StoreError):
    """The name does not exist on the store."""


class AlreadyExists(StoreError):
    """The name exists on the store and is never replaced."""


class MissingExtra(DistckptError, ImportError):
    """An optional library is not there; the message names the extra that brings it."""


def optional(module: str, extra: str) -> Any:
    """Import and return a library that only an extra of this package asks for; ``MissingExtra`` if that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise MissingExtra(f"{module} cannot be imported ({cause}): pip install 'distckpt[{extra}]'") from cause
