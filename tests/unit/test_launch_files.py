"""The files in launch/: they parse, agree with the library, and do what they say where that is cheap to see."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from distckpt import CheckpointConfig, CheckpointManager
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


def test_extras_are_installed_together_and_only_when_one_is_new(tmp_path: Path) -> None:
    """A checkout whose interpreter only notes what it is asked for."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "launch/venv.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    log, python3 = tmp_path / "log", tmp_path / ".venv" / "bin" / "python"
    python3.write_text(f'#!/bin/bash\n[[ "$*" != *install* ]] || echo "${{@: -1}}" >>{log}\n')
    python3.chmod(0o755)
    log.touch()
    for extras in ("deepspeed,eval", "deepspeed,eval", "eval", "deepspeed", "", "report", "report,eval"):
        line = f"set -euo pipefail; {f'EXTRAS={extras}; ' if extras else ''}source {tmp_path}/launch/venv.sh"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert log.read_text().split() == [".[test,deepspeed,eval]", ".[test,report]", ".[test,report,eval]"]


@pytest.mark.parametrize(("name_of_extra", "library"), [("eval", "statsmodels"), ("export", "onnxruntime")])
def test_the_constraints_pin_all_that_an_extra_needs(name_of_extra: str, library: str) -> None:
    pytest.importorskip(library)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines if "==" in line}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name_of_extra]
    for name in (re.split(r"[^\w-]", line)[0] for line in extra):
        needs = [re.split(r"[^\w.-]", line)[0] for line in metadata.requires(name) or () if "extra ==" not in line]
        assert {re.sub(r"[-_.]+", "-", need).lower() for need in (name, *needs)} <= pinned, name


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


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (3, False), (3, True)])
def test_every_zero_configuration_is_the_same_training(stage: int, offload: bool) -> None:
    name = f"zero{stage}_offload.json" if offload else f"zero{stage}.json"
    config, first = (json.loads((LAUNCH / n).read_text()) for n in (name, "zero1.json"))
    zero = config.pop("zero_optimization")
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offload, offload)
    assert config.pop("zero_force_ds_cpu_optimizer", None) is (False if offload else None)
    assert config == {k: v for k, v in first.items() if k != "zero_optimization"}
    assert config["bf16"] == {"enabled": True}
    assert all(config["train_batch_size"] % ranks == 0 for ranks in (1, 2, 3, 4))


def test_the_constraints_pin_all_that_deepspeed_needs() -> None:
    pytest.importorskip("deepspeed")
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    needed = {re.split(r"[^\w-]", line)[0] for line in metadata.requires("deepspeed") or () if "extra ==" not in line}
    assert {"deepspeed", *needed} <= pinned


def test_the_zero_script_never_compiles_on_a_cpu() -> None:
    pytest.importorskip("deepspeed")
    told = "import train_zero; print('compiles:', train_zero.deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'])"
    done = python("-c", told, PYTHONPATH=str(LAUNCH), DS_ACCELERATOR="cpu")
    assert "compiles: False" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def two_pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Checkpoints of steps 1 and 2 of a tiny GPT, and the held-out loss of each."""
    import torch

    sys.path.insert(0, str(LAUNCH))
    try:
        from train_lm import GPT, stdlib_windows
    finally:
        sys.path.remove(str(LAUNCH))
    root, shape, found = tmp_path_factory.mktemp("pieces"), {"dim": 32, "layers": 1}, []
    torch.manual_seed(0)
    model = GPT(**shape).eval()
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False)
    with CheckpointManager(config, model=model) as manager, torch.no_grad():
        for step in (1, 2):
            manager.save(step=step, model_config=shape)
            found.append(float(model(stdlib_windows()[-24:])))
            model.head.weight.zero_()  # ln 256, better than any random weights
    return root, found


@pytest.mark.parametrize(
    ("loaded", "off", "code"),
    [(1, 0.0, 0), (1, 1e-4, 1), (2, 0.0, 1)],
    ids=["as it was", "another held-out loss after the load", "a step is missing"],
)
def test_the_demo_finds_a_break_in_the_curve(
    tmp_path: Path, two_pieces: tuple[Path, list[float]], loaded: int, off: float, code: int
) -> None:
    root, (held_out, better) = two_pieces
    legs = {
        "ZeRO-3 on 2": [{"step": 1, "loss": 6.0, "val_loss": held_out + 1e-3}],
        "FSDP2 on 2": [{"step": loaded, "val_loss_after_load": held_out + off}, {"step": 2, "loss": 5.6, "val_loss": better}],
    }  # fmt: skip
    for name, lines in legs.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = python(LAUNCH / "demo_curve.py", root, *(f"{name}={tmp_path / name}" for name in legs))
    assert done.returncode == code, done.stdout + done.stderr
    assert ("FAILED" in done.stdout) == bool(code), done.stderr


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


# ---------------------------------------------------------------- the classifier's demonstration


def launch_module(name: str) -> Any:
    sys.path.insert(0, str(LAUNCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(LAUNCH))


def test_the_classifier_demo_stops_without_the_reviews(tmp_path: Path) -> None:
    """A checkout whose pip can install nothing, and a folder with other data than is known."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "launch/venv.sh", "launch/demo.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python3 = tmp_path / ".venv" / "bin" / "python"
    python3.write_text('#!/bin/bash\n[[ "$*" != *--target* ]]\n')
    python3.chmod(0o755)
    command = ["bash", str(tmp_path / "launch" / "demo.sh"), "classifier"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout
    assert "nothing is made up" in done.stderr
    assert "train a small BERT" not in done.stdout

    reviews = pytest.importorskip("pandas") and launch_module("demo_reviews")
    with pytest.raises(reviews.NotTheData, match="is not there"):
        reviews.main(tmp_path, tmp_path / "out")
    other = tmp_path / reviews.FILE
    other.parent.mkdir(parents=True)
    other.write_bytes(b"made up")
    with pytest.raises(reviews.NotTheData, match="another version of the data"):
        reviews.main(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_constraints_pin_what_the_classifier_demo_needs() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[^\w-]", line)[0] for line in extra} <= pinned


def test_the_classifier_demo_has_one_vocabulary() -> None:
    pytest.importorskip("pandas")
    vocabulary = launch_module("demo_reviews").vocabulary
    texts = ["The dress, the DRESS!", "a dress fits", "fits a b"]
    found = vocabulary(texts)
    assert found[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert found.index("dress") < found.index("fits") < found.index("the")  # three times; twice each, by name
    assert {"z", "##z"}.isdisjoint(found)
    assert {"t", "##t"} <= set(found)
    assert len(set(found)) == len(found)
    assert vocabulary(reversed(texts)) == found


def test_the_classifier_demo_finds_an_export_that_is_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from evaluation_support import WORDS, tiny_bert, tiny_tokenizer

    model = tiny_bert(1)
    model.config.id2label, model.config.label2id = {0: "other", 1: "negative"}, {"other": 0, "negative": 1}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    demo, rows = launch_module("demo_classify"), tmp_path / "test.jsonl"
    texts = [f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:12]]
    rows.write_text("".join(json.dumps({"text": text, "label": "negative"}) + "\n" for text in texts))
    hits = demo.classify(tmp_path / "model", texts).count("negative")
    for told, code in (([hits, len(texts)], 0), ([hits + 1, len(texts)], 1)):
        table = {"rows": [{"name": "step 3", "test": {"counts": {"recall_negative": told}}}]}
        (tmp_path / "comparison.json").write_text(json.dumps(table))
        assert demo.main(tmp_path / "model", rows, tmp_path / "comparison.json", "step 3") == code
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_classifier_demo() -> None:
    """Under four minutes on two idle cores; installs what is missing."""
    done = subprocess.run(["bash", str(LAUNCH / "demo.sh"), "classifier"], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = ROOT / "runs" / "demo-classifier"
    table = json.loads((run / "comparison.json").read_text())
    assert {row["kind"] for row in table["rows"]} >= {"single", "average", "ema", "ensemble"}
    assert table["words"][0] in done.stdout
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "model" / "config.json").exists()
