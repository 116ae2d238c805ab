"""How far each update moves an average: decays, their warm-ups, and EDM2's power-function profiles. Pure numbers.

``count`` is the number of optimizer steps that an average has taken in before this one: 0 at its first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from distckpt.errors import ConfigError, IncompatibleState


@runtime_checkable
class Warmup(Protocol):
    """An upper limit of the decay that rises with the count, so that a young average forgets its random start."""

    def limit(self, count: int) -> float:
        """Return the most that the decay may be at this count; in [0, 1)."""


@dataclass(frozen=True, slots=True)
class InverseGamma:
    """``1 - (1 + count / gamma) ** -power``, as in k-diffusion and ema-pytorch.

    With ``gamma=1``: power 2/3 reaches 0.999 after 31,600 steps and suits models trained for a million and more,
    power 3/4 reaches it after 10,000.
    """

    gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and self.power > 0):
            raise ConfigError(f"InverseGamma(gamma={self.gamma}, power={self.power}): both must be positive")

    def limit(self, count: int) -> float:
        """See ``Warmup.limit``; 0 at count 0, so the first update copies."""
        return 1.0 - math.pow(1.0 + count / self.gamma, -self.power)


@dataclass(frozen=True, slots=True)
class CountRatio:
    """``(1 + count) / (10 + count)``, as in TensorFlow's ExponentialMovingAverage and diffusers."""

    def limit(self, count: int) -> float:
        """See ``Warmup.limit``; 0.1 at count 0."""
        return (1.0 + count) / (10.0 + count)


@dataclass(frozen=True, slots=True)
class HalfLife:
    """A half-life of at most this fraction of the steps taken, as in EDM (``ema_rampup_ratio=0.05``)."""

    fraction: float = 0.05

    def __post_init__(self) -> None:
        if not self.fraction > 0:
            raise ConfigError(f"HalfLife(fraction={self.fraction}): want a positive number")

    def limit(self, count: int) -> float:
        """See ``Warmup.limit``; 0 at count 0, so the first update copies."""
        return math.pow(0.5, 1.0 / (self.fraction * count)) if count else 0.0


@dataclass(frozen=True, slots=True)
class Decay:
    """A constant decay in [0, 1), limited by a warm-up if there is one."""

    value: float
    warmup: Warmup | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not 0 <= self.value < 1:
            raise ConfigError(f"decay={self.value!r}: want a number in [0, 1), 0.999 to 0.9999 as a rule")
        if self.warmup is not None and not isinstance(self.warmup, tuple(WARMUPS.values())):
            raise ConfigError(f"warmup={self.warmup!r}: want one of {', '.join(WARMUPS)} of {__name__}")

    def at(self, count: int) -> float:
        """Return the decay of the update at this count."""
        return self.value if self.warmup is None else min(self.value, self.warmup.limit(count))


@dataclass(frozen=True, slots=True)
class PowerFunction:
    """A profile that weighs step t by ``t ** gamma``: its width is a fraction of the training behind it, at any length.

    ``sigma_rel`` is its standard deviation over its length, in (0, 1/sqrt(12)); 0.05 and 0.10 are EDM2's two (Karras et
    al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3).
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)

    @property
    def value(self) -> float:
        """What names it: the width."""
        return self.sigma_rel

    def at(self, count: int) -> float:
        """Return the decay of the update at this count; 0 at count 0, so the first update copies."""
        return math.pow(count / (count + 1.0), gamma_of(self.sigma_rel) + 1.0)


Schedule = Decay | PowerFunction
WARMUPS: dict[str, Any] = {kind.__name__: kind for kind in (InverseGamma, CountRatio, HalfLife)}


@lru_cache(maxsize=64)
def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a power-function profile from its relative width; ``ConfigError`` outside (0, 0.2886).

    Inverse of ``sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))``, by bisection: the right side falls
    for gamma >= 0, from 1/12.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ConfigError(
            f"sigma_rel={sigma_rel!r}: want a fraction of the training in (0, {12**-0.5:.4f}), such as 0.05"
        )
    low, high = 0.0, sigma_rel**-1 + 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if sigma_rel_of(middle) > sigma_rel:
            low = middle
        else:
            high = middle


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the profile ``t ** gamma``."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def describe(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as plain values, for a checkpoint."""
    if isinstance(schedule, PowerFunction):
        return {"sigma_rel": schedule.sigma_rel}
    warmup = schedule.warmup
    named = None if warmup is None else {"kind": type(warmup).__name__, **asdict(warmup)}  # type: ignore[call-overload]
    return {"decay": schedule.value, "warmup": named}


def parse(plain: Mapping[str, Any]) -> Schedule:
    """Inverse of ``describe``; ``IncompatibleState`` for what this version does not know."""
    try:
        if "sigma_rel" in plain:
            return PowerFunction(**plain)
        warmup = dict(plain["warmup"] or {})
        return Decay(plain["decay"], WARMUPS[warmup.pop("kind")](**warmup) if warmup else None)
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleState(
            f"this distckpt does not know the averaging schedule {dict(plain)!r} ({type(error).__name__}: {error})"
        ) from error


def text(schedule: Schedule) -> str:
    """Return a schedule for messages: ``decay 0.999, InverseGamma(gamma=1.0, power=0.75)``."""
    if isinstance(schedule, PowerFunction):
        return f"sigma_rel {schedule.sigma_rel}"
    return f"decay {schedule.value}" + (f", {schedule.warmup}" if schedule.warmup is not None else "")
