#!/usr/bin/env bash
# Start training with torchrun: on this host alone, or as one of several hosts. Copy the line that you need.
#
#   bash launch/torchrun.sh                                  one host, a process per GPU (or per core without a GPU)
#   NPROC=4 bash launch/torchrun.sh --steps 500              one host, 4 processes; arguments go to the training script
#   NNODES=2 HEAD=node0:29400 bash launch/torchrun.sh        the same on each of 2 hosts; HEAD is any one of them
#
# Run it again after a crash, on as many hosts as there are: it goes on from the newest whole checkpoint. The folder of
# the checkpoints (--dir) must be the same storage on all hosts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

NNODES=${NNODES:-1}
NPROC=${NPROC:-auto}                                  # auto: one per GPU; torchrun counts cores where there is none
TORCHRUN=("$PYTHON" "$ROOT/launch/torchrun_exit.py")  # torchrun that leaves with 85 when the job was preempted
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Large copies in host memory go past the caches: docs/storage.md, "Copies in host memory".
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.cpu.x86_non_temporal_threshold=65536}

# After a SIGTERM torchrun waits this long for its workers before it kills them: the time a last save has.
SHUTDOWN=(--shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}")

if [[ $NNODES == 1 ]]; then
    # One host: --standalone takes a free port of the loopback interface, so that several jobs can share the host.
    exec "${TORCHRUN[@]}" --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" "${SHUTDOWN[@]}" \
        "$ROOT/launch/train_lm.py" "$@"
fi

# Several hosts: all run this same line and meet at HEAD. JOB tells this job from others that meet there.
exec "${TORCHRUN[@]}" --nnodes "$NNODES" --nproc-per-node "$NPROC" "${SHUTDOWN[@]}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?HEAD=host:port of one of the hosts}" --rdzv-id "${JOB:-distckpt}" \
    "$ROOT/launch/train_lm.py" "$@"
