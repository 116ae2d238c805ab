#!/usr/bin/env bash
# distckpt in four minutes: train, be killed in the middle of a save, resume, lose nothing.
#   bash launch/demo.sh
# Everything is left in runs/demo to look at; the next demo replaces it.
set -euo pipefail
STARTED=$SECONDS
case "${1:-train}" in
    train) ;;
    *)
        echo "usage: bash launch/demo.sh" >&2
        exit 2
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

STEPS=40 EVERY=8 RUN=runs/demo
SIZE=(--dim 192 --layers 4 --steps $STEPS --save-every $EVERY)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=ERROR
export CUDA_VISIBLE_DEVICES= # the same demo on every machine: CPU and gloo, over the loopback interface
[[ -e /sys/class/net/lo ]] && export GLOO_SOCKET_IFNAME=lo

mkdir -p runs
if command -v flock >/dev/null; then
    exec 8>runs/demo.lock
    flock -n 8 || { echo "another demo is running in $ROOT/$RUN" >&2 && exit 1; }
fi
rm -rf "$RUN"
mkdir -p "$RUN"

JOB=
cleanup() {
    local code=$?
    [[ -z $JOB ]] || { kill "$JOB" && wait "$JOB"; } 2>/dev/null || true # demo_job.py ends its processes with itself
    [[ $code -eq 0 ]] || echo "== the demo FAILED (exit $code)" >&2
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

title() { printf '\n== [%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

# job [options of demo_job.py] -- RANKS ROOT NAME [options of train_lm.py]
job() {
    local options=() code=0
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    local ranks=$2 root=$3 name=$4
    shift 4
    local torchrun=("$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks")
    local train=(launch/train_lm.py --dir "$root" --losses "$RUN/$name.jsonl" "${SIZE[@]}" "$@")
    "$PYTHON" launch/demo_job.py ${options[@]+"${options[@]}"} -- "${torchrun[@]}" "${train[@]}" 8>&- &
    JOB=$!
    wait "$JOB" || code=$?
    JOB=
    return "$code"
}
compare() { "$PYTHON" launch/demo_compare.py "$@"; }
distckpt() {
    printf '\n$ distckpt %s\n' "$*"
    "$ROOT/.venv/bin/distckpt" "$@"
}

title "2 ranks, FSDP2, $STEPS steps, never interrupted: the reference"
job -- 2 $RUN/reference reference

title "the same again; this time the whole job is SIGKILLed in the middle of a save"
for try in 1 2 3 4; do
    code=0
    job --kill-in-save $RUN/run --from-step $((2 * EVERY)) -- 2 $RUN/run killed || code=$?
    [[ $code -eq 3 && $try -lt 4 ]] || break
    echo "-- again, from that save on"
done
[[ $code -eq 0 ]] || exit 1

title "resume on 2 ranks"
job -- 2 $RUN/run resumed
echo "-- compared with the reference:"
compare equal $RUN/reference.jsonl $RUN/killed.jsonl
compare equal $RUN/reference.jsonl $RUN/resumed.jsonl --until $STEPS
compare state $RUN/reference $RUN/run --until $STEPS

middle=$((STEPS - EVERY))
for ranks in 3 1; do
    title "go on from step $middle again, on another number of ranks: $ranks"
    job -- $ranks $RUN/run on-$ranks --load $middle
    echo "-- compared with the reference:"
    compare close $RUN/reference.jsonl $RUN/on-$ranks.jsonl --until $STEPS
done

title "what is on disk"
distckpt ls --all $RUN/run
distckpt show $RUN/run
distckpt verify --all --mode full $RUN/run

title "done: killed in the middle of a save, resumed bit for bit, and carried on by 3 ranks and by 1"
