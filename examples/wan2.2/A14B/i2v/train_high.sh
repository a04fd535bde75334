#!/usr/bin/env bash
# Wan2.2 A14B image to video on 16 devices of one machine. Edit the paths in the JSON files first; `mm check` with the same flags tells what is missing.
set -euo pipefail
cd "$(dirname "$0")/../../../.."
here=examples/wan2.2/A14B

torchrun --nproc_per_node 16 -m mm_core train \
    --mm-model "$here/i2v/pretrain_model_high.json" \
    --mm-data "$here/i2v/data.json" \
    --mm-tool examples/wan2.2/tools.json \
    --fsdp2-config-path "$here/fsdp2.yaml" \
    --micro-batch-size 1 --global-batch-size 16 --num-workers 8 \
    --lr 1e-5 --lr-decay-style constant --weight-decay 1e-2 --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 1.0 \
    --train-iters 5000 --seed 42 \
    --save runs/wan2.2-a14b-i2v-high --save-interval 500
