"""Run one job of the demo; SIGKILL all of it in the middle of a save if asked to; leave no process behind.

    python launch/demo_job.py [--kill-in-save ROOT --from-step N] -- COMMAND ...

Exits with the command's code. With --kill-in-save: 0 if the kill left a torn attempt, 3 if the save was faster than
the kill (then it is committed, and the caller tries again), 1 if the job ended before any save.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def parents() -> dict[int, int]:
    """Return the parent of every process."""
    if not Path("/proc/self/stat").exists():
        lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return {int(pid): int(parent) for pid, parent in (line.split() for line in lines.splitlines())}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    return found


def tree(root: int) -> list[int]:
    """Return ``root`` and all processes below it, the deepest first."""
    known, order = parents(), [root]
    for pid in order:
        order += [child for child, parent in known.items() if parent == pid]
    return order[::-1]


def kill_all(job: subprocess.Popen[bytes]) -> int:
    """SIGKILL a job's ranks, then what started them; return how many processes that were."""
    if job.poll() is not None:
        return 0
    pids = tree(job.pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()
    return len(pids)


def open_attempts(root: Path, from_step: int) -> list[Path]:
    """Return the attempt folders that hold bytes of a shard and have no manifest beside them."""
    found = []
    for attempt in root.glob("step-*/g*-*"):
        step, generation = int(attempt.parent.name.removeprefix("step-")), attempt.name.partition("-")[0]
        if step >= from_step and not (attempt.parent / f"manifest-{generation}.json").exists():
            found += [attempt] if any(size_of(shard) for shard in attempt.glob("*.safetensors")) else []
    return found


def size_of(path: Path) -> int:
    """Return a file's size; 0 if it is removed while we look."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def report(root: Path, torn: Path, killed: int) -> None:
    step = int(re.sub(r"\D", "", torn.parent.name))
    print(f"-- SIGKILLed {killed} processes while step {step} was being saved. On disk now:")
    for path in sorted(torn.parent.rglob("*")):
        size = f"{path.stat().st_size:>12,} bytes" if path.is_file() else ""
        print(f"     {path.relative_to(root)!s:60}{size}")
    print(f"   A torn attempt, and no manifest: step {step} does not exist.", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-in-save", type=Path, metavar="ROOT")
    parser.add_argument("--from-step", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which the job is given up")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    root, deadline = args.kill_in_save, time.monotonic() + args.timeout
    old = set(open_attempts(root, 0)) if root else set()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))  # runs the finally below
    job = subprocess.Popen(args.command)
    try:
        while job.poll() is None:
            if time.monotonic() > deadline:
                print(f"-- the job did not end within {args.timeout:.0f} s: given up", flush=True)
                return 1
            torn = set(open_attempts(root, args.from_step)) - old if root else set()
            if torn:
                killed = kill_all(job)
                still_torn = [attempt for attempt in open_attempts(root, args.from_step) if attempt in torn]
                if not still_torn:
                    print("-- SIGKILLed, but that save was faster: it is committed", flush=True)
                    return 3
                report(root, still_torn[0], killed)
                return 0
            time.sleep(0.001 if root else 0.1)
        if root:
            print("-- the job ended before it could be killed in a save", flush=True)
        return 1 if root else job.returncode
    finally:
        kill_all(job)


if __name__ == "__main__":
    sys.exit(main())
