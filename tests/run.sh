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
if (( $# )); then
    echo "== mypy"
    "$PYTHON" -m mypy
    echo "== pytest"
    exec "$PYTHON" -m pytest --durations=10 "$@"
fi
echo "== mypy, beside the first tests"
"$PYTHON" -m mypy &
MYPY=$!
echo "== pytest"
# Two at a time: most of it waits for processes, disks and deadlines. A file's tests stay together, in the order of conftest.py.
"$PYTHON" -m pytest --durations=10 --numprocesses 2 --dist loadfile --no-loadscope-reorder || failed=$?
wait "$MYPY" || failed=$?
exit "${failed:-0}"
