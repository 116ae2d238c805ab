"""What distckpt relies on in DeepSpeed, and what it refuses: one list each, checked when the manager is built.

DeepSpeed has no public access to its partitions. Every attribute that is read or written is listed here with the
versions that the tests ran with; a version that lacks one is refused by name, before any training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from distckpt.errors import IncompatibleState

log = logging.getLogger("distckpt")

TESTED = ("0.19.8",)
"""Versions of DeepSpeed that the tests ran with."""

ENGINE_ATTRIBUTES = (
    "module",
    "optimizer",
    "basic_optimizer",
    "lr_scheduler",
    "global_steps",
    "global_samples",
    "skipped_steps",
    "micro_steps",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "train_batch_size",
    "torch_autocast_z0_gradscaler",
)
_COMMON = ("optimizer", "overflow", "custom_loss_scaler", "external_loss_scale")
OPTIMIZER_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": (
        *_COMMON,
        "loss_scaler",
        "torch_autocast_gradscaler",
        "bit16_groups_flat",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "round_robin_bit16_indices",
        "round_robin_bit16_padding",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "offloaded_states",
        "update_lp_params",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ),
    "BF16_Optimizer": (
        *_COMMON,
        "bf16_groups",
        "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        *_COMMON,
        "loss_scaler",
        "torch_autocast_gradscaler",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "grad_position",
        "get_param_id",
        "offloaded_states",
        "parameter_offload",
        "persistent_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    "FP16_UnfusedOptimizer": (*_COMMON, "loss_scale_config", "fp16_groups", "fp32_groups"),
    "FP16_Optimizer": (*_COMMON, "loss_scale_config", "fp16_groups", "fp32_groups_flat"),
    "DeepSpeedZeRoOffload": ("persistent_parameters", "partition_all_parameters"),
}
"""Attributes by wrapper optimizer; a subclass needs those of its bases."""
REAL_BF16_ATTRIBUTES = (
    "fp32_groups_flat_partition",
    "real_dp_process_group",
    "_hp_optimizer_states_linked",
    "_lazy_init_hp_params_optimizer_state",
)
"""Further ones of a ``BF16_Optimizer`` that wraps a real optimizer."""
PARAMETER_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": ("_hp_mapping",),
    "BF16_Optimizer": ("_hp_mapping",),
    "DeepSpeedZeroOptimizer_Stage3": ("ds_tensor", "ds_shape", "ds_numel", "ds_process_group", "all_gather_coalesced"),
    "DeepSpeedZeRoOffload": ("ds_tensor", "ds_shape", "ds_numel", "ds_process_group", "all_gather_coalesced"),
}
"""Attributes of every parameter (stages 1 and 2: every trained one)."""


def _ask(owner: Any, name: str, default: Any = None) -> Any:
    """Return an attribute's value, calling it if it is a method; ``default`` where it is missing or None."""
    value = getattr(owner, name, None)
    value = value() if callable(value) else value
    return default if value is None else value


def _parameters(engine: Any) -> list[Any]:
    return list(engine.module.parameters())


def _groups(engine: Any) -> list[Any]:
    return list(getattr(engine.optimizer, "param_groups", None) or ())


def _device(config: Any) -> str:
    device = getattr(config, "device", None)
    return str(getattr(device, "value", device))


REFUSED: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    (
        "pipeline parallelism (PipelineModule)",
        lambda e: _ask(e, "pipeline_parallelism") or "PipelineEngine" in class_names(e),
    ),
    ("the hybrid engine (RLHF)", lambda e: "DeepSpeedHybridEngine" in class_names(e)),
    (
        "AutoEP (automatic expert parallelism)",
        lambda e: (
            getattr(e, "_autoep_folding_spec", None) is not None
            or any(getattr(p, "ds_zero_placement_family", "replicated") != "replicated" for p in _parameters(e))
        ),
    ),
    (
        "mixture-of-experts parameter groups",
        lambda e: _ask(e, "has_moe_layers", False) or any(group.get("moe") for group in _groups(e)),
    ),
    (
        "swapping to NVMe",
        lambda e: (
            _ask(e.optimizer, "swap_optimizer")
            or _ask(e.optimizer, "params_in_nvme_and_cpu")
            or "nvme" in (_device(_ask(e, "zero_offload_optimizer")), _device(_ask(e, "zero_offload_param")))
        ),
    ),
    (
        "MiCS",
        lambda e: (
            any(name.startswith("MiCS") for name in class_names(e.optimizer))
            or _ask(e, "mics_shard_size", 0) > 0
            or any(getattr(p, "comm", None) is not None and hasattr(p, "ds_tensor") for p in _parameters(e))
        ),
    ),
    ("ZeRO++ secondary partitions (zero_hpz_partition_size)", lambda e: _ask(e, "zero_hpz_partition_size", 1) > 1),
    (
        "ZeRO++ quantized weights",
        lambda e: _ask(e, "zero_quantized_weights") or _ask(e, "zero_quantized_nontrainable_weights"),
    ),
    ("ZenFlow", lambda e: _ask(e, "zenflow") or _ask(e.optimizer, "zenflow")),
    (
        "SuperOffload",
        lambda e: _ask(e, "super_offload") or "SuperOffloadOptimizer_Stage3" in class_names(e.optimizer),
    ),
    (
        "partial optimizer offload (offload_optimizer.ratio below 1)",
        lambda e: _ask(e.optimizer, "offload_optimizer") and _ask(e.optimizer, "partial_offload", 1.0) < 1.0,
    ),
    (
        "tensor parallelism (AutoTP, or an mpu with more than one rank)",
        lambda e: _ask(e, "autotp_size", 1) > 1 or _ask(e, "mp_world_size", 1) > 1,
    ),
    ("sequence parallelism", lambda e: _ask(e, "sequence_parallel_size", 1) > 1),
)
"""Features whose state has another shape than what is saved here: name, and whether an engine uses it."""


def class_names(value: Any) -> frozenset[str]:
    """Return the names of a value's class and of all its bases."""
    return frozenset(cls.__name__ for cls in type(value).__mro__)


def is_deepspeed(value: Any) -> bool:
    """Whether a value is a DeepSpeed training engine; never imports DeepSpeed."""
    return any(
        cls.__name__ == "DeepSpeedEngine" and cls.__module__.partition(".")[0] == "deepspeed"
        for cls in type(value).__mro__
    )


def version() -> str:
    """Return the version of the DeepSpeed that this process has loaded."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "(unknown version)"))


def check(engine: Any) -> None:
    """Raise ``IncompatibleState`` if the engine lacks an attribute that is relied on, or uses what is refused."""
    _require(engine, "DeepSpeedEngine", ENGINE_ATTRIBUTES)
    for feature, used in REFUSED:
        if used(engine):
            raise IncompatibleState(
                f"this DeepSpeed engine uses {feature}, whose state distckpt does not save; switch it off, or checkpoint "
                "with engine.save_checkpoint. Supported: ZeRO stages 0 to 3, with CPU offload"
            )
    _check_optimizer(engine)
    if version().partition("+")[0] not in TESTED:
        log.warning("DeepSpeed %s: distckpt was tested with %s", version(), ", ".join(TESTED))


def _check_optimizer(engine: Any) -> None:
    wrapper = engine.optimizer
    names = class_names(wrapper)
    if "DeepSpeedOptimizer" in names and not names & set(OPTIMIZER_ATTRIBUTES):
        raise IncompatibleState(
            f"DeepSpeed {version()} made a {type(wrapper).__name__}, which distckpt does not know; it knows "
            f"{', '.join(OPTIMIZER_ATTRIBUTES)}"
        )
    for name in names & set(OPTIMIZER_ATTRIBUTES):
        _require(wrapper, name, OPTIMIZER_ATTRIBUTES[name])
        if name == "BF16_Optimizer" and getattr(wrapper, "bf16_groups", None):
            _require(wrapper, name, REAL_BF16_ATTRIBUTES)
        for param in _linked_params(wrapper, name, engine):
            _require(param, f"a parameter under {name}", PARAMETER_ATTRIBUTES.get(name, ()))


def _linked_params(wrapper: Any, name: str, engine: Any) -> Iterable[Any]:
    if name == "DeepSpeedZeroOptimizer":
        return [p for group in wrapper.round_robin_bit16_groups for p in group]
    if name == "BF16_Optimizer":
        return [p for group in wrapper.bf16_groups for p in group]
    return _parameters(engine)


def _require(owner: Any, label: str, attributes: tuple[str, ...]) -> None:
    absent = [name for name in attributes if not hasattr(owner, name)]
    if absent:
        raise IncompatibleState(
            f"DeepSpeed {version()}: {label} has no {', '.join(absent)}, which distckpt relies on; it was tested with "
            f"DeepSpeed {', '.join(TESTED)}: install one of these"
        )
