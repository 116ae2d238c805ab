"""Averages of checkpoints: their numbers, what goes into them, what is refused, and what stays when it fails."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from averaging_support import contents, full, mean, root, same, step_of
from safetensors.torch import save_file
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, average_checkpoints, open_checkpoint
from distckpt.averaging import blend as blends
from distckpt.averaging import write
from distckpt.averaging.average import Options, combine_checkpoints
from distckpt.averaging.sources import Term
from distckpt.errors import ConfigError, CorruptCheckpoint, IncompatibleState, ShardError
from distckpt.format import flat_reader, read_ahead
from distckpt.importers.convert import convert


def some(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    return [
        {
            "up.weight": torch.randn(300, 70).to(dtype),
            "up.bias": torch.randn(300).to(dtype),
            "scale": torch.randn(()).to(dtype),
        }
        for _ in range(count)
    ]


def assert_one_rounding(found: torch.Tensor, values: list[torch.Tensor], weights: list[float] | None = None) -> None:
    """Compare with the mean in fp64: off by at most half the distance to the next number of the dtype."""
    weights = weights or [1.0] * len(values)
    exact = sum(w / sum(weights) * v.double() for w, v in zip(weights, values, strict=True))
    assert isinstance(exact, torch.Tensor)
    spacing = torch.nextafter(found.abs(), torch.tensor(torch.inf, dtype=found.dtype)).double() - found.abs().double()
    assert ((found.double() - exact).abs() <= 0.5001 * spacing + 1e-12).all()


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_uniform_and_weighted_means_are_exact_to_one_rounding(tmp_path: Path, count: int) -> None:
    states = some(count)
    run = root(tmp_path / "run", states)
    report = average_checkpoints(run, tmp_path / "out")
    assert (report.step, report.averaged, report.copied, len(report.members)) == (count, 3, 0, count)
    for name, value in contents(tmp_path / "out").items():
        assert_one_rounding(value, [state[name] for state in states])
    weights = [float(i + 1) for i in range(count)]
    paths = [step_of(run, i + 1) for i in range(count)]
    average_checkpoints(paths, tmp_path / "weighted", "weighted", weights=weights)
    for name, value in contents(tmp_path / "weighted").items():
        assert_one_rounding(value, [state[name] for state in states], weights)


def test_a_sum_of_64_in_bfloat16_is_as_good_as_one_rounding(tmp_path: Path) -> None:
    """A running sum in bf16 is off by 2 % at 64 terms; half a unit in the last place is 0.2 %."""
    torch.manual_seed(0)
    values = [torch.randn(4000).bfloat16() + 1 for _ in range(64)]
    average_checkpoints(root(tmp_path / "run", [{"w": v} for v in values]), tmp_path / "out")
    exact = torch.stack([v.double() for v in values]).mean(0)
    found = contents(tmp_path / "out")["w"]
    assert_one_rounding(found, values)
    naive = values[0].clone()
    for value in values[1:]:
        naive += value
    assert ((naive / 64).double() - exact).abs().max() > 4 * (found.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_that_leave_the_range_where_means_do_not(tmp_path: Path, dtype: torch.dtype) -> None:
    big = torch.tensor([40000.0, torch.finfo(dtype).max, torch.finfo(dtype).min, 1.0]).to(dtype)
    average_checkpoints(root(tmp_path / "run", [{"w": big}] * 4), tmp_path / "out")
    same(contents(tmp_path / "out"), {"w": big})


def test_equal_members_give_themselves_back_for_any_count(tmp_path: Path) -> None:
    state = some(1)[0] | {
        "h": torch.randn(99).half(),
        "b": torch.randn(99).bfloat16(),
        "c": torch.randn(9, dtype=torch.cfloat),
    }
    average_checkpoints(root(tmp_path / "run", [state] * 7), tmp_path / "out")
    same(contents(tmp_path / "out"), state)


def test_a_linear_combination_with_negative_weights_over_several_prefixes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    states = [{f"ema.{i}.w": torch.randn(50) for i in (0, 1)} | {"w": torch.randn(50)} for _ in range(2)]
    run = root(tmp_path / "run", states)
    weights = {(1, 0): 1.75, (1, 1): -0.5, (2, 0): -1.5, (2, 1): 1.25}
    terms = [Term(str(step_of(run, step)), w, f"ema.{i}.") for (step, i), w in weights.items()]
    combine_checkpoints(terms, tmp_path / "out", method="posthoc")
    exact = sum(w * states[step - 1][f"ema.{i}.w"].double() for (step, i), w in weights.items())
    assert isinstance(exact, torch.Tensor)
    found = contents(tmp_path / "out")
    assert found.keys() == {"w"}
    assert torch.allclose(found["w"], exact.float(), rtol=1e-6, atol=1e-7)
    said = open_checkpoint(tmp_path / "out").provenance["averaged_from"]
    assert [(row["step"], row["prefix"], row["weight"]) for row in said] == [
        (step, f"ema.{i}.", w) for (step, i), w in weights.items()
    ]
    with pytest.raises(ConfigError, match="sum to"):
        combine_checkpoints(terms[:3], tmp_path / "other")


def test_block_sizes_threads_and_the_order_of_paths_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    states = [
        {"a": torch.randn(1301, 701), "h": torch.randn(1 << 20).bfloat16(), "t": torch.randn(3)} for _ in range(5)
    ]
    run = root(tmp_path / "run", states, shard_bytes=3 << 20)
    paths = [step_of(run, i + 1) for i in range(5)]
    wanted = None
    for number, (block, threads) in enumerate([(4 << 20, 5), (1 << 20, 1), (3 << 10, 3)]):
        monkeypatch.setattr(blends, "BLOCK_BYTES", block)
        monkeypatch.setattr(write, "REQUEST", max(1 << 20, block))
        random.Random(number).shuffle(paths)
        average_checkpoints(paths, tmp_path / f"out-{number}", threads=threads)
        found = contents(tmp_path / f"out-{number}")
        wanted = wanted or found
        same(found, wanted)


# ---------------------------------------------------------------- what goes in


def test_sources_of_every_kind_layout_and_dtype_mix(tmp_path: Path) -> None:
    states = some(4)
    states[1] = {name: value.bfloat16() for name, value in states[1].items()}
    root(tmp_path / "run", states[:1], shard_bytes=20_000)
    (tmp_path / "hf").mkdir()
    save_file(states[1], tmp_path / "hf" / "model.safetensors")
    dcp.save({"model": states[2]}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save({"model": states[3], "step": 9}, tmp_path / "weights.pt")
    paths = [tmp_path / "run", tmp_path / "hf", tmp_path / "dcp", tmp_path / "weights.pt"]
    report = average_checkpoints(paths, tmp_path / "out")
    assert report.step == 9
    assert {row["kind"] for row in report.members} == {"distckpt", "huggingface", "dcp", "torch"}
    exact = {n: torch.stack([s[n].double() for s in states]).mean(0).float() for n in states[0]}
    for name, value in contents(tmp_path / "out").items():
        assert torch.allclose(value, exact[name], rtol=1e-6, atol=1e-7), name
    average_checkpoints(paths[::-1], tmp_path / "again")
    same(contents(tmp_path / "again"), contents(tmp_path / "out"))
    average_checkpoints(paths, tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for value in contents(tmp_path / "half").values()} == {torch.bfloat16}
    convert(tmp_path / "out", tmp_path / "exported", to="huggingface")  # an ordinary checkpoint: it goes on from there
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_rules_choose_from_a_root(tmp_path: Path) -> None:
    states = [{"w": torch.full((3,), float(i))} for i in range(1, 9)]
    losses = [{"loss": abs(i - 3.2)} for i in range(1, 9)]
    run = root(tmp_path / "run", states, metrics=losses)
    cases: dict[str, tuple[dict[str, Any], list[int]]] = {
        "last": ({"k": 3}, [6, 7, 8]),
        "best": ({"k": 2, "metric": "loss", "mode": "min"}, [3, 4]),
        "every": ({"every": 3}, [2, 5, 8]),
        "window": ({"window": (2, 4)}, [2, 3, 4]),
        "uniform": ({"steps": [1, 8]}, [1, 8]),
    }
    for method, (rule, steps) in cases.items():
        report = average_checkpoints(run, tmp_path / method, method, **rule)
        assert [row["step"] for row in report.members] == steps, method
        same(contents(tmp_path / method), {"w": torch.full((3,), sum(steps) / len(steps))})
    assert average_checkpoints(run, tmp_path / "five", "last").step == 8
    for method, rule, text in [
        ("last", {"k": 9}, "only 8"),
        ("best", {"metric": "f1", "mode": "max", "k": 1}, "only 0"),
        ("best", {"metric": "loss"}, "mode"),
        ("best", {}, "needs metric"),
        ("uniform", {"steps": [1, 77]}, "77"),
        ("window", {"window": (20, None)}, "none of 8"),
        ("weighted", {}, "go together"),
        ("weighted", {"weights": [1.0]}, "1 weights for 8"),
        ("weighted", {"weights": [1.0, -1.0] * 4}, "above 0"),
        ("median", {}, "choose one of"),
    ]:
        with pytest.raises(ConfigError, match=text):
            average_checkpoints(run, tmp_path / "none", method, **rule)
    assert not (tmp_path / "none").exists()


def test_the_same_checkpoint_twice_and_its_own_root_are_refused(tmp_path: Path) -> None:
    run = root(tmp_path / "run", some(2))
    with pytest.raises(ConfigError, match="twice"):
        average_checkpoints([run, step_of(run, 1)], tmp_path / "out")
    with pytest.raises(ConfigError, match="root of its own"):
        average_checkpoints(run, run, step=50)
    average_checkpoints(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="newest step is 2"):
        average_checkpoints(run, tmp_path / "out")
    assert average_checkpoints(run, tmp_path / "out", step=3).step == 3


def test_integers_and_flags_are_the_newests_or_must_be_equal(tmp_path: Path) -> None:
    states = [
        {
            "w": torch.ones(2),
            "ids": torch.arange(4),
            "flags": torch.tensor([True, i == 3]),
            "count": torch.tensor(7 * i),
        }
        for i in range(4)
    ]
    run = root(tmp_path / "run", states)
    report = average_checkpoints(run, tmp_path / "out")
    assert (report.averaged, report.copied) == (1, 3)
    same(contents(tmp_path / "out"), states[3])  # 21, not (0 + 7 + 14 + 21) // 4
    with pytest.raises(IncompatibleState, match=r"model\.(count|flags)"):
        average_checkpoints(run, tmp_path / "equal", integers="equal")
    assert not list((tmp_path / "equal").glob("*/manifest*"))
    average_checkpoints([step_of(run, 2)], tmp_path / "one", integers="equal")


def test_patterns_copy_from_the_newest(tmp_path: Path) -> None:
    states = [{"w": torch.ones(2) * i, "attn.mask": torch.tensor([0.0, -torch.inf])} for i in range(3)]
    run = root(tmp_path / "run", states)
    with pytest.raises(IncompatibleState, match=r"model\.attn\.mask is NaN or infinite.*copy="):
        average_checkpoints(run, tmp_path / "out")
    average_checkpoints(run, tmp_path / "masks", copy=["*.mask"])
    same(contents(tmp_path / "masks"), {"w": torch.ones(2), "attn.mask": states[0]["attn.mask"]})


def test_tied_weights_are_averaged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    values = [torch.randn(6, 4) for _ in range(3)]
    tied = root(tmp_path / "tied", [{"embed.weight": v} for v in values], aliases={"head.weight": "embed.weight"})
    report = average_checkpoints(tied, tmp_path / "out")
    assert (report.averaged, report.aliases) == (1, 1)
    assert open_checkpoint(tmp_path / "out").manifest.aliases == {"model.head.weight": "model.embed.weight"}
    both = {"embed.weight": values[0], "head.weight": values[0].clone()}
    (tmp_path / "hf").mkdir()
    save_file(both, tmp_path / "hf" / "model.safetensors")  # the same tie, stored twice
    report = average_checkpoints([tmp_path / "hf", step_of(tied, 2)], tmp_path / "mixed")
    assert (report.averaged, report.aliases) == (1, 1)
    save_file(both | {"head.weight": values[1]}, tmp_path / "hf" / "model.safetensors")
    report = average_checkpoints([tmp_path / "hf", step_of(tied, 3)], tmp_path / "untied")
    assert (report.averaged, report.aliases) == (2, 0)
    assert "two different tensors" in report.notes[0]
    assert "two different tensors" in caplog.text
    found = contents(tmp_path / "untied")
    assert torch.equal(found["head.weight"], mean([values[1], values[2]]))
    assert torch.equal(found["embed.weight"], mean([values[0], values[2]]))


def trained(folder: Path) -> tuple[nn.Module, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    config = CheckpointConfig(folder, preemption_signals=(), verbose=False)
    with CheckpointManager(config, model=model, optimizer=optimizer, scheduler=scheduler) as manager:
        manager.resume()
        for step in range(1, 4):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            manager.save(step=step, epoch=step, metrics={"loss": 1.0}, model_config={"width": 4})
    return model, optimizer, scheduler


def test_optimizer_state_only_on_request_and_a_job_resumes_from_it(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained(tmp_path / "run")
    saved = [open_checkpoint(step_of(tmp_path / "run", i)) for i in (1, 2, 3)]
    average_checkpoints(tmp_path / "run", tmp_path / "lean")
    assert {name.split(".")[0] for name in open_checkpoint(tmp_path / "lean").manifest.tensors} == {"model"}
    average_checkpoints(tmp_path / "run", tmp_path / "whole", include_optimizer=True)
    config = CheckpointConfig(tmp_path / "whole", preemption_signals=(), verbose=False)
    with CheckpointManager(config, model=model, optimizer=optimizer, scheduler=scheduler) as manager:
        report = manager.resume()
        assert report is not None
        assert (report.step, report.epoch, report.model_config, report.missing) == (3, 3, {"width": 4}, [])
        exact = mean([found.read("model.weight") for found in saved])
        assert torch.allclose(model.weight, exact, rtol=1e-6)
        moments = mean([found.read("optim.state.weight.exp_avg") for found in saved])
        assert torch.allclose(optimizer.state[model.weight]["exp_avg"], moments, rtol=1e-6)
        assert optimizer.state[model.weight]["step"] == 3  # not 2: counts are no weights
        assert scheduler.last_epoch == 3
        assert manager.save(step=4) is not None


# ---------------------------------------------------------------- what is refused


def refused(tmp_path: Path, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], text: str) -> None:
    for order in ((one, other), (other, one)):
        run = root(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", list(order))
        with pytest.raises(IncompatibleState, match=text):
            average_checkpoints(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_tensors_are_named(tmp_path: Path) -> None:
    base = some(1)[0]
    refused(tmp_path, base, base | {"extra.weight": torch.ones(1)}, r"model\.extra\.weight")
    shorter = {name: value for name, value in base.items() if name != "up.bias"}
    refused(tmp_path, base, shorter, r"lacks model\.up\.bias")
    refused(tmp_path, base, base | {"up.weight": torch.ones(300, 71)}, r"model\.up\.weight is \[300, 7[01]\]")
    # As many elements, and as many tensors: no zip would notice.
    refused(tmp_path, base, base | {"up.weight": torch.ones(70, 300)}, "differ in shape")
    renamed = {name.replace("up.", "down."): value for name, value in base.items()}
    refused(tmp_path, base, renamed, "different tensors")
    refused(tmp_path, base, base | {"scale": torch.tensor(3)}, "different kinds")


def test_different_heads_and_label_orders_are_named(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    one = root(tmp_path / "one", [state], config={"id2label": {0: "good", 1: "bad"}, "vocab_size": 10})
    two = root(tmp_path / "two", [state, state], config={"id2label": {"0": "bad", "1": "good"}, "vocab_size": 10})
    same_one = root(tmp_path / "same", [state] * 3, config={"id2label": {"0": "good", "1": "bad"}})
    none = root(tmp_path / "none", [state] * 4)
    with pytest.raises(IncompatibleState, match=r"different models.*id2label"):
        average_checkpoints([one, step_of(two, 2)], tmp_path / "out")
    report = average_checkpoints([one, step_of(same_one, 3), step_of(none, 4)], tmp_path / "out")
    assert "no config to compare" in report.notes[0]
    assert open_checkpoint(tmp_path / "out").config == {"id2label": {"0": "good", "1": "bad"}}


def test_different_vocabularies_are_named(tmp_path: Path) -> None:
    def folder(name: str, vocabulary: dict[str, int], settings: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file({"w": torch.ones(3) * len(name)}, path / "model.safetensors")
        tokenizer = {
            "model": {"vocab": vocabulary},
            "truncation": settings,
            "added_tokens": [{"id": 9, "content": "<s>"}],
        }
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        return path

    one, two = folder("a", {"x": 0, "y": 1}, None), folder("bb", {"y": 1, "x": 0}, {"max": 5})
    average_checkpoints([one, two], tmp_path / "out")
    with pytest.raises(IncompatibleState, match=r"tokenizer\.json"):
        average_checkpoints([one, folder("ccc", {"x": 1, "y": 0}, None)], tmp_path / "other")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    states = some(3, dtype)
    states[1]["up.weight"][7, 9] = bad
    with pytest.raises(
        IncompatibleState, match=r"model\.up\.weight is NaN or infinite in .*step-0000000002 \(1 elements\)"
    ):
        average_checkpoints(root(tmp_path / "run", states), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest*"))


def test_results_beyond_their_dtype_are_refused(tmp_path: Path) -> None:
    run = root(tmp_path / "run", [{"w": torch.tensor([1e6, 1.0])}] * 2)
    with pytest.raises(IncompatibleState, match="too large for float16"):
        average_checkpoints(run, tmp_path / "out", dtype="float16")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4)}
    with pytest.raises(IncompatibleState, match=r"model\.w\.weight is quantised"):
        average_checkpoints(root(tmp_path / "run", [state] * 2), tmp_path / "out")


# ---------------------------------------------------------------- failure


def test_a_damaged_source_is_refused_by_file(tmp_path: Path) -> None:
    run = root(tmp_path / "run", some(3))
    shard = next(step_of(run, 2).glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=shard.name):
        average_checkpoints(run, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest*"))
    shutil.rmtree(tmp_path / "out")
    average_checkpoints(run, tmp_path / "out", steps=[1, 3])
    shard.unlink()
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        average_checkpoints(run, tmp_path / "other")


@pytest.mark.parametrize("at", [300_000, 2_500_000])
def test_long_tensors_are_summed_and_verified_where_they_were_read_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    states = [{"w": torch.randn(1500, 1000)} for _ in range(3)]
    source = root(tmp_path / "run", states, shard_bytes=64 << 20)
    copies: list[Any] = []
    for module, name in ((read_ahead, "copy_memory"), (flat_reader, "fill_flat")):
        monkeypatch.setattr(module, name, lambda *args: copies.append(args))
    average_checkpoints(source, tmp_path / "out")
    assert not copies
    monkeypatch.undo()
    assert_one_rounding(contents(tmp_path / "out")["w"], [s["w"] for s in states])
    shard = next(step_of(source, 2).glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) - 6_000_000 + at] ^= 1
    shard.write_bytes(data)
    first = len(data) - 6_000_000 + at // 262_144 * 262_144
    with pytest.raises(ShardError, match=rf"{shard.name}.* bytes \[{first}, {first + 262_144}\) of 'model\.w',"):
        average_checkpoints(source, tmp_path / "other")


def test_extra_memory_does_not_depend_on_the_model(tmp_path: Path) -> None:
    """Buffers are lent, not made: after the first blocks no further one is allocated, whatever is left to do."""
    from distckpt.averaging.blend import Blend
    from distckpt.averaging.sources import open_members
    from distckpt.averaging.structure import Rules

    run = root(tmp_path / "run", [{"w": torch.ones(5 << 20) * i} for i in range(3)])
    blend = Blend(open_members([Term(str(step_of(run, i))) for i in (1, 2, 3)]), Rules())
    options = Options(threads=2)
    from distckpt.dcp.agreement import Agreement

    target = write.Target(str(tmp_path / "out"), 3, options.threads, options.shard_bytes, 60.0)
    write.write_blend(blend, target, {}, Agreement(None, 0, 1, timeout_s=60.0))
    assert blend._pool.allocations <= 2 * 3
    assert full("w") in open_checkpoint(tmp_path / "out").tensors
