"""What an export found and made: frozen values, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

Status = Literal["pass", "fail", "warn", "skip"]
VERSION: Final = 1
FORMAT: Final = "distckpt export"


@dataclass(frozen=True, slots=True)
class Check:
    """One question with its answer. ``evidence``: a sentence with the numbers; ``values``: the numbers themselves.

    ``warn``: true, but the reader should know; ``skip``: could not be asked, the evidence says why.
    """

    name: str
    status: Status
    evidence: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of the model. ``shape``: numbers, and names of axes that may have any length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall-clock of one batch in milliseconds. ``peak_bytes``: memory above what was in use before, None if not known."""

    model: str
    rows: int
    shape: str
    runs: int
    p50_ms: float
    p95_ms: float
    rows_per_s: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes before and after. ``kept``: of the tensors exported, as stored; ``left_out``: the rest of the checkpoint."""

    original: int
    exported: int
    kept: int
    left_out: int

    @property
    def reduction(self) -> float:
        """Share of the original that is gone, 0 to 1; negative where the export is larger."""
        return 1 - self.exported / self.original if self.original else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """An export that passed every check. ``files``: by name below ``path``, with bytes and sha256."""

    path: str
    format: str
    version: str
    created: str
    files: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, Any]
    content: str
    dtype: str
    tensors: int
    parameters: int
    sizes: Sizes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    checks: tuple[Check, ...]
    checklist: tuple[Check, ...]
    latency: tuple[Latency, ...]
    metrics: Mapping[str, Mapping[str, float | None]]
    data: Mapping[str, Any] | None
    baseline: Mapping[str, Any]
    software: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; always true of what was published."""
        return not failed(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, as ``export.json`` holds it."""
        body = plain(self)
        body["sizes"]["reduction"] = self.sizes.reduction
        return {"kind": FORMAT, "version_of_format": VERSION, **body}


def failed(checks: tuple[Check, ...] | list[Check]) -> list[Check]:
    """Return the checks that failed."""
    return [check for check in checks if check.status == "fail"]


def plain(value: Any) -> Any:
    """Return frozen values as JSON can hold them; NaN and infinities become text."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
