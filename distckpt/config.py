"""Every knob in one place, checked when it is set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from distckpt.errors import ConfigError

DEFAULT_THREADS = max(12, min(32, 2 * (os.cpu_count() or 1)))


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Settings of one ``CheckpointManager``. Raises ``ConfigError`` (a ``ValueError``) for values that make no sense."""

    checkpoint_dir: str | os.PathLike[str]
    """Root of a run's checkpoints: a folder that all ranks see, ``s3://``, ``gs://`` or ``az://`` with bucket and prefix
    (docs/storage.md), or ``memory://name`` in tests."""
    save_total_limit: int | None = 5
    """How many of the newest checkpoints to keep; None keeps all. The best, pinned ones, what the run resumed from and
    the last two stay in any case (1 is allowed, and warned about)."""
    save_best_only: bool = False
    """Save only where the metric is better than in every checkpoint before."""
    metric_name: str = "loss"
    """Metric that "best" is about."""
    metric_mode: str = "min"
    """``min`` or ``max``."""
    tie_breaks: Sequence[tuple[str, str] | str] = ("earliest",)
    """What decides between equal metrics: (metric, mode) pairs in order, then ``earliest`` or ``latest``."""
    save_optimizer: bool = True
    """Store optimizer state and param groups."""
    save_rng_state: bool = True
    """Store every rank's RNG states."""
    async_save: bool = False
    """Return once the state is copied; write and commit on a background thread."""
    lazy_staging: bool = False
    """With ``async_save``: return before the state is copied; optimizer steps wait until it is (docs/async.md)."""
    background_threads: int = 4
    """I/O threads of a background save, if fewer than ``threads``: it must not take the CPUs that training needs."""
    background_nice: int = 5
    """How much lower the scheduling priority of a background save's threads is (Linux: added to their nice value)."""
    on_busy: str = "wait"
    """A save while another is in flight: ``wait`` for it, ``skip`` this one (returns None), or ``raise``."""
    mode: str = "sharded"
    """``sharded``: each rank writes its own boxes. ``full``: tensors are gathered one by one and rank 0 writes."""
    save_every_steps: int | None = None
    """``manager.step`` saves at multiples of this."""
    save_every_seconds: float | None = None
    """``manager.step`` saves when this long has passed since the last save."""
    save_policy: Callable[[Any], str | None] | None = None
    """Any policy of ``distckpt.manager.save_policy``, in addition to the two above."""
    keep_policy: Callable[[Any], Any] | None = None
    """Any policy of ``distckpt.manager.keep_policy``; replaces ``save_total_limit``."""
    per_rank: Sequence[str] = ()
    """Names of ``stateful`` entries whose state differs between ranks: each rank gets its own back."""
    drop_on_resize: Sequence[str] = ()
    """Like ``per_rank``, for state that means nothing on another world size and is then left as it is."""
    incremental: bool = False
    """Refer to what the checkpoint before holds already, block by block, instead of writing it again: for frozen
    weights, LoRA, and embeddings of which few rows change."""
    block_bytes: int = 256 << 10
    """Bytes that one digest covers, 4 KiB to 8 MiB: the unit of checking, and of an incremental save. Rows that change here
    and there in an embedding need one as small as a row."""
    start_fresh: bool = False
    """Start a new lineage where checkpoints exist: nothing older is ever resumed from again."""
    strict: bool = True
    """A load raises if any name is missing or unexpected."""
    threads: int = DEFAULT_THREADS
    """I/O threads of this rank."""
    share_loads: str = "auto"
    """Ranks that want the same bytes (DDP, HSDP) read each once and exchange them: ``auto`` (where the measured speeds of
    storage and link make that faster), ``always``, ``never``."""
    timeout_s: float = 1800.0
    """Deadline of one save or load, waiting for other ranks included."""
    retries: int = 1
    """How often a failed save is tried again at once, from the same copy."""
    max_consecutive_failures: int = 3
    """Failed saves in a row that only warn; the next one raises. 0 raises at the first."""
    preemption_signals: Sequence[str] = ("SIGTERM", "SIGUSR1")
    """Signals that lead to one agreed save at the next step boundary, and to ``Preempted``; empty: none."""
    preemption_budget_s: float = 120.0
    """Seconds from the signal within which that save must be committed."""
    control_file: str | None = "SAVE_NOW"
    """Creating this file under the root asks a running job for a save; it is removed when the job takes it."""
    agree_every_steps: int = 1
    """How often ``manager.step`` asks other ranks, where a decision needs it (time, metrics, signals, control file)."""
    orphan_grace_s: float = 86400.0
    """Leftovers of failed saves are removed when older than this and of an earlier job."""
    verbose: bool = True
    """Show progress bars and the resume table on rank 0, if standard error is a terminal."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything that you want stored in every manifest's provenance."""

    def __post_init__(self) -> None:
        if not str(self.checkpoint_dir):
            raise ConfigError("checkpoint_dir is empty: name a folder or a URL")
        _choice("metric_mode", self.metric_mode, ("min", "max"))
        _choice("on_busy", self.on_busy, ("wait", "skip", "raise"))
        _choice("mode", self.mode, ("sharded", "full"))
        _choice("share_loads", self.share_loads, ("auto", "always", "never"))
        for name in ("save_total_limit", "save_every_steps", "save_every_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value!r}: want a positive number, or None")
        for name in ("threads", "background_threads", "timeout_s", "agree_every_steps", "preemption_budget_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: want a positive number")
        for name in ("retries", "max_consecutive_failures", "orphan_grace_s", "background_nice"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: want zero or more")
        for name in ("per_rank", "drop_on_resize", "preemption_signals"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r}: want a sequence of names, not one string")
        if not 4096 <= self.block_bytes <= 8 << 20 or self.block_bytes % 4096:
            raise ConfigError(f"block_bytes={self.block_bytes!r}: want a multiple of 4096 up to {8 << 20}")
        if self.mode == "full" and self.incremental:
            raise ConfigError(
                "mode='full' makes files that hold whole tensors, for readers without distckpt: incremental=True, which "
                "leaves out what earlier files have, needs mode='sharded'"
            )
        if self.mode == "full" and self.async_save:
            raise ConfigError(
                "mode='full' gathers tensors on the training thread: async_save=True needs mode='sharded'"
            )
        if self.lazy_staging and not self.async_save:
            raise ConfigError("lazy_staging=True copies the state in the background: it needs async_save=True")
        both = set(self.per_rank) & set(self.drop_on_resize)
        if both:
            raise ConfigError(f"{sorted(both)} are in per_rank and in drop_on_resize: choose one")

    def public(self) -> dict[str, Any]:
        """Return the settings that are plain values, for provenance; never the root, which may carry secrets."""
        plain = (str, int, float, bool, type(None))
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "checkpoint_dir" and isinstance(getattr(self, f.name), plain)
        }


@dataclass(frozen=True, slots=True)
class ObjectStoreConfig:
    """How object stores are talked to, for the whole process; set by the environment, see ``from_env``."""

    deadline_s: float = 120.0
    """Seconds after which a request, its repetitions included, has answered or failed. Uploads of a shard are many
    requests; each has a quarter of this, so a slow network needs more."""
    part_bytes: int = 8 << 20
    """Size of one part of an upload and of one ranged read, 5 MiB or more (S3 takes no smaller parts)."""
    in_flight: int = 12
    """Parts of one shard that are under way at once; each holds its bytes in memory."""

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s={self.deadline_s!r}: want a positive number of seconds")
        if self.part_bytes < 5 << 20:
            raise ConfigError(
                f"part_bytes={self.part_bytes!r}: want 5 MiB (5242880) or more, S3 takes no smaller parts"
            )
        if self.in_flight < 1:
            raise ConfigError(f"in_flight={self.in_flight!r}: want 1 or more")

    @classmethod
    def from_env(cls) -> ObjectStoreConfig:
        """Read ``DISTCKPT_STORE_DEADLINE_S``, ``DISTCKPT_STORE_PART_MIB`` and ``DISTCKPT_STORE_IN_FLIGHT``."""
        given: dict[str, Any] = {}
        for field_name, variable, scale in (
            ("deadline_s", "DISTCKPT_STORE_DEADLINE_S", 1.0),
            ("part_bytes", "DISTCKPT_STORE_PART_MIB", 1 << 20),
            ("in_flight", "DISTCKPT_STORE_IN_FLIGHT", 1),
        ):
            text = os.environ.get(variable)
            if text:
                try:
                    given[field_name] = type(scale)(text) * scale
                except ValueError:
                    raise ConfigError(f"{variable}={text!r}: want a number") from None
        return cls(**given)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: want one of {', '.join(map(repr, allowed))}")
