#!/usr/bin/env bash
# What waits for a GPU, each in one call of at most 9 minutes:
#   OUT=results bash benchmarks/gpu.sh tests     # the tests that need a GPU
#   OUT=results bash benchmarks/gpu.sh           # the training step
#   OUT=results bash benchmarks/gpu.sh mining    # cheaper mining, beside MAE
#   OUT=results bash benchmarks/gpu.sh growth    # growth and a profile, with their pictures
# The second times the step of ViT-B/16 and ViT-L/16 at 224 px, compiled and eager, and trains
# ViT-B/16 for 200 steps (on $DATA, or the built-in images) to compare its images per second with
# those of the benchmark. Tables go to the screen; numbers, pictures and messages (*.log) into $OUT.
# On a CPU (to test the script itself):
#   SMALL=1 OUT=results bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu}
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD
mkdir -p "$OUT"

limited() {  # seconds, command ...: what takes longer is stopped and said, the rest goes on
    local seconds=$1
    shift
    timeout "$seconds" "$@" || echo "FAILED or out of time ($?): $*"
}

bench() {  # name, seconds, options ...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    limited "$seconds" "$PYTHON" -m hpm bench step "$@" --json "$OUT/$name.json" 2>"$OUT/$name.log"
}

real_run() {  # name of its benchmark, seconds, options ...
    local name=$1 seconds=$2
    shift 2
    echo "== $name, a real run"
    limited "$seconds" "$PYTHON" benchmarks/real_run.py "$OUT/$name.json" "$OUT/${name}_run.json" \
        --data "${DATA:-demo}" "$@" 2>"$OUT/${name}_run.log"
}

if [ -n "${SMALL:-}" ]; then
    bench small_eager 60 --model vit_nano --image-size 32 --patch-size 8 --batch-size 4 \
        --repeats 2 --steps-each 1 --compile false
    real_run small_eager 60 --steps 20 --holdout 8 --workers 0
    exit
fi

case "${1:-step}" in
tests)
    # Half of them compile, each in a process of its own.
    limited 500 "$PYTHON" -m pytest -q tests/training/test_compile.py
    exit
    ;;
mining)
    limited 500 "$PYTHON" benchmarks/mining.py speed --repeats 2 --out "$OUT/mining"
    exit
    ;;
growth)
    limited 400 "$PYTHON" benchmarks/growth.py
    limited 100 "$PYTHON" benchmarks/profile_step.py vit_base
    cp benchmarks/growth.png benchmarks/profile_vit_base.png benchmarks/RESULTS.md "$OUT"
    exit
    ;;
esac

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
bench vit_base_compiled 140 --model vit_base --batch-size 256 --repeats 4
real_run vit_base_compiled 180 --steps 200
bench vit_base_eager 80 --model vit_base --batch-size 256 --repeats 4 --compile false
bench vit_large_compiled 200 --model vit_large --batch-size 256 --repeats 3
