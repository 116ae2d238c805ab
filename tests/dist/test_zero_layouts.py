"""Any ZeRO stage to any other layout, both ways: masters and optimizer state bit for bit, as DeepSpeed itself shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_models import same_bits
from ranks import run_ranks

pytest.importorskip("deepspeed")
from zero_models import Job, salted

from distckpt import open_checkpoint

WORLDS = {"one": (1,), "ddp": (2, 3, 4), "fsdp2": (1, 2, 3, 4), "z1": (1, 2, 3, 4), "z2": (1, 2, 3, 4), "z3": (1, 2, 3, 4)}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    f"{kind}-{world}": (kind, world, {}) for kind, worlds in WORLDS.items() for world in worlds
}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
SPREAD = {"stage3_param_persistence_threshold": 8, "sub_group_size": 50}
LAYOUTS |= {
    "z0-bf16-2": ("z0", 2, BF16),
    "z1-bf16-fp32-gradients-3": ("z1", 3, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "z2-bf16-offload-2": ("z2", 2, {**BF16, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    "z2-round-robin-3": ("z2", 3, {"zero": {"round_robin_gradients": True, "parameter_alignment": True}}),
    "z3-bf16-offload-3": (
        "z3",
        3,
        {**BF16, "zero": {**SPREAD, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ),
    "z3-sub-groups-2": ("z3", 2, {"zero": SPREAD}),
}
SALTS = {name: salt for salt, name in enumerate(LAYOUTS, start=3)}
TRAINED = 2
"""Steps behind the checkpoint from which every layout trains on."""
ROUNDING = 1e-5
"""Relative: float32 losses may differ by the order of sums, over ranks and over ZeRO's buckets."""


def is_bf16(name: str) -> bool:
    return "bf16" in name


def save_one(rank: int, name: str, root: Path) -> None:
    kind, _, options = LAYOUTS[name]
    job = Job(kind, scheduled=False, **options)
    job.step(0)
    job.fill(SALTS[name])
    with job.manager(root) as m:
        assert m.save(step=7) is not None


def train(rank: int, root: Path) -> list[float]:
    job = Job("z2")
    for number in range(TRAINED):
        job.step(number)
    with job.manager(root) as m:
        m.save(step=TRAINED)
    return [job.step(TRAINED), job.step(TRAINED + 1)]


def load_all(rank: int, name: str, roots: dict[str, Path], trained: Path) -> tuple[dict[str, list[str]], list[float]]:
    kind, _, options = LAYOUTS[name]
    job = Job(kind, scheduled=False, seed=5, **options)
    wrong = {}
    for number, (source, root) in enumerate(roots.items()):
        with job.manager(root) as m:
            cast = "any" if is_bf16(name) and not is_bf16(source) else "exact"
            report = m.load(7, load_rng_state=False, prove=number % 8 == 0 and cast == "exact", cast=cast)
            assert report.missing == report.unexpected == []
            frozen = {"model.frozen.weight", "model.frozen.bias"}
            assert set(report.cast) == (frozen if is_bf16(name) != is_bf16(source) else set())
        wrong[source] = job.differences(SALTS[source], rounded=is_bf16(name) or is_bf16(source))
    job = Job(kind, seed=6, **options)
    with job.manager(trained) as m:
        report = m.load(TRAINED, load_rng_state=False, cast="any")
    return wrong, [job.step(TRAINED), job.step(TRAINED + 1)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {}
    for name, (_, world, _) in LAYOUTS.items():
        roots[name] = tmp_path_factory.mktemp(name)
        run_ranks(world, save_one, name, roots[name])
    return roots


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    root = tmp_path_factory.mktemp("trained")
    return root, run_ranks(2, train, root)[0]


def in_the_long_run(name: str) -> bool:
    """Every save is loaded in any case; of the loaders with three or four ranks the long run has more."""
    return LAYOUTS[name][1] > 2 and name not in ("z3-4", "z3-bf16-offload-3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if in_the_long_run(n) else n for n in LAYOUTS])
def test_every_layout_loads_every_save_and_trains_on(
    name: str, saved: dict[str, Path], trained: tuple[Path, list[float]]
) -> None:
    root, losses = trained
    for wrong, here in run_ranks(LAYOUTS[name][1], load_all, name, saved, root):
        assert wrong == {source: [] for source in LAYOUTS}
        if name == "z2-2":
            assert here == losses
        assert here == pytest.approx(losses, rel=0.05 if is_bf16(name) else ROUNDING)


@pytest.mark.parametrize("name", ["z1-3", "z2-4", "z3-3", "z3-bf16-offload-3", "z2-round-robin-3"])
def test_a_checkpoint_is_whole_without_padding(name: str, saved: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(saved[name])
    assert checkpoint.verify(mode="full").ok
    values = checkpoint.state_dict("")
    for fqn, value in values.items():
        if fqn.endswith(".step"):
            assert value.shape == ()
            assert value == SALTS[name]
        elif ".frozen." in fqn and is_bf16(name):
            assert value.dtype == torch.bfloat16
        else:
            assert same_bits(value, salted(SALTS[name], fqn, tuple(value.shape))), fqn
    assert same_bits(values["model.head.weight"], values["model.emb.weight"])
    assert not any(fqn.startswith(("model.module.", "optim.state.module.")) for fqn in values)
    assert "model.scratch" not in values
    assert "optim.state.frozen.weight.exp_avg" not in values
    stored = sum(info.nbytes for fqn, info in checkpoint.tensors.items() if fqn != "model.head.weight")
    size = sum(path.stat().st_size for path in saved[name].glob("step-*/g*/*"))
    assert stored < size < stored + LAYOUTS[name][1] * 40_000  # a header each, and not one byte of padding


# ---------------------------------------------------------------- nothing is gathered, memory is bounded

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast", "gather", "reduce",
               "reduce_scatter", "reduce_scatter_tensor", "scatter", "all_to_all_single", "send", "recv")  # fmt: skip


def save_watched(rank: int, kind: str, options: dict[str, Any], root: Path) -> tuple[int, int, list[str]]:
    job = Job(kind, width=512, **options)
    job.step(0)
    called: list[str] = []
    with job.manager(root, async_save=True) as m:
        for name in COLLECTIVES:
            _watch(name, called)
        m.save(step=1)
        m.wait()
        staged = m.pipeline.arena.nbytes
    wrapper = job.engine.optimizer
    flats = [*getattr(wrapper, "single_partition_of_fp32_groups", ()), *getattr(wrapper, "fp32_partitioned_groups_flat", ())]
    local = sum(flat.numel() for flat in flats) * 4 * 3  # master, exp_avg, exp_avg_sq
    return staged, local, called


def _watch(name: str, called: list[str]) -> None:
    import deepspeed.comm.torch as backend

    real = getattr(dist, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return real(*args, **kwargs)

    setattr(dist, name, watched)
    if hasattr(backend.torch.distributed, name):
        setattr(backend.torch.distributed, name, watched)


@pytest.mark.parametrize(("kind", "world"), [("z1", 3), ("z2", 4), ("z3", 2), ("z3", 4)])
def test_a_save_gathers_nothing_and_stages_only_its_own_bytes(kind: str, world: int, tmp_path: Path) -> None:
    options = {"zero": {**SPREAD, "sub_group_size": 5000}} if kind == "z3" else {}
    outcomes = run_ranks(world, save_watched, kind, options, tmp_path)
    whole = sum(info.nbytes for info in open_checkpoint(tmp_path).tensors.values())
    for staged, local, called in outcomes:
        assert called == []
        assert staged <= local + whole * 0.17 / world + 14_096  # frozen weights are shared out; pieces start aligned
        assert staged < whole / world * 1.1 + 14_096
