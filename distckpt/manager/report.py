"""What to load, and what a load did."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distckpt.errors import ConfigError
from distckpt.manager.components import RNG


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load, and how sure to be. Patterns are shell-style, on names like ``model.layers.*`` or ``scheduler``."""

    load_optimizer: bool = True
    load_rng_state: bool = True
    strict: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    prove: bool = False
    cast: str = "exact"
    """Tensors stored in another dtype: ``exact`` converts where no bit is lost (bfloat16 to float32) and reports it,
    ``any`` also rounds, ``never`` raises."""

    def __post_init__(self) -> None:
        if self.cast not in ("exact", "any", "never"):
            raise ConfigError(f"cast={self.cast!r}: want 'exact', 'any' or 'never'")

    @property
    def everything(self) -> bool:
        """Whether patterns and switches let all tensors through."""
        return self.load_optimizer and self.include == ("*",) and not self.exclude

    def wants(self, name: str) -> bool:
        """Whether patterns and switches let this name through."""
        if not self.load_optimizer and name.split(".")[0] in ("optim", "scheduler", "scaler", "engine"):
            return False
        if not self.load_rng_state and name == RNG:
            return False
        included = self.include == ("*",) or any(fnmatch.fnmatchcase(name, p) for p in self.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in self.exclude)


@dataclass(slots=True)
class LoadReport:
    """What a load did. Names are FQNs; ``rederived`` and ``fallbacks`` are sentences."""

    path: str
    step: int
    generation: int
    epoch: int | float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    model_config: Any = None
    extra_state: Any = None
    saved_world_size: int = 0
    world_size: int = 0
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Live, but not in the checkpoint (or left out by a pattern's strictness)."""
    unexpected: list[str] = field(default_factory=list)
    """In the checkpoint, but not live."""
    skipped: list[str] = field(default_factory=list)
    """Left out because a pattern or switch says so."""
    cast: list[str] = field(default_factory=list)
    """Names whose dtype here is not the stored one."""
    rederived: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    """Newer checkpoints that could not be loaded, and why."""
    proved: int | None = None
    """Tensors compared with storage bit for bit, with ``prove=True``."""
    read_bytes: int = 0
    wanted_bytes: int = 0
    headers_read: int = 0
