"""DeepSpeed in fp16 on a GPU: the dynamic loss scale, its overflows and the skipped steps come back too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = '''
import json, sys
import deepspeed, torch
from distckpt import CheckpointConfig, CheckpointManager

stage, root, resume = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
deepspeed.init_distributed()
torch.manual_seed(7 if resume else 3)
model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
    # Starts far too high: the first steps overflow and are skipped, then the scale doubles every 3 steps.
    "fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1},
}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

def step(number):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(number)).half().to(engine.device)
    loss = engine(x).float().square().mean() * 100
    engine.backward(loss)
    engine.step()
    return loss.item()

options = dict(preemption_signals=(), control_file=None, verbose=False)
with CheckpointManager(CheckpointConfig(root, **options), engine=engine) as manager:
    if resume:
        manager.resume(prove=True)
    else:
        for number in range(20):
            step(number)
        manager.save(step=20)
    seen = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps", "micro_steps")}
    seen["scale"] = engine.optimizer.cur_scale
    seen["losses"] = [step(number) for number in range(20, 30)]
    seen["scale after"] = engine.optimizer.cur_scale
print("SEEN " + json.dumps(seen))
'''


def run(stage: int, root: Path, what: str) -> dict[str, object]:
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + stage)}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(stage), str(root), what], env=env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("SEEN "))
    return dict(json.loads(line.removeprefix("SEEN ")))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_resumes_with_its_loss_scale(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    through = run(stage, tmp_path, "train")
    assert through["skipped_steps"]
    assert run(stage, tmp_path, "resume") == through
