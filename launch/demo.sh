#!/usr/bin/env bash
# distckpt in four minutes: train, be killed in the middle of a save, resume, lose nothing.
#   bash launch/demo.sh               FSDP2, resumed bit for bit
#   bash launch/demo.sh deepspeed     ZeRO-3 on 2 ranks, ZeRO-2 on 3, FSDP2 on 2, one process: one training (2 minutes)
# Everything is left in runs/demo (runs/demo-deepspeed) to look at; the next demo replaces it.
set -euo pipefail
STARTED=$SECONDS
DEMO=${1:-train}
case "$DEMO" in
    train) STEPS=40 RUN=runs/demo ;;
    deepspeed) STEPS=32 RUN=runs/demo-deepspeed EXTRAS=deepspeed ;;
    *)
        echo "usage: bash launch/demo.sh [deepspeed]" >&2
        exit 2
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

EVERY=8
SIZE=(--dim 192 --layers 4 --save-every $EVERY)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=ERROR
export CUDA_VISIBLE_DEVICES= # the same demo on every machine: CPU and gloo, over the loopback interface
[[ -e /sys/class/net/lo ]] && export GLOO_SOCKET_IFNAME=lo

mkdir -p runs
if command -v flock >/dev/null; then
    exec 8>"$RUN.lock"
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

# job [options of demo_job.py] -- ENGINE RANKS ROOT NAME [options of the training script]
# ENGINE: fsdp2 (torchrun), alone (plain python), or one of launch/zero*.json (the deepspeed launcher)
job() {
    local options=() code=0 command=()
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    local engine=$2 ranks=$3 root=$4 name=$5
    shift 5
    case $engine in
        fsdp2)
            command=("$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks")
            command+=(launch/train_lm.py)
            ;;
        alone) command=("$PYTHON" launch/train_lm.py) ;;
        *)
            command=("$ROOT/.venv/bin/deepspeed" -q --num_gpus "$ranks" --master_port "$(free_port)")
            command+=(launch/train_zero.py --zero "launch/$engine.json")
            ;;
    esac
    command+=(--dir "$root" --losses "$RUN/$name.jsonl" --steps "$STEPS" "${SIZE[@]}" "$@") # a later --steps counts
    "$PYTHON" launch/demo_job.py ${options[@]+"${options[@]}"} -- "${command[@]}" 8>&- &
    JOB=$!
    wait "$JOB" || code=$?
    JOB=
    return "$code"
}
free_port() { "$PYTHON" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# kill_in_save ENGINE RANKS NAME: train, and SIGKILL all of it in the middle of the second save or a later one
kill_in_save() {
    local try code
    for try in 1 2 3 4; do
        code=0
        job --kill-in-save $RUN/run --from-step $((2 * EVERY)) -- "$1" "$2" $RUN/run "$3" || code=$?
        [[ $code -eq 3 && $try -lt 4 ]] || break
        echo "-- again, from that save on"
    done
    return "$code"
}
compare() { "$PYTHON" launch/demo_compare.py "$@"; }
distckpt() {
    printf '\n$ distckpt %s\n' "$*"
    "$ROOT/.venv/bin/distckpt" "$@"
}

train_demo() {
    title "2 ranks, FSDP2, $STEPS steps, never interrupted: the reference"
    job -- fsdp2 2 $RUN/reference reference

    title "the same again; this time the whole job is SIGKILLed in the middle of a save"
    kill_in_save fsdp2 2 killed

    title "resume on 2 ranks"
    job -- fsdp2 2 $RUN/run resumed
    echo "-- compared with the reference:"
    compare equal $RUN/reference.jsonl $RUN/killed.jsonl
    compare equal $RUN/reference.jsonl $RUN/resumed.jsonl --until $STEPS
    compare state $RUN/reference $RUN/run --until $STEPS

    middle=$((STEPS - EVERY))
    for ranks in 3 1; do
        title "go on from step $middle again, on another number of ranks: $ranks"
        job -- fsdp2 $ranks $RUN/run on-$ranks --load $middle
        echo "-- compared with the reference:"
        compare close $RUN/reference.jsonl $RUN/on-$ranks.jsonl --until $STEPS
    done
}

deepspeed_demo() {
    export DS_ACCELERATOR=cpu RES_OPTIONS=attempts:0 PYTHONWARNINGS=ignore::FutureWarning
    export TORCH_EXTENSIONS_DIR=$ROOT/$RUN/compiled # nothing may be compiled; if it were, it is here and not in HOME

    title "ZeRO-3 on 2 ranks, by the deepspeed launcher; the whole job is SIGKILLed in the middle of a save"
    kill_in_save zero3 2 zero3

    title "the same folder as ZeRO-2 on 3 ranks: it goes on from the newest whole checkpoint"
    job -- zero2 3 $RUN/run zero2 --steps $((STEPS - 2 * EVERY))

    title "as FSDP2 on 2 ranks, by torchrun; another script, without DeepSpeed"
    job -- fsdp2 2 $RUN/run fsdp2 --steps $((STEPS - EVERY))

    title "in one process"
    job -- alone 1 $RUN/run alone

    title "one training, in four pieces"
    [[ ! -e $TORCH_EXTENSIONS_DIR ]] || { echo "DeepSpeed compiled something: $TORCH_EXTENSIONS_DIR" >&2 && exit 1; }
    "$PYTHON" launch/demo_curve.py $RUN/run "ZeRO-3 on 2=$RUN/zero3.jsonl" "ZeRO-2 on 3=$RUN/zero2.jsonl" \
        "FSDP2 on 2=$RUN/fsdp2.jsonl" "one process=$RUN/alone.jsonl"
}

"${DEMO}_demo"

title "what is on disk"
distckpt ls --all $RUN/run
distckpt show $RUN/run
distckpt verify --all --mode full $RUN/run

if [[ $DEMO == deepspeed ]]; then
    title "done: killed in the middle of a save as ZeRO-3, and carried on as ZeRO-2, as FSDP2 and by one process"
else
    title "done: killed in the middle of a save, resumed bit for bit, and carried on by 3 ranks and by 1"
fi
