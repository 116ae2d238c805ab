"""A bench that is stopped anywhere, or runs out of space, leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from bench_support import do_at, left_in, signalled
from ranks import run_ranks

from distckpt.analysis import store_bench
from distckpt.analysis.stops import Stopped, stoppable
from distckpt.cli.main import main

PLACES = [  # by turns: the kept raw file, a curve, small operations, a save's data and commit, the tidying of a step
    ("writer.chunk@raw", 2, signal.SIGINT),
    ("create.temp_synced@small", 2, signal.SIGTERM),
    ("shard.before_header@step", 1, signal.SIGHUP),
    ("create.linked@step", 1, signal.SIGTERM),
    ("delete.before@step", 2, signal.SIGINT),
]


@pytest.mark.parametrize(("point", "nth", "number"), PLACES, ids=[f"{p}-{n.name}" for p, _, n in PLACES])
def test_a_signal_at_any_moment_leaves_nothing(tmp_path: Path, point: str, nth: int, number: signal.Signals) -> None:
    ((code, left),) = run_ranks(1, signalled, str(tmp_path), int(number), point, nth, backend=None)
    assert (code, left) == (128 + number, [])
    assert left_in(tmp_path) == []


def stopped_while_tidying(rank: int, folder: str) -> int:
    """Two signals come while everything is removed: at the end of a bench that was fine."""
    remove = store_bench.remove_scratch

    def slow(store: store_bench.Store) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return remove(store)

    store_bench.remove_scratch = slow
    return main(["bench", folder, "--mbytes", "8", "--rounds", "1", "--operations", "3"])


def test_signals_do_not_interrupt_the_tidying(tmp_path: Path) -> None:
    assert run_ranks(1, stopped_while_tidying, str(tmp_path), backend=None) == [143]
    assert left_in(tmp_path) == []


def twice_while_held() -> None:
    with stoppable() as stops:
        with stops.held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert stops.signum == signal.SIGTERM


def test_handlers_are_put_back_and_the_first_signal_counts() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(Stopped) as stopped:
        twice_while_held()
    assert stopped.value.signum == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stops.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def fills_up(rank: int, folder: str, point: str, nth: int) -> int:
    """Somebody else takes all that is left of the disk, in the middle of a bench."""

    def fill() -> None:
        space = os.statvfs(folder)
        with open(f"{folder}/theirs", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)

    do_at(point, nth, fill)
    return main(["bench", folder, "--mbytes", "1", "--rounds", "1", "--operations", "3"])


@pytest.mark.parametrize("point", ["writer.synced@raw", "save.begun"])
def test_a_disk_that_fills_up_is_an_error_and_keeps_only_what_others_wrote(tmp_path: Path, point: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount refused: {done.stderr.strip()}")
    try:
        assert run_ranks(1, fills_up, str(disk), point, 2 if "@" in point else 1, backend=None) == [1]
        assert left_in(disk) == ["theirs"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def loses_its_folder(rank: int, folder: str) -> int:
    do_at("save.begun", 1, lambda: shutil.rmtree(next(Path(folder).glob("distckpt-bench-*"))))
    return main(["bench", folder, "--mbytes", "1", "--rounds", "1", "--operations", "3"])


def test_a_folder_that_somebody_else_has_removed_is_an_error(tmp_path: Path) -> None:
    assert run_ranks(1, loses_its_folder, str(tmp_path), backend=None) == [1]
    assert left_in(tmp_path) == []
