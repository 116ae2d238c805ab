"""SIGKILL from outside at random moments of saves that follow each other (see benchmarks/soak.py for many more)."""

from __future__ import annotations

from pathlib import Path

import pytest
from supervisor import random_kills, run_chains

KILLS = 40


@pytest.mark.slow  # beside the kills at every failpoint; the soak has a thousand of these
def test_six_invariants_hold_after_kills_at_random_moments(tmp_path: Path) -> None:
    result = run_chains(tmp_path, random_kills(KILLS, seed=3), workers=8)
    assert result.violations == []
    assert result.missed == []
    assert result.landed == KILLS
    assert len(result.phases) >= 5, result.phases  # spread over the save, not always at one place
