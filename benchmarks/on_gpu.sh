#!/usr/bin/env bash
# All GPU benchmarks in one command: speed, measured and predicted memory, start-up, pre-encoding.
#
#   bash benchmarks/on_gpu.sh 2>&1 | tee on_gpu.log
#
# Variables: BATCH is the batch of the fast tier (default 64). WORKERS is the number of loader processes (default 8).
# PYTHON is the interpreter (default .venv/bin/python). Weights and data are random. The benchmarks need 35 GB of disk in
# TMPDIR and 40 GB of memory. After a failed run the script prints its exit code, continues, and exits with 1 at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
BATCH=${BATCH:-64}
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-8}
failed=0
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

run() {
    printf '\n$ %s\n' "$*"
    SECONDS=0
    "$@" || { printf 'failed, exit code %d\n' $?; failed=1; }
    printf '(%d s)\n' $SECONDS
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
run "$PYTHON" -c 'import torch, pytorch_lightning as pl; print("torch", torch.__version__, "lightning", pl.__version__)'

# Speed of main.py and of the bare step; peak memory, measured and predicted by tools/plan_memory.py.
loop() { run "$PYTHON" benchmarks/loop.py --channels 320 --size 512 --workers "$WORKERS" --rounds 2 "$@"; }
loop --tier lean.yaml --batch 1 --steps 40
loop --tier minimal.yaml --batch 1 --steps 10 --warm-up 3
loop --tier fast.yaml --batch "$BATCH" --steps 40
loop --batch 1 --steps 40 # the recipe without a tier

# The bare step and diffusers: first as the documentation of each advises, then with equal settings.
step() { run "$PYTHON" benchmarks/train_step.py --size 512 --precision bf16 --rounds 2 "$@"; }
step --sides fast diffusers-compiled --batch "$BATCH" --steps 20 --warm-up 5
step --sides plain diffusers --batch 8 --steps 20 --warm-up 5 --channels-last
step --sides lean minimal diffusers --batch 1 --steps 10 --warm-up 3 --checkpointing

# The recipe's commands with a release of full size; then pre-encoding of images with that release.
run "$PYTHON" benchmarks/recipe_full_size.py --folder "$WORK/recipe" --keep
run "$PYTHON" benchmarks/preencode_throughput.py --ckpt "$WORK/recipe/model.ckpt" --config stable_diffusion_v1.yaml \
    --size 512 --batch-size 16 --generated 1024 --precision fp16
rm -rf "$WORK/recipe"

run "$PYTHON" benchmarks/start_up.py --channels 320 --size 512 --folder "$WORK"
run "$PYTHON" benchmarks/checkpoint_stall.py --folder "$WORK/stall" --gib 9.9 --repeats 1
exit $failed
