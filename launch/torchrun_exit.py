"""Run torchrun, and exit with the code that its workers left with, 85 for preempted; torchrun itself always says 1.

    python launch/torchrun_exit.py --nnodes 2 --nproc-per-node 8 ... launch/train_lm.py --dir ...

Takes torchrun's arguments. Each worker notes its exit code in a folder of this host. If all that failed note the same
code, this is the exit code here too; else it is torchrun's. A worker without a note does not count, since torchrun
ends the others once one has left. So a scheduler can tell 85 (saved, run me again) from 1 (broken) and 2 (wrong use).
"""

import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

FOLDER = "DISTCKPT_EXIT_CODES"
PREEMPTED = 85  # distckpt.manager.preempt.EXIT_PREEMPTED


def worker(script: str, arguments: list[str]) -> None:
    """Run the training script in this very process, which therefore gets all signals, and note how it ended."""
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        if code == PREEMPTED:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others once the first one has left
        Path(os.environ[FOLDER], os.environ["RANK"]).write_text(str(code))


def launcher(arguments: list[str]) -> int:
    from torch.distributed import run

    parsed = run.parse_args(arguments)
    own = arguments[: len(arguments) - len(parsed.training_script_args) - 1]
    with tempfile.TemporaryDirectory(prefix="exit-codes-") as folder:
        os.environ[FOLDER] = folder
        failed: BaseException | None = None
        try:
            run.main([*own, __file__, "--worker", parsed.training_script, *parsed.training_script_args])
        except BaseException as error:  # ChildFailedError, SignalException, SystemExit: all end here
            failed = error
        codes = {note.read_text() for note in Path(folder).iterdir()} - {"0"}
    if len(codes) == 1 and codes != {"1"}:
        print(f"torchrun_exit: the workers left with {codes}", file=sys.stderr)
        return int(codes.pop())
    if failed is not None:
        raise failed
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(launcher(sys.argv[1:]))
