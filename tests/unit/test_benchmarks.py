"""The benchmark suite keeps its own rules: turns, probes, ratios, errors, and nothing that is only said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import jobs, limits, measures, plots, report, tasks
from benchmarks.pool import RanksFailed
from benchmarks.run import VERIFIED, Bench, Settings, Turns, differ, merged, palindrome
from benchmarks.sim import suite
from benchmarks.zero_peer import rows_of
from distckpt.storage.probes import best_point

GIB = 1 << 30


def probes(*rates: float) -> Any:
    """Return a probe that gives these rates one after the other."""
    values: Iterator[float] = iter(rates)
    return lambda: {"write": next(values)}


def row(**changes: Any) -> dict[str, Any]:
    """Return a row of a save that reached half of its limit."""
    found: dict[str, Any] = {
        "kind": "row", "workload": "llama8b", "world": 1, "part": "save", "peer": "distckpt", "round": 1, "attempt": 0,
        "void": False, "seconds": 2.0, "nbytes": GIB, "limit": {"write": GIB}, "probes": [{"write": GIB}, {"write": GIB}],
        "cpu_seconds": 0.2, "peak_extra_bytes": 50 << 20,
    }  # fmt: skip
    return found | changes


# ---------------------------------------------------------------- turns


def test_peers_go_there_and_back() -> None:
    assert palindrome(["a", "b", "c"]) == ["a", "b", "c", "c", "b", "a"]


@pytest.mark.parametrize(("before", "after", "void"), [(100, 109, False), (100, 111, True), (111, 100, True)])
def test_a_turn_is_void_if_its_probes_differ(before: float, after: float, void: bool) -> None:
    assert differ({"write": before, "copy": 1.0}, {"write": after, "copy": 1.0}) is void


def test_a_void_turn_is_repeated_until_the_machine_holds_still() -> None:
    done: list[int] = []

    def work() -> dict[str, Any]:
        done.append(len(done))
        return {"seconds": float(len(done))}

    rows = list(Turns(again=5).take(work, probes(100, 200, 200, 100, 100, 101)))
    assert [(r["void"], r["attempt"], r["seconds"]) for r in rows] == [(True, 0, 1.0), (True, 1, 2.0), (False, 2, 3.0)]
    assert rows[-1]["limit"] == {"write": 100.5}
    assert rows[-1]["probes"] == [{"write": 100}, {"write": 101}]


def test_a_turn_is_void_by_the_raw_limits_alone() -> None:
    """What hashes and copies while it reads or writes follows the processors; the row still has both of its probes."""
    given = iter([{"write": 100, VERIFIED: 50}, {"write": 101, VERIFIED: 90}])
    (found,) = Turns(again=5).take(lambda: {"seconds": 1.0}, lambda: next(given))
    assert not found["void"]
    assert found["limit"] == {"write": 100.5, VERIFIED: 70}
    (test,) = [t for t in measures.durable_save(report.Results([row(**found)])) if "hashed copies" in t.what and t.value]
    assert test.value == pytest.approx(GIB / 70)


def test_void_turns_are_repeated_a_bounded_number_of_times() -> None:
    rows = list(Turns(again=2).take(lambda: {"seconds": 1.0}, probes(*[1, 2] * 3)))
    assert [r["void"] for r in rows] == [True] * 3
    s = report.summary("llama8b", 1, "save", "distckpt", [row(**r) for r in rows])
    assert (s.void, s.only_void, s.seconds) == (3, True, 1.0)


def test_one_probe_serves_two_turns_only_if_they_follow_each_other() -> None:
    now = [0.0]
    turns, probe = Turns(again=0, clock=lambda: now[0]), probes(100, 101, 102, 200, 201)
    ends = [r["probes"] for r in turns.take(dict, probe, shared=True)]
    ends += [r["probes"] for r in turns.take(dict, probe, shared=True)]
    now[0] += 60
    ends += [r["probes"] for r in turns.take(dict, probe, shared=True)]
    assert [[p["write"] for p in pair] for pair in ends] == [[100, 101], [101, 102], [200, 201]]


def test_the_two_limits_of_a_copy_are_those_of_the_same_threads() -> None:
    class TwoRanks:
        def call(self, _: Any) -> list[list[tuple[float, float]]]:
            return [[(0.0, 2.0), (5.0, 9.0)], [(0.0, 4.0), (5.0, 6.0)]]

    bench = Bench.__new__(Bench)
    assert bench.copy_limit(TwoRanks(), 8)() == {"copy": 2.0}  # type: ignore[arg-type]


def test_two_probes_of_a_staging_copy_every_tensor_once_to_memory_of_its_own() -> None:
    pieces = [np.full(size, 7 + size % 5, np.uint8) for size in (5, 1 << 20, 7, 0)]
    room = np.zeros(1 << 22, np.uint8)
    live = SimpleNamespace(locals=[SimpleNamespace(octets=p) for p in pieces], nbytes=sum(p.size for p in pieces))
    idle = SimpleNamespace(take=lambda nbytes: room)
    worker = SimpleNamespace(live=live, idle=idle, odd=False, barrier=lambda: None)
    first, second = (tasks.staging_limit(worker) for _ in range(2))  # type: ignore[arg-type]
    assert sorted((first[2], second[2])) == [12, 1 << 20]
    assert first[1] > first[0]
    assert bytes(room[: live.nbytes]) == np.concatenate(pieces).tobytes()
    assert not room[live.nbytes :].any()


# ---------------------------------------------------------------- peers that fail


def fail() -> dict[str, Any]:
    raise RanksFailed("rank 1: OSError: disk full")


def test_a_failing_peer_is_reported_by_its_error_and_never_with_an_old_number(tmp_path: Path) -> None:
    bench, failed = Bench(Settings(again=3), tmp_path), set[str]()
    about = {"workload": "llama8b", "world": 1, "part": "save", "peer": "dcp", "round": 1}
    good = bench.measure(about, lambda: {"seconds": 1.0, "nbytes": GIB}, probes(1, 1), failed=failed)
    assert good is not None
    assert not failed
    assert bench.measure(about, fail, probes(1, 1), failed=failed) is None
    assert failed == {"dcp"}
    assert len(bench.rows) == 2  # an error is not repeated
    results = report.Results(bench.rows)
    s = results.one("llama8b", "save", "dcp")
    assert (s.seconds, s.rows, s.fraction(), s.error) == (None, (), None, "rank 1: OSError: disk full")
    assert results.best("llama8b", "save", ["dcp"]) is None
    (line,) = report.lines(results)
    assert line[4:8] == ["", "", "", ""]
    assert "disk full" in line[-1]


def test_errors_do_not_carry_folders_of_the_machine(tmp_path: Path) -> None:
    bench = Bench(Settings(), tmp_path)
    bench.add({"kind": "absent", "peer": "x", "error": f"no such file: {tmp_path}/a"})
    assert bench.rows[0]["error"] == "no such file: FOLDER/a"


class OneRank:
    """A pool in which one peer cannot be imported."""

    def call(self, fn: Any, name: str) -> list[str]:
        if name == "bytecheckpoint":
            raise RanksFailed("rank 0: ModuleNotFoundError: No module named 'grpc'")
        return ["1.0"]


def test_an_absent_peer_says_why(tmp_path: Path) -> None:
    bench = Bench(Settings(), tmp_path)
    assert bench.usable(["distckpt", "bytecheckpoint"], OneRank()) == ["distckpt"]  # type: ignore[arg-type]
    results = report.Results(bench.rows)
    assert results.absent == {"bytecheckpoint": "ModuleNotFoundError: No module named 'grpc'"}
    assert results.versions == {"distckpt": "1.0"}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.table(results, console)
    assert "bytecheckpoint: absent: ModuleNotFoundError" in console.export_text()


def test_wrong_bytes_show_and_count_for_nothing() -> None:
    results = report.Results(
        [row(part="cold load", check="different: w, byte 3", limit={"read": GIB}), row(peer="dcp")]
    )
    s = results.one("llama8b", "cold load")
    assert s.wrong == "different: w, byte 3"
    assert "WRONG" in report.notes(s)
    assert {t.value for t in measures.cold_load(results)} == {None}
    assert results.best("llama8b", "cold load", ["distckpt"]) is None


def test_a_cold_load_with_cached_pages_is_wrong() -> None:
    s = report.Results([row(part="cold load", check="equal", resident_pages=7)]).one("llama8b", "cold load")
    assert s.wrong == "7 pages were cached"


# ---------------------------------------------------------------- ratios


def test_a_ratio_needs_the_probe_of_its_own_turn() -> None:
    assert report.fraction_of_limit(row()) == 0.5
    for lacking in ({"limit": {}}, {"limit": {"read": GIB}}, {"probes": [{"write": GIB}]}, {"part": "unheard of"}):
        with pytest.raises(report.NoProbe, match="no probe"):
            report.fraction_of_limit(row(**lacking))
    s = report.Results([row(), row(limit={})]).one("llama8b", "save")
    assert s.fraction() is None  # one turn without its probe, and there is no ratio
    assert report.lines(report.Results([row(limit={})]))[0][7] == "no probe"


def test_a_stall_is_compared_with_a_copy_and_not_with_the_whole_save() -> None:
    assert report.fraction_of_limit(row(part="background", free_seconds=0.5, limit={"copy": 4.0 * GIB})) == 0.5


def test_lost_time_is_what_the_same_steps_did_not_need() -> None:
    window = row(part="train", seconds=13.0, steps=20, saves=3, limit={"steps": 2.0, "copy": 1.0})
    assert report.lost_seconds(window) == 1.0
    with pytest.raises(report.NoProbe):
        report.lost_seconds(window | {"limit": {"copy": 1.0}})


def test_ratios_to_dcp_take_its_best_setting() -> None:
    results = report.Results([row(), row(peer="dcp", seconds=9.0), row(peer="dcp-threads", seconds=5.0)])
    test = measures.times_dcp(results, "llama8b", "save", 2.0, 3.0)
    assert (test.value, test.what) == (2.5, "x1 dcp-threads ÷ ours")
    assert [test.met(2.0), test.met(3.0)] == ["met", "not met"]


def test_rows_of_ranks_become_one() -> None:
    rank = {"started": 1.0, "ended": 3.0, "nbytes": 8, "cpu_seconds": 1.0, "peak_extra_bytes": 5, "counters": {"opens": 2},
            "io": dict.fromkeys(("syscr", "syscw", "read_bytes", "write_bytes"), 1), "check": "equal"}  # fmt: skip
    slow = rank | {"started": 1.5, "ended": 5.5, "peak_extra_bytes": 9, "check": "different: w"}
    found = merged([rank, slow], 16)
    assert (found["seconds"], found["min_rank_bytes_s"], found["cpu_seconds"]) == (4.5, 2.0, 2.0)
    assert (found["peak_extra_bytes"], found["requests"], found["counters"]) == (9, 4, {"opens": 4})
    assert found["check"] == "different: w"


# ---------------------------------------------------------------- the scorecard


def test_nothing_measured_is_nothing_met() -> None:
    card = measures.scorecard(report.Results([]))
    assert len(card) == len(measures.all_measures()) >= len(measures.MEASURES) + 6  # those of slots too
    assert {cell for line in card for cell in line[4:]} == {"not measured"}


def test_every_promise_of_the_table_has_a_line() -> None:
    card = "\n".join(line[0] for line in measures.scorecard(report.Results([])))
    for words in ("durable save", "CPU seconds", "cold load", "warm load", "18,867", "reshard", "stall of a background",
                  "lazy stall", "lost training", "checksums", "peak extra", "LoRA", "first plan", "manifest",
                  "EMA update", "average of K"):  # fmt: skip
        assert words in card


def test_void_turns_prove_nothing() -> None:
    tests = [*measures.cpu(report.Results([row()])), measures.Test("a", 9.0, 1.0, 1.0, void=True)]
    assert tests[-1].met(1.0) == "void"
    assert str(tests[-1]) == "a: 9.00 (void)"
    void = measures.share(report.Results([row(void=True, seconds=1.0)]), "llama8b", "save", 0.85, 0.95)
    assert (void.value, void.met(0.85)) == (1.0, "void")


def test_one_missed_bound_is_a_missed_promise() -> None:
    good, bad = measures.Test("a", 1.0, 0.5, 2.0), measures.Test("b", 3.0, 2.0, None, at_least=False)
    assert measures.verdict([good], "required") == "met"
    assert measures.verdict([good, bad], "required") == "not met"
    assert measures.verdict([bad], "aim") == "not measured"  # it has no such bound


def test_incremental_bytes_come_from_the_counters() -> None:
    saved = row(workload="lora", part="increment", peer="distckpt-incremental", counters={"bytes_written": GIB // 50})
    (test,) = measures.increments(report.Results([saved]))
    assert test.value == pytest.approx(2.0, rel=1e-6)
    assert (test.met(3), test.met(1)) == ("met", "not met")


def test_amplification_and_factor_of_a_reshard() -> None:
    about: dict[str, Any] = {
        "workload": "reshard: rows to columns",
        "world": 2,
        "limit": {"read": GIB},
        "check": "equal",
    }
    counters = {"wanted_bytes": 100, "payload_bytes": 104}
    rows = [row(part="same layout", **about), row(part="reshard", seconds=2.3, counters=counters, **about)]
    factor, amplification = measures.reshard(report.Results(rows))
    assert (factor.what, factor.value, amplification.value) == ("rows to columns", pytest.approx(1.15), 1.04)


def test_what_checksums_cost_stands_beside_what_they_cost_the_probes() -> None:
    about: dict[str, Any] = {"workload": "checksums", "part": "cold load", "check": "equal"}
    on = row(**about, seconds=3.3, limit={"read": GIB, "verified": 2 * GIB})
    off = row(**about, seconds=3.0, peer="distckpt-no-checksums", limit={"read": GIB, "copied": 2.1 * GIB})
    save, load, least = measures.checksums(report.Results([on, off]))
    assert (save.value, load.value, least.value) == (None, pytest.approx(1.1), pytest.approx(1.05))
    assert measures.checksums(report.Results([on]))[2].value is None


# ---------------------------------------------------------------- files and arguments


def test_results_are_written_as_they_come_and_can_be_read(tmp_path: Path) -> None:
    from benchmarks.run import json_lines

    sink = json_lines(tmp_path / "out" / "results.jsonl")
    sink(report.machine(tmp_path, {"rounds": 1}))
    sink(row(folder="/secret", seconds=1.23456789))
    found = report.read_results(tmp_path / "out" / "results.jsonl")
    assert "/secret" not in (tmp_path / "out" / "results.jsonl").read_text()
    assert found.rows[0]["seconds"] == 1.23457
    assert found.machine["cores"] >= 1
    assert str(tmp_path) not in json.dumps(found.machine)


def test_pictures_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train = row(workload="train", part="train", seconds=13.0, steps=20, saves=3, limit={"steps": 2.0, "copy": 1.0})
    results = report.Results([row(), row(peer="dcp", seconds=4.0), train], report.machine(tmp_path, {}))
    pictures = plots.plots(results, tmp_path)
    assert [path.name for path in pictures] == ["llama8b-1.png", "train.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    page = plots.page(results, pictures)
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert "not measured" in page
    assert "distckpt&#x27;s" in page  # a promise, and no row of ours
    assert page.count('<tr class="ours">') == 2


def test_deepspeed_rows_join_with_their_own_probes(tmp_path: Path) -> None:
    records = [
        {"kind": "machine", "settings": {"ranks": 2, "to": 1, "state_bytes": GIB}},
        {"kind": "row", "seconds": 2.0, "cpu_seconds": 1.0, "what": "save", "peer": "native", "stage": 3, "round": 0,
         "attempt": 0, "void": False, "raw_write_bytes_s": GIB, "probes": [{"write": GIB}] * 2, "load_average": 0.1},
    ]  # fmt: skip
    path = tmp_path / "zero.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (found,) = rows_of(path)
    assert (found["workload"], found["peer"], found["world"]) == ("ZeRO-3", "deepspeed", 2)
    assert report.fraction_of_limit(found) == 0.5


def test_slots_say_who_may_fill_them() -> None:
    assert set(jobs.SLOTS) == {"ema", "averaging", "plan"}
    names = [job.name for job in jobs.all_jobs()]
    assert len(names) == len(set(names))
    assert {"llama8b", "llama8b-2", "small", "reshard", "lora", "train", "resume", "checksums"} <= set(names)


def test_the_slot_of_plans_measures_what_its_promises_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "WORLD", 8)
    rows: list[dict[str, Any]] = []
    suite.plan(SimpleNamespace(add=rows.append), 8)  # type: ignore[arg-type]
    tests = [test for promise in suite.measures() for test in promise.judge(report.Results(rows))]
    assert all(test.value is not None and test.value > 0 for test in tests)
    assert next(test.value for test in tests if test.what == "headers") == 1


def test_arguments() -> None:
    quick = program.settings_of(program.parser().parse_args([]))
    full = program.settings_of(program.parser().parse_args(["--full", "--peers", "dcp,distckpt"]))
    assert (quick.rounds, quick.nbytes, full.rounds, full.nbytes) == (1, 200_000_000, 5, 1_760_000_000)
    assert full.chosen(jobs.SAVERS) == ["distckpt", "dcp"]
    assert "zero" not in [job.name for job in program.chosen(jobs.all_jobs(), quick)]
    assert "zero" in [job.name for job in program.chosen(jobs.all_jobs(), full)]
    with pytest.raises(SystemExit):
        program.settings_of(program.parser().parse_args(["--only", "nothing"]))
    named = program.settings_of(program.parser().parse_args(["--peers", "distckpt,AveragedModel avg_fn,eager loop"]))
    assert named.peers == ("distckpt", "AveragedModel avg_fn", "eager loop"), "those of slots have names too"


def test_the_best_point_of_a_sweep_is_the_limit() -> None:
    rates = {(4, 4 << 20): 1.0, (12, 8 << 20): 3.0}
    found = best_point(lambda p: rates.get((p.threads, p.request), 0.5), limits.QUICK_POINTS)
    assert (found.threads, found.request) == (12, 8 << 20)
