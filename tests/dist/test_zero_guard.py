"""The contract with DeepSpeed's internals: what is relied on is listed and there, what is not covered is refused by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

deepspeed = pytest.importorskip("deepspeed")
import deepspeed_support  # noqa: E402
from zero_models import Job, build_net  # noqa: E402

from distckpt import CheckpointConfig, CheckpointManager  # noqa: E402
from distckpt.engines import deepspeed_guard as guard  # noqa: E402
from distckpt.engines.deepspeed_counters import Counters  # noqa: E402
from distckpt.errors import ConfigError, IncompatibleState  # noqa: E402

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "FP16_UnfusedOptimizer": ("z0", BF16),
    "FP16_Optimizer": ("z0", {**BF16, "fused": True}),
    "BF16_Optimizer": ("z1", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "DeepSpeedZeroOptimizer": ("z2", BF16),
    "DeepSpeedZeroOptimizer_Stage3": ("z3", BF16),
}


def test_the_installed_version_is_a_tested_one() -> None:
    assert deepspeed.__version__.partition("+")[0] in guard.TESTED


# ---------------------------------------------------------------- every listed attribute is there, and needed


def hide(owner: Any, name: str) -> Any:
    """Take an attribute away from an object, wherever it is defined; returns how to put it back."""
    places = [owner.__dict__, owner._modules] if isinstance(owner, nn.Module) else [vars(owner)]
    found = [(place, place.pop(name)) for place in places if name in place]
    if found:
        return lambda: [place.update({name: value}) for place, value in found]
    holder = next(cls for cls in type(owner).__mro__ if name in vars(cls))
    value = vars(holder)[name]
    delattr(holder, name)
    return lambda: setattr(holder, name, value)


def refusals_without(owner: Any, names: tuple[str, ...], engine: Any) -> list[str]:
    """Return the listed attributes whose absence the guard does not report by name and version."""
    unnoticed = []
    for name in names:
        back = hide(owner, name)
        try:
            guard.check(engine)
            unnoticed.append(name)
        except IncompatibleState as error:
            if f" {name}" not in str(error) or deepspeed.__version__ not in str(error):
                unnoticed.append(f"{name}: {error}")
        finally:
            back()
    return unnoticed


def check_contract(rank: int, wrapper: str) -> list[str]:
    kind, options = ENGINES[wrapper]
    engine = Job(kind, **options).engine
    assert wrapper in guard.class_names(engine.optimizer)
    guard.check(engine)
    names = guard.OPTIMIZER_ATTRIBUTES[wrapper]
    names += guard.REAL_BF16_ATTRIBUTES if wrapper == "BF16_Optimizer" else ()
    unnoticed = refusals_without(engine, guard.ENGINE_ATTRIBUTES, engine)
    unnoticed += refusals_without(engine.optimizer, tuple(n for n in names if n != "param_groups"), engine)
    parameter = next(engine.module.parameters())
    return unnoticed + refusals_without(parameter, guard.PARAMETER_ATTRIBUTES.get(wrapper, ()), engine)


@pytest.mark.parametrize("wrapper", ENGINES)
def test_every_listed_attribute_exists_and_its_absence_is_named(wrapper: str) -> None:
    assert run_ranks(1, check_contract, wrapper) == [[]]


def check_offload_contract(rank: int) -> list[str]:
    engine = deepspeed_support.initialize(build_net(), None, {"stage": 3}, micro_batch=2, **BF16)
    guard.check(engine)
    names = guard.OPTIMIZER_ATTRIBUTES["DeepSpeedZeRoOffload"]
    return refusals_without(engine.optimizer, names, engine)


def test_zero_3_without_an_optimizer_is_listed_too() -> None:
    assert run_ranks(1, check_offload_contract) == [[]]


def attributes_read(*holders: str) -> set[str]:
    """Return the attributes that the adapter's files read from variables of these names."""
    found = set()
    for file in ("deepspeed", "deepspeed_counters", "deepspeed_state", "zero"):
        tree = ast.parse((Path(guard.__file__).parent / f"{file}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in holders:
                found.add(node.attr)
            asked = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
            if asked and ast.unparse(node.args[0]) in holders and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
    return found


def test_what_is_read_from_deepspeed_is_listed() -> None:
    listed = {n for names in guard.OPTIMIZER_ATTRIBUTES.values() for n in names} | set(guard.REAL_BF16_ATTRIBUTES)
    read = attributes_read("optimizer", "self.engine.optimizer")
    assert len(read) > 25
    assert read - listed == set()
    read = attributes_read("engine", "self.engine")
    assert len(read) > 5
    assert read - set(guard.ENGINE_ATTRIBUTES) == set()


# ---------------------------------------------------------------- refused by name


def fake(**features: Any) -> Any:
    """Return something with everything that the guard asks of an engine, and the given features."""
    base: dict[str, Any] = dict.fromkeys(guard.ENGINE_ATTRIBUTES)
    return SimpleNamespace(**{**base, "module": nn.Linear(2, 2), "optimizer": None, **features})


def of_class(name: str, **features: Any) -> Any:
    found = type(name, (SimpleNamespace,), {})(**vars(fake(**features)))
    assert type(found).__name__ == name
    return found


def marked(**attributes: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(module.weight, name, value)
    return module


NVME = SimpleNamespace(device=SimpleNamespace(value="nvme"))
USES: list[tuple[str, Any]] = [
    ("pipeline parallelism", fake(pipeline_parallelism=True)),
    ("pipeline parallelism", of_class("PipelineEngine")),
    ("hybrid engine", of_class("DeepSpeedHybridEngine")),
    ("AutoEP", fake(_autoep_folding_spec=object())),
    ("AutoEP", fake(module=marked(ds_zero_placement_family="autoep_expert"))),
    ("mixture-of-experts", fake(has_moe_layers=True)),
    ("mixture-of-experts", fake(optimizer=SimpleNamespace(param_groups=[{"moe": True}]))),
    ("NVMe", fake(optimizer=SimpleNamespace(swap_optimizer=True))),
    ("NVMe", fake(zero_offload_optimizer=lambda: NVME)),
    ("NVMe", fake(zero_offload_param=lambda: NVME)),
    ("MiCS", fake(mics_shard_size=lambda: 2)),
    ("MiCS", fake(optimizer=type("MiCS_Optimizer", (), {})())),
    ("MiCS", fake(module=marked(comm=object(), ds_tensor=torch.zeros(1)))),
    ("secondary partitions", fake(zero_hpz_partition_size=lambda: 2)),
    ("quantized weights", fake(zero_quantized_weights=lambda: True)),
    ("quantized weights", fake(zero_quantized_nontrainable_weights=lambda: True)),
    ("ZenFlow", fake(zenflow=True)),
    ("ZenFlow", fake(optimizer=SimpleNamespace(zenflow=True))),
    ("SuperOffload", fake(super_offload=lambda: True)),
    ("SuperOffload", fake(optimizer=type("SuperOffloadOptimizer_Stage3", (), {})())),
    ("partial optimizer offload", fake(optimizer=SimpleNamespace(offload_optimizer=True, partial_offload=0.3))),
    ("tensor parallelism", fake(autotp_size=lambda: 2)),
    ("tensor parallelism", fake(mp_world_size=2)),
    ("sequence parallelism", fake(sequence_parallel_size=2)),
]


def test_an_engine_with_none_of_these_passes() -> None:
    guard.check(fake())


@pytest.mark.parametrize(("feature", "engine"), USES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(USES)])
def test_what_is_not_covered_is_refused_by_name(feature: str, engine: Any) -> None:
    with pytest.raises(IncompatibleState, match=feature):
        guard.check(engine)


def test_every_refusal_is_tested() -> None:
    names = [name for name, _ in guard.REFUSED]
    assert {name for name in names if not any(feature in name for feature, _ in USES)} == set()


def test_an_unknown_wrapper_is_refused_by_its_name() -> None:
    base = type("DeepSpeedOptimizer", (), {})
    engine = fake(optimizer=type("DeepSpeedZeroOptimizer_Stage4", (base,), {})())
    with pytest.raises(IncompatibleState, match="DeepSpeedZeroOptimizer_Stage4, which distckpt does not know"):
        guard.check(engine)


def make_manager(rank: int, root: Path, how: str) -> str:
    try:
        if how == "pipeline":
            deepspeed.init_distributed(dist_init_required=False)
            model = deepspeed.pipe.PipelineModule([nn.Linear(4, 4), nn.Linear(4, 2)], num_stages=1, loss_fn=nn.MSELoss())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine = deepspeed_support.initialize(model, optimizer, {"stage": 1}, micro_batch=2)
        else:
            engine = Job("z3", zero={"zero_hpz_partition_size": 2}).engine
        CheckpointManager(CheckpointConfig(root), engine=engine)
    except IncompatibleState as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(("how", "named"), [("pipeline", "pipeline parallelism"), ("hpz", "secondary partitions")])
def test_real_engines_are_refused_when_the_manager_is_built(how: str, named: str, tmp_path: Path) -> None:
    for said in run_ranks(2, make_manager, tmp_path, how):
        assert named in said
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- which engine it is


def hand_over(rank: int, root: Path) -> str:
    with pytest.raises(ConfigError, match="pass engine="):
        CheckpointManager(CheckpointConfig(root), model=Job("z1").engine)
    with pytest.raises(ConfigError, match="not an engine"):
        CheckpointManager(CheckpointConfig(root), engine=object())
    return Job("z1").manager(root).engine.name


def test_an_engine_is_recognised_and_not_taken_for_a_model(tmp_path: Path) -> None:
    assert run_ranks(1, hand_over, tmp_path) == ["deepspeed"]


def test_deepspeed_is_not_imported_by_a_job_without_it() -> None:
    code = (
        "import sys, torch\n"
        "from distckpt.engines.choose import engine_for\n"
        "engine_for(torch.nn.Linear(2, 2), None)\n"
        "import distckpt.engines.deepspeed\n"
        "print('deepspeed' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# ---------------------------------------------------------------- contradictions are not guessed away


def tamper(job: Job, how: str) -> None:
    first = next(p for p in job.net.parameters() if p.requires_grad)
    wrapper = job.engine.optimizer
    if how == "replaced":
        first.data = first.data.clone()
    elif how == "mapping":
        mapping = next(p._hp_mapping for p in job.net.parameters() if getattr(p, "_hp_mapping", None))
        mapping.hp_fragment_address.start += 1
    elif how == "position":
        wrapper.grad_position[wrapper.get_param_id(first)][1] += 1
    elif how == "offloaded":
        wrapper.offloaded_states = {"optim_states"}
    else:
        flat = next(iter(job.basic.state))
        job.basic.state[flat]["row"] = torch.zeros(3)


def save_tampered(rank: int, kind: str, how: str, root: Path) -> str:
    job = Job(kind)
    job.step(0)
    with job.manager(root) as m:
        tamper(job, how)
        try:
            m.save(step=1)
        except IncompatibleState as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("z1", "replaced", "its memory lies elsewhere"),
        ("z2", "mapping", "DeepSpeed maps its fragment to"),
        ("z3", "position", "contradict each other"),
        ("z2", "offloaded", "reload_states"),
        ("z3", "state", "one value per element"),
    ],
)
def test_records_that_contradict_each_other_fail_the_save(kind: str, how: str, message: str, tmp_path: Path) -> None:
    for said in run_ranks(2, save_tampered, kind, how, tmp_path):
        assert message in said


# ---------------------------------------------------------------- counters and loss scale


def scaled_engine(**scaler: Any) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    optimizer = SimpleNamespace(
        loss_scaler=DynamicLossScaler(
            init_scale=2.0**scaler.get("power", 16), scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        ),
        overflow=False,
        custom_loss_scaler=False,
        external_loss_scale=None,
    )
    return SimpleNamespace(
        optimizer=optimizer, global_steps=0, global_samples=0, skipped_steps=0, micro_steps=0,
        gradient_accumulation_steps=lambda: scaler.get("window", 1), managed_gradient_accumulation=lambda: True,
        train_batch_size=lambda: 8, torch_autocast_z0_gradscaler=None,
    )  # fmt: skip


def test_a_dynamic_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)
    engine = scaled_engine()
    story = [False, False, True, True, False, False, True, False, False, False]
    for overflow in story[:6]:
        engine.optimizer.loss_scaler.update_scale(overflow)
    engine.optimizer.overflow = True
    engine.global_steps, engine.skipped_steps, engine.global_samples, engine.micro_steps = 6, 2, 48, 6
    other = scaled_engine(power=4)
    Counters(other).load_state_dict(Counters(engine).state_dict())
    for overflow in story[6:]:
        engine.optimizer.loss_scaler.update_scale(overflow)
        other.optimizer.loss_scaler.update_scale(overflow)
    assert vars(other.optimizer.loss_scaler) == vars(engine.optimizer.loss_scaler)
    assert other.optimizer.overflow is True
    assert (other.global_steps, other.skipped_steps, other.global_samples, other.micro_steps) == (6, 2, 48, 6)


def test_a_dynamic_scale_is_not_forced_on_a_static_one() -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    static = scaled_engine()
    static.optimizer.loss_scaler = LossScaler(scale=1.0)
    Counters(static).load_state_dict(Counters(scaled_engine()).state_dict())
    assert static.optimizer.loss_scaler.cur_scale == 1.0


def test_micro_steps_resume_at_a_boundary() -> None:
    engine = scaled_engine(window=4)
    engine.micro_steps, engine.global_steps = 10, 2
    other = scaled_engine(window=4)
    Counters(other).load_state_dict(Counters(engine).state_dict())
    assert other.micro_steps == 8
