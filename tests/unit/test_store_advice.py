"""From curves to settings, on made-up figures: knees, what stays, what is taken back, and only settings that exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest

from distckpt.analysis import store_advice as advise
from distckpt.analysis.store_advice import Measured, knee, recommend, settled
from distckpt.analysis.store_page import page
from distckpt.analysis.store_report import (
    READ,
    WRITE,
    Advice,
    BenchReport,
    CurvePoint,
    Figure,
    Latency,
    TargetReport,
    Turn,
    curve_points,
    figures_of,
    latencies_of,
)
from distckpt.config import CheckpointConfig, ObjectStoreConfig
from distckpt.storage.probes import Point

MIB = 1 << 20
CONFIG = CheckpointConfig("root", threads=12)
FLAT = dict.fromkeys((1, 2, 4, 8, 12, 24), 1000.0)
DEEP = {1: 100.0, 2: 200.0, 4: 400.0, 8: 700.0, 12: 800.0, 24: 1000.0}


def curve(kind: str, rates: Mapping[int, float], request: int = 8, void: int = 0) -> list[CurvePoint]:
    return [CurvePoint(kind, n, request * MIB, (rate * 1e6,), void, rate * 1e6) for n, rate in rates.items()]


def near(write: Mapping[int, float], read: Mapping[int, float] = FLAT, **more: object) -> Measured:
    points = [*curve(WRITE, write), *curve(READ, read, 2)]
    return replace(Measured(False, False, 1, points), **more)  # type: ignore[arg-type]


def far(write: list[CurvePoint], read: Mapping[int, float], **more: object) -> Measured:
    return replace(Measured(True, True, 1, [*write, *curve(READ, read, 4)]), **more)  # type: ignore[arg-type]


def figure(part: str, rate: float, setting: str = "default", only_void: bool = False) -> Figure:
    return Figure(part, setting, rate * 1e6, 0.9, 3, 3 * only_void, only_void, None)


def values(found: list[Advice]) -> dict[str, object]:
    return {advice.setting: advice.value for advice in found}


@pytest.mark.parametrize(
    ("rates", "within", "least"),
    [
        ({1: 100, 2: 190, 4: 200, 8: 200}, 0.95, 2),
        ({1: 100, 2: 150, 4: 160, 8: 200}, 0.95, 8),
        ({1: 100, 2: 150, 4: 160, 8: 200}, 0.8, 4),
        ({1: 200, 2: 150, 4: 100}, 0.95, 1),  # more in flight is slower
        ({12: 5}, 0.95, 12),
        ({1: 0.0, 2: 0.0}, 0.95, 1),
    ],
)
def test_the_knee_is_the_least_depth_with_nearly_all_of_the_speed(
    rates: dict[int, float], within: float, least: int
) -> None:
    assert knee(rates, within) == least


def test_what_is_set_stays_if_it_is_fast_enough_and_not_far_past_the_knee() -> None:
    assert settled({4: 96.0, 12: 100.0, 24: 100.0}, 12) == 12
    assert settled({1: 100.0, 12: 100.0}, 12) == 1  # eleven threads for nothing
    assert settled({4: 50.0, 12: 80.0, 24: 100.0}, 12) == 24
    assert settled({4: 50.0, 24: 100.0}, 12) == 24  # what is set was not measured


def test_a_disk_that_needs_depth_gets_it_and_a_flat_one_gets_little() -> None:
    deep = values(recommend(near(DEEP), CONFIG))
    assert (deep["threads"], deep["background_threads"]) == (24, 12)
    flat = values(recommend(near(FLAT), CONFIG))
    assert (flat["threads"], flat["background_threads"]) == (1, 1)
    reading = recommend(near(FLAT, {1: 100.0, 2: 200.0, 4: 400.0, 8: 410.0}), CONFIG)
    assert values(reading)["threads"] == 4
    assert "loads read with 4" in reading[0].why


def test_a_bucket_gets_reads_in_flight_parts_and_a_deadline_that_fits() -> None:
    write = [*curve(WRITE, {1: 10, 4: 40, 12: 96, 32: 100}, 5), *curve(WRITE, {1: 12, 4: 48, 12: 97}, 16)]
    found = recommend(far(write, {1: 10, 4: 40, 12: 120, 32: 300}), CONFIG, ObjectStoreConfig())
    said = values(found)
    assert said["threads"] == 32
    # 12 × 5 MiB is nearly as fast as 32 × 5 and 12 × 16, and holds the least memory.
    assert (said[advise.PART], said[advise.IN_FLIGHT]) == (5, 12)
    assert said[advise.DEADLINE] == 120.0
    slow = [*curve(WRITE, {12: 1.0}, 16)]  # 200 MB in flight at 1 MB/s: one try takes 200 s
    assert values(recommend(far(slow, {12: 1.0}), CONFIG, ObjectStoreConfig()))[advise.DEADLINE] >= 4 * 200


def test_every_setting_exists() -> None:
    figures = [figure(part, 500) for part in ("save", "load", "replicated, each rank", "replicated, shared")]
    more = {"figures": figures, "sharing": [(1e9, 1e9)], "state_nbytes": 10**13, "world_size": 8}
    latencies = [Latency("commit", 10, 0.1, 0.2, 0.3, 0.4)]
    both = [
        *recommend(near(DEEP, latencies=latencies, **more), CONFIG),
        *recommend(far(curve(WRITE, DEEP, 5), DEEP, **more), CONFIG),
    ]
    known = {f.name for f in fields(CheckpointConfig)}
    environment = {
        advise.PART: ("part_bytes", MIB),
        advise.IN_FLIGHT: ("in_flight", 1),
        advise.DEADLINE: ("deadline_s", 1),
    }
    for one in both:
        if one.setting in known:
            assert getattr(CheckpointConfig("root", **{one.setting: one.value}), one.setting) == one.value
        else:
            with pytest.MonkeyPatch.context() as patch:
                field, scale = environment[one.setting]
                patch.setenv(one.setting, f"{one.value:g}")
                assert getattr(ObjectStoreConfig.from_env(), field) == one.value * scale
    assert len(both) == 5 + 7


def test_void_figures_recommend_nothing() -> None:
    found = recommend(near(DEEP, curve=[*curve(WRITE, DEEP, void=1), *curve(READ, FLAT, 2, void=1)]), CONFIG)
    assert [one.setting for one in found if one.changes] == []
    assert [one.uncertain for one in found] == [True, True]
    shallow = recommend(near({1: 100.0, 2: 300.0}), CONFIG)  # the bytes were too few for the depth that is set
    assert not any(one.changes for one in shallow)
    assert not any(one.changes for one in recommend(far(curve(WRITE, {1: 9.0, 4: 10.0}, 5), {1: 9.0, 4: 10.0}), CONFIG))
    assert "no more than 2 in flight" in " ".join(advise.notes(near({1: 100.0, 2: 300.0}, {1: 1.0})))


def test_what_was_tried_and_was_slower_is_taken_back() -> None:
    figures = [figure("save", 500), figure("save", 300, "recommended"), figure("load", 500)]
    found = recommend(near(DEEP, figures=figures), CONFIG)
    assert values(found)["threads"] == 12
    assert "24 was tried, and the save was slower: 300 MB/s, 500 MB/s as it is" in found[0].why
    as_fast = [figure("save", 500), figure("save", 490, "recommended")]
    assert values(recommend(near(DEEP, figures=as_fast), CONFIG))["threads"] == 24
    void = [figure("save", 500), figure("save", 300, "recommended", only_void=True)]
    assert values(recommend(near(DEEP, figures=void), CONFIG))["threads"] == 24


@pytest.mark.parametrize(
    ("alone", "shared", "store", "link", "value"),
    [
        (100, 400, 1e8, 1e10, "always"),
        (1000, 200, 1e10, 1e8, "never"),
        (100, 105, 1e8, 1e10, "auto"),  # no clear difference
        (1000, 200, 1e8, 1e10, "auto"),  # small loads say no, the speeds say yes
    ],
)
def test_sharing_is_forced_only_where_both_measurements_agree(
    alone: float, shared: float, store: float, link: float, value: str
) -> None:
    figures = [figure("replicated, each rank", alone), figure("replicated, shared", shared)]
    found = Measured(False, False, 8, [], figures, sharing=[(store, link)])
    assert values(recommend(found, CONFIG)) == {"share_loads": value}


def test_deadlines_follow_the_state_that_was_told() -> None:
    figures = [figure("save", 1000), figure("load", 500)]
    said = values(recommend(near(FLAT, figures=figures, state_nbytes=10**12), CONFIG))
    assert said["timeout_s"] == pytest.approx(20_040)  # 2,000 s ten times over, in whole minutes
    assert said["preemption_budget_s"] == 3000.0
    small = values(recommend(near(FLAT, figures=figures, state_nbytes=10**9), CONFIG))
    assert (small["timeout_s"], small["preemption_budget_s"]) == (1800.0, 120.0)
    (told,) = [a for a in recommend(near(FLAT, figures=figures), CONFIG) if a.setting == "timeout_s"]
    assert (told.value, told.changes, "up to 90 GB" in told.why) == (1800.0, False, True)


def test_medians_leave_void_rounds_out_and_say_where_there_are_no_others() -> None:
    (point,) = curve_points(WRITE, {Point(4, 8 * MIB): [(10.0, False), (99.0, True), (20.0, False)]})
    assert (point.rate, point.void, point.rates) == (15.0, 1, (10.0, 99.0, 20.0))
    (point,) = curve_points(WRITE, {Point(4, 8 * MIB): [(10.0, True), (20.0, True)]})
    assert (point.rate, point.void) == (15.0, 2)
    turns = [
        Turn("save", "default", 0, 100, 1.0, (200.0, 200.0), False),
        Turn("save", "default", 1, 100, 5.0, (200.0, 90.0), True),
        Turn("load", "default", 0, 100, 1.0, (100.0, 50.0), True, cold=True),
        Turn("load", "default", 1, 100, 1.0, (100.0, 50.0), True, cold=False),
    ]
    save, load = figures_of(turns)
    assert (save.rate, save.fraction, save.void, save.only_void, save.cold) == (100.0, 0.5, 1, False, None)
    assert (load.only_void, load.cold) == (True, False)
    said = " ".join(advise.notes(near(FLAT, figures=[save, load])))
    assert "void, the storage's own speed moved by more than a fifth meanwhile: load (default)" in said
    assert "not cold (load)" in said


def test_percentiles_are_values_that_were_measured() -> None:
    (found,) = latencies_of({"commit": [float(n) for n in range(1, 101)]})
    assert (found.count, found.p50, found.p95, found.p99, found.worst) == (100, 50.0, 95.0, 99.0, 100.0)
    (one,) = latencies_of({"list": [3.0], "never": []})
    assert (one.p50, one.worst) == (3.0, 3.0)


def test_the_page_escapes_what_it_is_given_and_draws_every_size() -> None:
    target = TargetReport("/data/<script>&", {"fs_type": "ext4"}, curve=[*curve(WRITE, DEEP), *curve(WRITE, FLAT, 16)])
    target.advice = [Advice("threads", 24, 12, "1 < 2")]
    broken = TargetReport("s3://bucket", error="gone <b>", left=["x<y"])
    text = page(BenchReport(2, 1, 10**9, 3, "2026-01-01T00:00:00Z", [target, broken]))
    assert "<script>" not in text
    assert "/data/&lt;script&gt;&amp;" in text
    assert "failed: gone &lt;b&gt;" in text
    assert "left behind: x&lt;y" in text
    assert text.count("<polyline") == 2
    assert "CheckpointConfig(&#x27;/data/&lt;script&gt;&amp;&#x27;, threads=24)" in text
