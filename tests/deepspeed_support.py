"""DeepSpeed in tests: imported once on the CPU, warm before ranks fork, and never compiling anything.

``deepspeed.init_distributed`` on the CPU wants to compile ``deepspeed_shm_comm`` (minutes; a killed compile leaves a
lock on which every later run waits). It asks ``deepspeed.ops.__compatible_ops__`` first, so saying there that the op is
not compatible is enough: collectives then go through gloo.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Whatever DeepSpeed compiles in spite of all goes to a folder of this session, not to the user's extension cache.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"distckpt-ext-{os.getpid()}"))
deepspeed = pytest.importorskip("deepspeed")

for _name in (
    "torch._dynamo",
    "torch._inductor.compile_fx",  # deepspeed.initialize imports Muon, which decorates with torch.compile
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
    "distckpt.engines.deepspeed",
):
    importlib.import_module(_name)

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def gathered(parameter: Any, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """Gather a ZeRO-3 parameter for a while; nothing to do for any other."""
    if not hasattr(parameter, "ds_tensor"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter], **options)


def initialize(model: Any, optimizer: Any, zero: dict[str, Any], *, micro_batch: int, **config: Any) -> Any:
    """Return a DeepSpeed engine on the process group that ``run_ranks`` made. ``zero``: the ``zero_optimization`` section."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **config,
    }
    scheduler = config.pop("lr_scheduler", None)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=scheduler, dist_init_required=False
    )[0]
