#!/usr/bin/env bash
# All GPU benchmarks in one command: speed, measured and predicted memory, start-up, pre-encoding.
#
#   bash benchmarks/on_gpu.sh 2>&1 | tee on_gpu.log
#   STAGES=sdxl CHANNELS=64 XL_SIZE=64 STEPS=2 WARM_UP=1 ROUNDS=1 WORKERS=0 bash benchmarks/on_gpu.sh  # a try on a CPU
#
# Variables: BATCH is the batch of the fast tier (default 64). WORKERS is the number of loader processes (default 8).
# PYTHON is the interpreter (default .venv/bin/python). STAGES names what to run (default: loop sdxl step recipe start).
# SIZE and XL_SIZE are pixels per side (default 512 and 1024), CHANNELS the width of the UNet (default 320), STEPS,
# WARM_UP and ROUNDS change the numbers of steps and rounds. Weights and data are random. The benchmarks need 35 GB of
# disk in TMPDIR and 40 GB of memory, minimal.yaml with SDXL 50 GB. After a failed run the script prints its exit code,
# continues, and exits with 1 at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
BATCH=${BATCH:-64}
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-8}
STAGES=${STAGES:-loop sdxl step recipe start}
SIZE=${SIZE:-512}
XL_SIZE=${XL_SIZE:-1024}
CHANNELS=${CHANNELS:-320}
ROUNDS=${ROUNDS:-2}
failed=0
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

run() {
    printf '\n$ %s\n' "$*"
    SECONDS=0
    "$@" || { printf 'failed, exit code %d\n' $?; failed=1; }
    printf '(%d s)\n' $SECONDS
}

stage() { [[ " $STAGES " == *" $1 "* ]]; }

# Arguments for a number of steps and of those before them, unless the variables say others.
steps() { printf -- '--steps %d --warm-up %d' "${STEPS:-$1}" "${WARM_UP:-$2}"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
run "$PYTHON" -c 'import torch, pytorch_lightning as pl; print("torch", torch.__version__, "lightning", pl.__version__)'

# Speed of main.py and of the bare step; peak memory, measured and predicted by tools/plan_memory.py.
loop() {
    run "$PYTHON" benchmarks/loop.py --channels "$CHANNELS" --workers "$WORKERS" --rounds "$ROUNDS" "$@"
}
if stage loop; then
    loop --size "$SIZE" --tier lean.yaml --batch 1 $(steps 40 10)
    loop --size "$SIZE" --tier minimal.yaml --batch 1 $(steps 10 3)
    loop --size "$SIZE" --tier smallest.yaml --batch 1 $(steps 10 3)
    loop --size "$SIZE" --tier fast.yaml --batch "$BATCH" $(steps 40 10)
    loop --size "$SIZE" --batch 1 $(steps 40 10) # the recipe without a tier
fi
if stage sdxl; then
    for tier in lean.yaml minimal.yaml smallest.yaml; do
        loop --config finetune_stable_diffusion_xl.yaml --size "$XL_SIZE" --tier $tier --batch 1 $(steps 6 2)
    done
fi

# The bare step and diffusers: first as the documentation of each advises, then with equal settings.
step() {
    run "$PYTHON" benchmarks/train_step.py --channels "$CHANNELS" --size "$SIZE" --precision bf16 --rounds "$ROUNDS" "$@"
}
if stage step; then
    step --sides fast diffusers-compiled --batch "$BATCH" $(steps 20 5)
    step --sides plain diffusers --batch 8 $(steps 20 5) --channels-last
    step --sides lean minimal smallest diffusers --batch 1 $(steps 10 3) --checkpointing
fi

# The recipe's commands with a release of full size; then pre-encoding of images with that release.
if stage recipe; then
    run "$PYTHON" benchmarks/recipe_full_size.py --folder "$WORK/recipe" --keep
    run "$PYTHON" benchmarks/preencode_throughput.py --ckpt "$WORK/recipe/model.ckpt" --config stable_diffusion_v1.yaml \
        --size 512 --batch-size 16 --generated 1024 --precision fp16
    rm -rf "$WORK/recipe"
fi

if stage start; then
    run "$PYTHON" benchmarks/start_up.py --channels "$CHANNELS" --size "$SIZE" --folder "$WORK"
    run "$PYTHON" benchmarks/checkpoint_stall.py --folder "$WORK/stall" --gib 9.9 --repeats 1
fi
exit $failed
