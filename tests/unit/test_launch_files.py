"""The files in launch/: they parse, agree with the library, and do what they say where that is cheap to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distckpt.manager.preempt import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]


def python(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_python_scripts_compile(script: Path) -> None:
    compile(script.read_text(), str(script), "exec")


def test_the_training_script_stays_short() -> None:
    assert len((LAUNCH / "train_lm.py").read_text().splitlines()) <= 160


def test_the_kubernetes_job_gives_a_save_its_time_and_runs_again_after_it() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    options = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--"))
    codes = {code: rule["action"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
             for code in rule["onExitCodes"]["values"]}  # fmt: skip
    assert codes[EXIT_PREEMPTED] == "Ignore"
    assert pod["restartPolicy"] == "Never"  # without it the API refuses a podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] > int(options["shutdown-timeout"])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert all((ROOT / part).exists() for part in command if part.endswith(".py"))
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert (options["rdzv-endpoint"], pod["subdomain"]) == (host, service["metadata"]["name"])


FAKE_SRUN = """#!/bin/bash
trap 'echo "srun got USR1"; sleep 0.3; exit {code}' USR1
[[ -n "{signalled}" ]] || exit {code}
echo "srun runs"
for i in $(seq 300); do sleep 0.1; done
"""


@pytest.mark.parametrize(("code", "signalled", "requeued"), [(85, True, True), (85, False, False), (1, True, False)])
def test_the_slurm_job_passes_the_notice_on_and_requeues_only_after_a_save(
    tmp_path: Path, code: int, signalled: bool, requeued: bool
) -> None:
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    (tools / "srun").write_text(FAKE_SRUN.format(code=code, signalled="yes" if signalled else ""))
    (tools / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]"}
    env = {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"}
    with log.open("w") as output:
        job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch")], env=env, stdout=output, stderr=output)
    while signalled and "srun runs" not in log.read_text():
        time.sleep(0.02)
    if signalled:
        job.send_signal(10)  # SIGUSR1
    assert job.wait(60) == (0 if requeued else code)
    assert ("srun got USR1" in log.read_text()) == signalled
    assert ("scontrol requeue 77" in log.read_text()) == requeued


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (EXIT_PREEMPTED, EXIT_PREEMPTED), (1, 1)])
def test_torchrun_exit_keeps_the_workers_exit_code(tmp_path: Path, code: int, expected: int) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"import os, sys\nassert sys.argv[1:] == ['--steps', '3']\nsys.exit({code})\n")
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    done = python(LAUNCH / "torchrun_exit.py", *options, script, "--steps", "3")
    assert done.returncode == expected, done.stderr


def losses(path: Path, values: dict[int, float]) -> Path:
    path.write_text("".join(json.dumps({"step": k, "loss": v}) + "\n" for k, v in values.items()))
    return path


@pytest.mark.parametrize(
    ("run", "code"),
    [
        ({2: 0.1, 3: 0.3}, 0),
        ({2: 0.1, 3: 0.30000000000000004}, 1),  # the last bit
        ({1: 0.7, 3: 0.3}, 1),  # a step is missing
        ({2: 0.1}, 1),  # it did not get to the end
        ({}, 1),
    ],
)
def test_the_demo_finds_any_difference(tmp_path: Path, run: dict[int, float], code: int) -> None:
    reference = losses(tmp_path / "a", {1: 0.7, 2: 0.1, 3: 0.3})
    done = python(LAUNCH / "demo_compare.py", "equal", reference, losses(tmp_path / "b", run), "--until", "3")
    assert done.returncode == code, done.stdout + done.stderr
    assert ("FAILED" in done.stdout) == bool(code)


SAVER = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
attempt = pathlib.Path(sys.argv[1], "step-0000000004", "g000001-0a0b0c0d")
attempt.mkdir(parents=True)
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
attempt.joinpath("00000-of-00001.safetensors").write_bytes(b"half")
time.sleep(100)
"""


def test_the_demo_kills_a_whole_job_in_its_save(tmp_path: Path) -> None:
    done = python(LAUNCH / "demo_job.py", "--kill-in-save", tmp_path, "--", sys.executable, "-c", SAVER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILLed 2 processes" in done.stdout
    assert "no manifest: step 4 does not exist" in done.stdout
    assert not alive(int((tmp_path / "child").read_text()))


def test_the_demo_does_not_claim_a_kill_that_did_not_happen(tmp_path: Path) -> None:
    assert python(LAUNCH / "demo_job.py", "--kill-in-save", tmp_path, "--", "true").returncode == 1


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its new parent to take note does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
