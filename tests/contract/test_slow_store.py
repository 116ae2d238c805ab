"""Latency is hidden, not paid per tensor: requests and requests under way are counted behind a slow network."""

from __future__ import annotations

import pytest
import torch
from store_contract import StoreContract

from benchmarks.slow_store import Slowness, SlowStore
from distckpt import CheckpointConfig, CheckpointManager
from distckpt.format.checkpoint import Checkpoint
from distckpt.format.lineage import list_committed, read_manifest
from distckpt.format.verify import verify
from distckpt.storage import MemoryStore, Store

NETWORK = Slowness(latency_s=(0.015, 0.03), bytes_per_s=2e9, straggler_factor=5.0)


class TestSlowStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return SlowStore(MemoryStore(), Slowness(latency_s=(0.0, 0.0)))


def model_of(tensors: int, nbytes: int) -> torch.nn.ParameterDict:
    each = nbytes // tensors // 4
    return torch.nn.ParameterDict(
        {f"p{i:05}": torch.nn.Parameter(torch.full((each,), 1.0 + i)) for i in range(tensors)}
    )


def manager_on(
    store: SlowStore, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, **more: int
) -> CheckpointManager:
    monkeypatch.setattr("distckpt.manager.manager.open_store", lambda url: store)
    config = CheckpointConfig(
        "memory://slow", preemption_signals=(), control_file=None, verbose=False, threads=8, timeout_s=60.0, **more
    )
    return CheckpointManager(config, model=model)


def test_requests_follow_bytes_and_are_under_way_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for tensors in (20, 800):
        store = SlowStore(MemoryStore(), NETWORK)
        model = model_of(tensors, 48 << 20)
        with manager_on(store, model, monkeypatch) as manager:
            requests = []
            for action in (lambda: manager.save(step=1), lambda: manager.load("latest")):
                store.seen.clear()
                action()
                requests.append(store.seen["requests"])
                assert store.seen["most_in_flight"] >= 3
        assert all(bool((p == 1.0 + i).all()) for i, p in enumerate(model.values()))
        (committed,) = list_committed(store)
        store.seen.clear()
        offline = Checkpoint(store, committed, read_manifest(store, committed)).state_dict()
        assert len(offline) == tensors
        assert store.seen["most_in_flight"] >= 3
        counted.append((*requests, store.seen["requests"]))
    few, many = counted
    assert all(b <= a + 4 for a, b in zip(few, many, strict=True)), counted
    assert max(many) <= 6 + 50, counted  # 48 MiB in requests of 8, and the commit


def test_errors_of_the_network_never_commit_anything_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SlowStore(MemoryStore(), Slowness(latency_s=(0.0, 0.0)), seed=3)
    model = model_of(20, 1 << 20)
    with manager_on(store, model, monkeypatch, max_consecutive_failures=100, retries=0) as manager:
        manager.save(step=0)
        store.slowness = Slowness(latency_s=(0.0, 0.002), errors=0.08)
        saved = [manager.save(step=step) for step in range(1, 9)]
        store.slowness = Slowness(latency_s=(0.0, 0.0))
        manager.save(step=99)
    assert store.seen["errors"] > 3
    assert None in saved
    listed = list_committed(store)
    assert max(c.step for c in listed) == 99
    assert all(verify(store, c, mode="full").ok for c in listed)
