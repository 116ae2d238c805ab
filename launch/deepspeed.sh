#!/usr/bin/env bash
# Start ZeRO training on one host or several. Copy the line that you need. ZERO names a stage: zero1, zero2, zero3 or
# zero3_offload, or any other DeepSpeed configuration.
#
#   bash launch/deepspeed.sh                                          one host, a process per GPU, ZeRO-3
#   NPROC=2 ZERO=zero2 bash launch/deepspeed.sh --steps 500           2 processes (also without a GPU), ZeRO-2
#   HOSTFILE=hosts bash launch/deepspeed.sh                           several hosts, from one of them, over ssh (pdsh)
#   HOSTFILE=hosts NODE=1 HEAD=node0 bash launch/deepspeed.sh         several hosts without ssh: on each, with its NODE
#   LAUNCHER=torchrun NPROC=2 bash launch/deepspeed.sh                torchrun on one host
#   LAUNCHER=torchrun NNODES=2 HEAD=node0:29400 bash launch/deepspeed.sh        torchrun on each of 2 hosts
#
# A hostfile has lines such as "node0 slots=8". Run it again after a crash, on as many hosts as there are and with the
# stage that fits them: it goes on from the newest whole checkpoint. --dir must be the same storage on all hosts.
set -euo pipefail
EXTRAS=deepspeed
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ZERO=${ZERO:-zero3}
[[ -e $ZERO ]] || ZERO=$ROOT/launch/$ZERO.json
TRAIN=("$ROOT/launch/train_zero.py" --zero "$ZERO" "$@")
DEEPSPEED=("$ROOT/.venv/bin/deepspeed" --master_port "${PORT:-29500}")
# torchrun that leaves with 85 when the job was preempted; the deepspeed launcher does so by itself.
TORCHRUN=("$PYTHON" "$ROOT/launch/torchrun_exit.py" --nproc-per-node "${NPROC:-auto}")
TORCHRUN+=(--shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Large copies in host memory go past the caches: docs/storage.md, "Copies in host memory".
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.cpu.x86_non_temporal_threshold=65536}

if [[ ${LAUNCHER:-deepspeed} == torchrun && ${NNODES:-1} == 1 ]]; then
    exec "${TORCHRUN[@]}" --standalone --local-addr 127.0.0.1 "${TRAIN[@]}"
elif [[ ${LAUNCHER:-deepspeed} == torchrun ]]; then
    exec "${TORCHRUN[@]}" --nnodes "$NNODES" --rdzv-backend c10d \
        --rdzv-endpoint "${HEAD:?HEAD=host:port of one of the hosts}" --rdzv-id "${JOB:-distckpt}" "${TRAIN[@]}"
elif [[ -n ${HOSTFILE:-} && -n ${NODE:-} ]]; then
    exec "${DEEPSPEED[@]}" --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE" \
        --master_addr "${HEAD:?HEAD=name of the first host}" "${TRAIN[@]}"
elif [[ -n ${HOSTFILE:-} ]]; then
    exec "${DEEPSPEED[@]}" --hostfile "$HOSTFILE" "${TRAIN[@]}"
fi
exec "${DEEPSPEED[@]}" ${NPROC:+--num_gpus "$NPROC"} "${TRAIN[@]}"
