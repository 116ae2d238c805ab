"""Resuming DeepSpeed jobs: same layout bit for bit, weights alone, counters, and nothing that starts over silently."""

from __future__ import annotations

import fnmatch
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import same_bits
from ranks import run_ranks

deepspeed = pytest.importorskip("deepspeed")
import deepspeed_support  # noqa: E402
from deepspeed_support import gathered  # noqa: E402
from zero_models import Job, build_net  # noqa: E402

from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint  # noqa: E402
from distckpt.errors import IncompatibleState, SaveFailed  # noqa: E402

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP32_GRADIENTS: dict[str, Any] = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
CPU = {"device": "cpu"}
SPREAD = {"stage3_param_persistence_threshold": 8, "sub_group_size": 50}
STRICT_CLIP = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.05}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 5}}
FEATURES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "z0-fp32": ("z0", 2, {}),
    "z0-bf16-fused": ("z0", 2, {**BF16, "fused": True}),
    "z0-bf16-sgd": ("z0", 2, {**BF16, "optimizer": "sgd"}),
    "z1-bf16": ("z1", 2, BF16),
    "z1-bf16-fp32-gradients-clip": ("z1", 3, {**FP32_GRADIENTS, **STRICT_CLIP}),
    "z1-offload": ("z1", 2, {**BF16, "zero": {"offload_optimizer": CPU}}),
    "z1-adagrad": ("z1", 3, {**BF16, "optimizer": "adagrad", "groups": 1, "scheduled": False}),
    "z2-bf16-accumulate-clip": ("z2", 3, {**BF16, **STRICT_CLIP}),
    "z2-offload-sgd": ("z2", 2, {**BF16, "optimizer": "sgd", "zero": {"offload_optimizer": CPU}}),
    "z2-round-robin-nadam": ("z2", 3, {**BF16, "optimizer": "nadam", "zero": {"round_robin_gradients": True}}),
    "z2-aligned-warmup": ("z2", 2, {"scheduled": False, "scheduler": WARMUP, "zero": {"parameter_alignment": True}}),
    "z3-bf16": ("z3", 2, BF16),
    "z3-bf16-spread-accumulate-clip": ("z3", 3, {**BF16, **STRICT_CLIP, "zero": SPREAD}),
    "z3-offload-all": ("z3", 2, {**BF16, "zero": {**SPREAD, "offload_optimizer": CPU, "offload_param": CPU}}),
    "z3-rprop": ("z3", 2, {**BF16, "optimizer": "rprop", "zero": SPREAD}),
    "z3-adagrad": ("z3", 2, {**BF16, "optimizer": "adagrad", "groups": 1, "scheduled": False}),
    "z3-sgd": ("z3", 4, {"optimizer": "sgd", "zero": SPREAD}),
}
SAVED = 2
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def observe(job: Job, steps: range) -> dict[str, Any]:
    """Train on and return everything that a resume must bring back."""
    before = {"counters": {n: getattr(job.engine, n) for n in COUNTERS}, "draw": torch.rand(3).tolist()}
    losses = [job.step(number) for number in steps]
    job.link_all_groups()
    return {
        **before,
        "losses": losses,
        "state": {name: value.tolist() for name, value in job.whole_state().items()},
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in job.basic.param_groups],
        "scheduler": job.engine.lr_scheduler.state_dict() if job.engine.lr_scheduler is not None else None,
        "steps": job.steps(),
    }


def train_through(rank: int, kind: str, options: dict[str, Any], root: Path | None, fatal: int | None) -> dict[str, Any]:
    """Train 5 steps, save after 2 (if ``root``), and die at step ``fatal``, if at all."""
    job = Job(kind, **options)
    torch.manual_seed(100 + rank)
    for number in range(SAVED):
        job.step(number)
    if root is not None:
        manager = job.manager(root)
        manager.save(step=SAVED, epoch=1, metrics={"loss": 1.0}, extra_state={"client": ("a", rank * 0)})
    if fatal is not None:
        for number in range(SAVED, fatal):
            job.step(number)
        os.kill(os.getpid(), signal.SIGKILL)
    seen = observe(job, range(SAVED, 5))
    if root is not None:
        manager.close()
    return seen


def not_rounded_from(saved: Any, net: torch.nn.Module) -> list[str]:
    """Return the names of weights that are not the saved masters, rounded (ZeRO-3's persistent ones: as they are)."""
    wrong = []
    for name, parameter in net.named_parameters():
        if getattr(parameter, "ds_persist", False) and parameter.shape != parameter.ds_shape:
            wrong.append(f"{name} is not gathered")
        with gathered(parameter):
            if not same_bits(parameter.detach(), saved.read(f"model.{name}").to(parameter.dtype)):
                wrong.append(name)
    return wrong


def resume(rank: int, kind: str, options: dict[str, Any], root: Path) -> dict[str, Any]:
    job = Job(kind, seed=9, **options)
    with job.manager(root) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert (report.step, report.epoch, report.extra_state) == (SAVED, 1, {"client": ("a", 0)})
        assert report.missing == report.unexpected == report.rederived == report.cast == []
        assert report.proved is not None
        assert report.proved > 15
        assert not_rounded_from(open_checkpoint(root), job.net) == []
        return observe(job, range(SAVED, 5))


@pytest.mark.parametrize("name", FEATURES)
def test_resuming_on_the_same_layout_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    kind, world, options = FEATURES[name]
    through = run_ranks(world, train_through, kind, options, tmp_path, None)
    resumed = run_ranks(world, resume, kind, options, tmp_path)
    for before, after in zip(through, resumed, strict=True):
        assert after == before
    assert through[0]["losses"][-1] != through[0]["losses"][0]


@pytest.mark.parametrize("name", ["z1-bf16", "z3-bf16-spread-accumulate-clip"])
def test_a_killed_job_resumes_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    kind, world, options = FEATURES[name]
    undisturbed = run_ranks(world, train_through, kind, options, None, None)
    run_ranks(world, train_through, kind, options, tmp_path, 4, expect=dict.fromkeys(range(world), signal.SIGKILL))
    assert run_ranks(world, resume, kind, options, tmp_path) == undisturbed


# ---------------------------------------------------------------- weights alone


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    run_ranks(2, train_through, "z3", {**BF16, "zero": SPREAD}, root, None)
    return root


def quiet(root: Path, **options: Any) -> CheckpointConfig:
    return CheckpointConfig(
        root, preemption_signals=(), control_file=None, verbose=False, threads=2, max_consecutive_failures=0, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_load_into_a_plain_model_for_inference(dtype: torch.dtype, trained: Path) -> None:
    net = build_net(seed=8).to(dtype)
    with CheckpointManager(quiet(trained), model=net) as m:
        report = m.load(SAVED, load_optimizer=False, load_rng_state=False, cast="any", prove=True)
    assert report.missing == report.unexpected == []
    assert "engine.deepspeed" in report.skipped
    for name, value in open_checkpoint(trained).state_dict("model.").items():
        assert same_bits(net.state_dict()[name], value.to(dtype)), name
    if dtype == torch.bfloat16:
        with CheckpointManager(quiet(trained), model=net) as m, pytest.raises(IncompatibleState, match="would round it"):
            m.load(SAVED, load_optimizer=False, load_rng_state=False)


def load_weights(rank: int, kind: str, optimizer: str, root: Path) -> tuple[list[str], list[float], int]:
    job = Job(kind, seed=8, optimizer=optimizer, **BF16)
    with job.manager(root) as m:
        report = m.load(SAVED, load_optimizer=False, load_rng_state=False)
        assert not job.basic.state
        assert job.engine.global_steps == 0
        saved = open_checkpoint(root)
        wrong = [
            name
            for name, value in job.whole_state().items()
            if not same_bits(value, saved.read(name).float()) and name.startswith("model.")
        ]
        assert report.missing == report.unexpected == []
        losses = [job.step(number) for number in range(SAVED, 4)]
    return wrong + job.stale_weights(), losses, job.engine.global_steps


@pytest.mark.parametrize(("kind", "optimizer", "world"), [("z1", "sgd", 3), ("z2", "adamw", 2), ("z3", "sgd", 3)])
def test_weights_load_into_a_job_with_a_new_optimizer(kind: str, optimizer: str, world: int, trained: Path) -> None:
    for wrong, losses, steps in run_ranks(world, load_weights, kind, optimizer, trained):
        assert wrong == []
        assert losses[1] != losses[0]
        assert steps == 2


def load_for_inference(rank: int, root: Path, threshold: int) -> list[str]:
    net = build_net(seed=8)
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    engine = deepspeed_support.initialize(net, None, zero, micro_batch=2, **BF16)
    with CheckpointManager(quiet(root), engine=engine) as m:
        report = m.load(SAVED, load_optimizer=False, load_rng_state=False, cast="any", prove=True)
        assert report.missing == report.unexpected == []
    wrong = not_rounded_from(open_checkpoint(root), net)
    assert engine(torch.arange(6)).shape == (6, 13)
    return wrong


@pytest.mark.parametrize("threshold", [0, 1000])
def test_weights_load_into_zero_3_without_an_optimizer(threshold: int, trained: Path) -> None:
    assert run_ranks(3, load_for_inference, trained, threshold) == [[], [], []]


# ---------------------------------------------------------------- frozen weights in param groups


def save_all_in_one_group(rank: int, kind: str, root: Path) -> None:
    job = Job(kind, groups=0)
    job.step(0)
    with job.manager(root) as m:
        job.basic.param_groups[0]["lr"] = 0.25
        m.save(step=1)


def load_all_in_one_group(rank: int, kind: str, root: Path) -> float:
    job = Job(kind, groups=0)
    with job.manager(root) as m:
        assert m.load(1, load_rng_state=False, prove=True).missing == []
    lr = job.basic.param_groups[0]["lr"]
    job.step(1)
    assert job.steps() == {2.0}
    return lr


@pytest.mark.parametrize(("saver", "loader"), [("z2", "ddp"), ("ddp", "z3"), ("z3", "fsdp2"), ("z1", "z3")])
def test_frozen_weights_may_be_in_the_param_groups(saver: str, loader: str, tmp_path: Path) -> None:
    run_ranks(2, save_all_in_one_group, saver, tmp_path)
    assert run_ranks(3, load_all_in_one_group, loader, tmp_path) == [0.25] * 3


# ---------------------------------------------------------------- counters


def save_torch(rank: int, root: Path) -> None:
    job = Job("ddp")
    for number in range(3):
        job.step(number)
    with job.manager(root) as m:
        m.save(step=3)


def counters_after(rank: int, root: Path, step: int, options: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    job = Job("z2", **options)
    with job.manager(root) as m:
        report = m.load(step, load_rng_state=False, cast="any")
    return {name: getattr(job.engine, name) for name in COUNTERS}, report.rederived


def test_counters_of_another_engine_are_derived_from_the_step_and_reported(tmp_path: Path) -> None:
    run_ranks(2, save_torch, tmp_path)
    for counters, said in run_ranks(3, counters_after, tmp_path, 3, {"gradient_accumulation_steps": 2}):
        assert counters == {"global_steps": 3, "global_samples": 36, "skipped_steps": 0, "micro_steps": 6}
        assert any("engine.deepspeed" in sentence and "global_steps 3" in sentence for sentence in said)


def test_micro_steps_follow_a_new_accumulation_window(trained: Path) -> None:
    for counters, said in run_ranks(1, counters_after, trained, SAVED, {"gradient_accumulation_steps": 4}):
        assert counters == {"global_steps": 2, "global_samples": 24, "skipped_steps": 0, "micro_steps": 8}
        assert not any("engine.deepspeed" in sentence for sentence in said)


# ---------------------------------------------------------------- never as if from scratch


def save_with_a_gap(rank: int, kind: str, root: Path) -> str:
    job = Job(kind, **BF16)
    job.step(0)
    if rank == 1:
        state = job.basic.state
        del state[next(iter(state))]
    with job.manager(root) as m:
        try:
            m.save(step=1)
        except (IncompatibleState, SaveFailed) as error:
            return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize("kind", ["z1", "z2", "z3"])
def test_one_partition_without_state_fails_the_save(kind: str, tmp_path: Path) -> None:
    for said in run_ranks(2, save_with_a_gap, kind, tmp_path):
        assert said.startswith("IncompatibleState")
        assert "ranks [1]" in said
        assert "optim.state." in said
    assert not list(tmp_path.glob("step-*/manifest-*"))


def save_without(rank: int, pattern: str, root: Path) -> None:
    job = Job("z2", **BF16)
    job.step(0)
    with job.manager(root) as m:
        whole = m.engine.state

        def state(*, optimizer: bool) -> Any:
            found = whole(optimizer=optimizer)
            for name in [n for n in found.tensors if fnmatch.fnmatchcase(n, pattern)]:
                del found.tensors[name]
            return found

        m.engine.state = state  # type: ignore[method-assign]
        m.save(step=1)


def try_load(rank: int, kind: str, root: Path, options: dict[str, Any], load: dict[str, Any]) -> str:
    job = Job(kind, **options)
    with job.manager(root) as m:
        try:
            m.load("latest", load_rng_state=False, cast="any", **load)
        except IncompatibleState as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "pattern", "missing"),
    [
        ("z1", "optim.state.up.weight.exp_avg_sq", "optim.state.up.weight.exp_avg_sq"),
        ("z3", "optim.state.up.weight.exp_avg_sq", "optim.state.up.weight.exp_avg_sq"),
        ("z3", "optim.state.up.weight.*", "optim.state.up.weight.exp_avg"),  # alone in its sub-group
        ("z2", "optim.state.[!e]*", "optim.state.norm.bias.exp_avg"),  # one param group and more
        ("z3", "model.odd", "model.odd"),
    ],
)
def test_a_checkpoint_without_a_partition_is_refused(kind: str, pattern: str, missing: str, tmp_path: Path) -> None:
    run_ranks(2, save_without, pattern, tmp_path)
    options = {**BF16, "zero": SPREAD} if kind == "z3" else BF16
    for said in run_ranks(3, try_load, kind, tmp_path, options, {}):
        assert "not in the checkpoint: " in said
        assert missing in said
    assert run_ranks(3, try_load, kind, tmp_path, options, {"strict": False}) == [""] * 3


def save_uneven_steps(rank: int, root: Path) -> None:
    job = Job("ddp")
    job.step(0)
    for fqn, parameter in job.named():
        if fqn == "up.weight":
            job.optimizer.state[parameter]["step"].fill_(9)
    with job.manager(root) as m:
        m.save(step=1)


@pytest.mark.parametrize("kind", ["z2", "z3"])
def test_different_step_counts_within_one_partition_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    run_ranks(2, save_uneven_steps, tmp_path)
    for said in run_ranks(2, try_load, kind, tmp_path, {}, {}):
        assert "ZeRO keeps one number for all parameters of a partition" in said
        assert "up.weight has 9" in said
    assert run_ranks(2, try_load, kind, tmp_path, {}, {"load_optimizer": False}) == ["", ""]


def go_back_before_the_first_step(rank: int, kind: str, root: Path) -> tuple[bool, list[float], list[float]]:
    job = Job(kind, **BF16)
    with job.manager(root) as m:
        m.save(step=0)
        first = [job.step(number) for number in range(2)]
        m.load(0)
        return bool(job.basic.state), first, [job.step(number) for number in range(2)]


@pytest.mark.parametrize("kind", ["z1", "z3"])
def test_a_checkpoint_from_before_the_first_step_takes_the_state_away_again(kind: str, tmp_path: Path) -> None:
    for has_state, first, second in run_ranks(2, go_back_before_the_first_step, kind, tmp_path):
        assert not has_state
        assert second == first


def save_mid_window(rank: int, root: Path) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distckpt").addHandler(handler)
    job = Job("z2", **STRICT_CLIP)
    job.engine.backward(job.engine(torch.arange(3)).float().mean())
    job.engine.step()
    with job.manager(root) as m:
        m.save(step=1)
    return said


def test_a_save_between_accumulation_boundaries_warns(tmp_path: Path) -> None:
    for said in run_ranks(2, save_mid_window, tmp_path):
        assert any("saved after micro batch 1 of 2" in message for message in said)
