#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest, paths from the top of the checkout:
#   bash tests/run.sh tests/unit -k sampler
#   bash tests/run.sh -m slow        # the long ones, left out otherwise
set -euo pipefail
EXTRAS=deepspeed,eval,export,plots
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
cd "$ROOT"

# Tests run many small processes on few cores: one thread each, or they fight for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUNBUFFERED=1

echo "== ruff"
"$PYTHON" -m ruff check .
echo "== mypy"
"$PYTHON" -m mypy
echo "== pytest"
# Two at a time: most tests wait for processes, disks and deadlines. A file's tests stay together, and files in order: those
# that fork ranks come before those that fill the process with libraries, which every fork would pay for.
exec "$PYTHON" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@" # last, so that its summary closes the output
