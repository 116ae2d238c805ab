"""Deciding, on all ranks alike, whether to save at a step boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from distckpt import clock
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.manager.preempt import PreemptionWatch
from distckpt.manager.ranking import measured
from distckpt.manager.root import RunRoot, decode_metrics
from distckpt.manager.save_policy import (
    AnyOf,
    EverySeconds,
    EverySteps,
    MetricRange,
    Moment,
    OnPreemption,
    OnRequest,
    SavePolicy,
    metric_ranges,
)

CONTROL_POLL_S = 1.0
"""The leader looks for the control file at most this often."""


class Schedule:
    """Holds the policies and what they look at. A decision that depends on the step alone costs no communication.

    Any other (time, metrics, control file, signals) is the leader's: in one small round, every
    ``agree_every_steps`` steps, ranks report their signals and hear its decision. The leader's metrics count.
    """

    def __init__(self, config: CheckpointConfig, root: RunRoot, agreement: Agreement) -> None:
        self.config = config
        self.root = root
        self.agreement = agreement
        self.watch = PreemptionWatch(config.preemption_signals) if config.preemption_signals else None
        parts = _policies(config)
        self.policy = AnyOf(parts)
        self._by_step = AnyOf(tuple(p for p in parts if p.deterministic))
        self.preempted = False
        self._asked = config.control_file is not None or self.watch is not None or not self.policy.deterministic
        self._seen: dict[str, MetricRange] = {}
        self._saved: dict[str, MetricRange] = {}
        self._saved_before: dict[str, MetricRange] = {}
        self._last_saved: int | None = None
        self._last_time = clock.monotonic()
        self._next_poll = 0.0
        self._rounds = 0
        self._deadline: clock.Deadline | None = None

    def decide(self, step: int, epoch: float | None, metrics: Mapping[str, Any]) -> str | None:
        """Return why to save at this step, the same on all ranks, or None. Call it once a step on every rank."""
        if self._asked and (self.agreement.world_size == 1 or step % self.config.agree_every_steps == 0):
            reason = self._ask(step, epoch, metrics)
        else:
            reason = self._by_step(Moment(step=step, epoch=epoch))  # between agreements only the step may decide
        for name, value in metrics.items():
            self._seen[name] = self._seen.get(name, MetricRange()).include(value)
        return reason

    def is_best(self, metrics: Mapping[str, Any], key: str) -> bool:
        """Whether the leader's metric beats every checkpoint so far; a missing or NaN metric does not."""

        def decide(_: list[bytes]) -> bytes:
            mode = self.config.metric_mode
            value = measured(metrics.get(self.config.metric_name), mode)
            found = [
                measured(decode_metrics(m.metrics).get(self.config.metric_name), mode) for _, m in self.root.readable()
            ]
            others = [v for v in found if v is not None]
            if value is None:
                return b""
            return b"1" if all(value < v if mode == "min" else value > v for v in others) else b""

        return bool(self.agreement.round(key, b"", decide))

    def saved(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take note of a save."""
        self._saved_before = dict(self._saved)
        self._last_saved, self._last_time = step, clock.monotonic()
        for name, value in metrics.items():
            self._saved[name] = self._saved.get(name, MetricRange()).include(value)

    def failed(self) -> None:
        """Take back the metrics of the last save, which failed in the background: a threshold may fire again."""
        self._saved = self._saved_before

    @property
    def budget_s(self) -> float:
        """Seconds left of the preemption budget, the same on all ranks: counted from the earliest rank's signal."""
        return self.config.preemption_budget_s if self._deadline is None else max(1.0, self._deadline.left_s)

    def resumed(self, step: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Take over what the earlier jobs of this lineage saw and saved."""
        self._last_saved = step
        self._seen = metric_ranges(row["metrics"] for row in history)
        self._saved = metric_ranges(decode_metrics(m.metrics) for _, m in self.root.readable())

    def close(self) -> None:
        """Put signal handlers back."""
        if self.watch is not None:
            self.watch.close()

    def _ask(self, step: int, epoch: float | None, metrics: Mapping[str, Any]) -> str | None:
        self._rounds += 1
        notice = b""
        if self.watch is not None and self.watch.requested is not None:
            budget = self.watch.deadline(self.config.preemption_budget_s)
            notice = msgspec.json.encode([self.watch.requested, budget.left_s if budget is not None else 0.0])

        def decide(payloads: list[bytes]) -> bytes:
            signals = {rank: msgspec.json.decode(p) for rank, p in enumerate(payloads) if p}
            moment = Moment(
                step=step,
                epoch=epoch,
                seconds_since_save=clock.monotonic() - self._last_time,
                metrics=metrics,
                seen=self._seen,
                saved=self._saved,
                preempted=bool(signals),
                requested=self._requested(),
                last_saved_step=self._last_saved,
            )
            reason = self.policy(moment)
            if signals:
                first = min(signals)
                reason = f"preempted: {signals[first][0]} on rank {first}"
            return msgspec.json.encode([reason, min((left for _, left in signals.values()), default=None)])

        reason, left_s = msgspec.json.decode(self.agreement.round(f"step/{self._rounds}", notice, decide))
        self.preempted = left_s is not None
        self._deadline = None if left_s is None else clock.Deadline.after(left_s)
        return reason  # type: ignore[no-any-return]

    def _requested(self) -> bool:
        if self.config.control_file is None or clock.monotonic() < self._next_poll:
            return False
        self._next_poll = clock.monotonic() + CONTROL_POLL_S
        return self.root.take_request()


def _policies(config: CheckpointConfig) -> tuple[SavePolicy, ...]:
    parts: list[SavePolicy] = []
    if config.preemption_signals:
        parts.append(OnPreemption())
    if config.control_file is not None:
        parts.append(OnRequest())
    if config.save_every_steps is not None:
        parts.append(EverySteps(config.save_every_steps))
    if config.save_every_seconds is not None:
        parts.append(EverySeconds(config.save_every_seconds))
    if config.save_policy is not None:
        parts.append(config.save_policy)  # type: ignore[arg-type]
    return tuple(parts)
