"""Every metric of a run, step by step: in memory, and handed to storage with each save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distckpt import clock


class MetricsHistory:
    """Rows of ``step``, ``epoch``, ``time``, ``metrics``, oldest first; those not yet on storage are pending."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []

    def record(self, step: int, metrics: dict[str, Any], epoch: float | None) -> None:
        """Add a row, unless it says what the last one does (``step`` and then ``save`` at the same step)."""
        last = self.rows[-1] if self.rows else None
        if not metrics or (last is not None and (last["step"], last["metrics"]) == (step, metrics)):
            return
        row = {"step": step, "epoch": epoch, "time": clock.now(), "metrics": metrics}
        self.rows.append(row)
        self._pending.append(row)

    def take(self) -> list[dict[str, Any]]:
        """Return the pending rows; they are the caller's to store now."""
        rows, self._pending = self._pending, []
        return rows

    def put_back(self, rows: Sequence[dict[str, Any]]) -> None:
        """Make rows pending again that could not be stored; safe while another thread records."""
        self._pending[:0] = rows

    def continue_from(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace everything by what storage has of the line that is gone on with."""
        self.rows, self._pending = list(rows), []

    def by_metric(self) -> dict[str, list[Any]]:
        """Return each metric's values in order."""
        out: dict[str, list[Any]] = {}
        for row in self.rows:
            for name, value in row["metrics"].items():
                out.setdefault(name, []).append(value)
        return out
