"""Death at every step of a save: one rank or all, at each failpoint, synchronous and in the background."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from supervisor import Kill, enumerate_points, run_chains

FAMILIES = {"save", "shard", "writer", "create", "commit", "delete", "gc"}


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "background"])
def test_six_invariants_hold_after_a_kill_at_every_failpoint(background: bool, tmp_path: Path) -> None:
    points = enumerate_points(tmp_path / "points", background)
    assert {name.partition(".")[0] for name, _ in points[0]} == FAMILIES
    assert {name.partition(".")[0] for name, _ in points[1]} == {"save", "shard", "writer"}
    kills = [Kill((rank,), background, point) for rank in (0, 1) for point in points[rank]]
    kills += [Kill((0, 1), background, point) for point in points[0]]
    hosts = [
        Kill(k.victims, background, k.point, store_host="rank0" if i % 2 else "agent") for i, k in enumerate(kills)
    ]
    random.Random(5).shuffle(hosts)
    result = run_chains(tmp_path, hosts, workers=10)
    assert result.violations == []
    assert result.missed == []
    assert result.landed == len(kills)
    assert result.checked >= 2 * len(kills)
