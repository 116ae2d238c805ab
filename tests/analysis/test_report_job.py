"""A report of a run that the manager made: what it stores is enough for timings, restarts and norms."""

from __future__ import annotations

from pathlib import Path

import torch
from test_page import Tags

from distckpt import CheckpointConfig, CheckpointManager, write_report
from distckpt.analysis.history import starts, timings
from distckpt.analysis.reading import RunReader


def train(root: Path, first: int, last: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = CheckpointConfig(
        str(root), save_every_steps=10, async_save=True, save_total_limit=None, metric_name="loss"
    )
    with CheckpointManager(config, model=model, optimizer=optimizer) as manager:
        manager.resume()
        for step in range(first, last + 1):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 8)).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            manager.step(step, metrics={"loss": loss.item(), "steps": step})


def test_a_run_of_the_manager(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(root, 1, 34)
    train(root, 31, 50)
    run = RunReader(root).read()
    found = timings(run)
    assert [timing.step for timing in found] == [10, 20, 30, 40, 50]
    assert all(timing.seconds is not None and timing.seconds < 60 and not timing.coarse for timing in found)
    assert all(timing.held_up_s is not None for timing in found[:4])
    first, second = starts(run)
    assert (first.last_step, first.redone, first.beat) == (34, 4, None)
    assert (second.resumed_from, second.passed_over) == ((1, 30), ())
    assert [row.step for row in run.line] == list(range(1, 51))
    report = write_report(root, tmp_path / "page.html")
    assert report.ok
    assert [trouble.kind for trouble in report.troubles] == ["note"]
    words = Tags((tmp_path / "page.html").read_text()).words
    for said in (
        "Time to commit (s)",
        "Training held up (s)",
        "Update norm",
        "save_every_steps",
        "at least 4 of its steps",
    ):
        assert said in words
