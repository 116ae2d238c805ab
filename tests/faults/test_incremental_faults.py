"""Death and power cuts during incremental saves: nothing that was acknowledged is lost, and no reference dangles."""

from __future__ import annotations

import random
from pathlib import Path

from supervisor import Kill, enumerate_points, litter_on_disk, referred_to, run_chains
from test_power_cut import LOG_LOST, PowerChain, disk


def test_the_invariants_hold_after_a_kill_at_every_failpoint_of_an_incremental_save(tmp_path: Path) -> None:
    """Rank 0 alone or both, synchronous or not, by turns; all on offer is verified in full, what it refers to as well."""
    points = enumerate_points(tmp_path / "points", background=False, incremental=True)
    assert {name for name, _ in points[0]} >= {"shard.compared", "gc.after_manifest", "gc.before_data", "delete.before"}
    kills = [Kill((0, 1) if i % 2 else (0,), i % 4 > 1, point) for i, point in enumerate(points[0])]
    kills += [Kill((1,), bool(i % 2), point) for i, point in enumerate(points[1])]
    random.Random(7).shuffle(kills)
    result = run_chains(tmp_path, kills, workers=8, incremental=True)
    assert result.violations == []
    assert result.missed == []
    assert result.landed == len(kills)


def test_a_reference_is_only_to_bytes_that_a_power_cut_leaves(tmp_path: Path) -> None:
    with disk(tmp_path) as made:
        points = enumerate_points(tmp_path / "points", background=False, world=1, incremental=True)[0]
        chain = PowerChain(tmp_path / "chain", made, LOG_LOST, incremental=True)
        for point in points:
            chain.kill(Kill((0,), False, point))
        result = chain.finish()
        assert result.violations == []
        assert result.missed == []
        assert result.landed == len(points)
        assert litter_on_disk(chain.root) == set()
        assert referred_to(chain.root) > 0
