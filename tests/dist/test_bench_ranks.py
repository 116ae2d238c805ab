"""A bench on several ranks: one report for all, errors and deaths shared, nothing left by anybody."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_support import do_at, left_in
import json
from ranks import run_ranks

from distckpt import failpoints
from distckpt.analysis.store_bench import BenchOptions, bench_stores
from distckpt.cli.main import main
from distckpt.dcp import read_plan, share
from distckpt.dcp.agreement import Agreement
from distckpt.errors import AgreementError, ConfigError

if TYPE_CHECKING:
    from s3_support import S3

MIB = 1 << 20
OPTIONS = BenchOptions(nbytes=32 * MIB, rounds=1, operations=2, again=0, threads=(1, 2))
PARTS = {"save", "load", "partial load", "replicated, each rank", "replicated, shared"}


def bench(rank: int, urls: list[str], timeout_s: float = 30.0) -> Any:
    return bench_stores(urls, OPTIONS, agreement=Agreement.from_environment(timeout_s=timeout_s))


def bench_short_turns(rank: int, urls: list[str]) -> Any:
    read_plan.SPAN = share.TURN = MIB  # or it takes more bytes to measure the link
    return bench(rank, urls)


def test_two_ranks_share_one_report_and_leave_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(2, bench_short_turns, [str(tmp_path)])
    (target,) = first.targets
    assert (target.error, first.world_size, first.hosts) == ("", 2, 1)
    assert {turn.part for turn in target.turns} == PARTS
    assert (second.targets[0].turns, second.targets[0].curve) == (target.turns, target.curve)
    assert second.targets[0].latencies == target.latencies
    assert len(target.sharing) == len({turn.setting for turn in target.turns})
    assert {found.count for found in target.latencies if found.operation != "list"} == {4}  # two of each rank
    sizes = {turn.part: turn.nbytes for turn in target.turns}
    assert sizes["replicated, shared"] == sizes["replicated, each rank"] > 2 * 11 * MIB  # both ranks get all of it
    assert "share_loads" in {advice.setting for advice in target.advice}
    assert left_in(tmp_path) == []


def command(rank: int, folder: str) -> int:
    return main(["bench", folder, "--mbytes", "8", "--rounds", "1", "--operations", "2", "--json"])


def test_the_command_speaks_on_one_rank_only(tmp_path: Path) -> None:
    outcomes = run_ranks(2, command, str(tmp_path), check=False)
    assert [o.value for o in outcomes] == [0, 0]
    assert json.loads(outcomes[0].output)["world_size"] == 2
    assert outcomes[1].output == ""
    assert left_in(tmp_path) == []


def fails(rank: int, folders: list[str], how: str) -> Any:
    """The second rank's second chunk fails, or brings a signal, or kills it."""
    if rank == 1 and how == "ENOSPC":
        failpoints.arm("writer.chunk@raw/00001:2:raise=ENOSPC")
    elif rank == 1:
        do_at("writer.chunk@raw/00001", 2, lambda: os.kill(os.getpid(), getattr(signal, how)))
    try:
        report = bench(rank, folders, timeout_s=2.0)
        return [target.error for target in report.targets]
    except (AgreementError, KeyboardInterrupt) as error:
        return str(error)


def test_one_rank_s_full_disk_is_every_rank_s_and_the_next_target_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("full", "other")]
    for folder in folders:
        folder.mkdir()
    first, second = run_ranks(2, fails, [*map(str, folders)], "ENOSPC")
    assert "rank 1" in first[0]
    assert "free some space" in second[0]
    assert (first[1], second[1]) == ("", "")
    assert left_in(tmp_path) == ["full", "other"]


def test_a_rank_that_is_stopped_or_killed_ends_it_and_the_others_tidy(tmp_path: Path) -> None:
    first, second = run_ranks(2, fails, [str(tmp_path)], "SIGTERM", store_host="agent")
    assert ("rank 1" in first, second) == (True, "SIGTERM")
    assert left_in(tmp_path) == []
    (first, _) = run_ranks(2, fails, [str(tmp_path)], "SIGKILL", expect={1: signal.SIGKILL}, store_host="agent")
    assert "rank 1" in first
    assert left_in(tmp_path) == []


def refused(rank: int, url: str) -> str:
    try:
        bench(rank, [url])
    except ConfigError as error:
        return str(error)
    return "no error"


def test_what_one_process_has_for_itself_is_no_target_of_two(tmp_path: Path) -> None:
    assert all("one process's own" in said for said in run_ranks(2, refused, "memory://bench"))
    assert all("no such folder" in said for said in run_ranks(2, refused, str(tmp_path / "absent")))


def test_two_ranks_on_a_bucket_leave_nothing(s3: S3, bucket: str) -> None:
    first, _ = s3.ranks.run_ranks(2, bench_small, [f"s3://{bucket}/team"])
    assert (first.targets[0].error, {t.part for t in first.targets[0].turns}) == ("", PARTS)
    assert (s3.ask("keys", name=bucket), s3.ask("uploads", name=bucket)) == ([], [])


def bench_small(rank: int, urls: list[str]) -> Any:
    return bench_stores(urls, BenchOptions(nbytes=4 * MIB, rounds=1, operations=1, again=0))
