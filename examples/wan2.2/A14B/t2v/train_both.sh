#!/usr/bin/env bash
# Both experts of Wan2.2 A14B in one job on 16 devices of one machine. Edit the paths in the JSON files first; `mm check` with the same flags tells what is missing.
set -euo pipefail
cd "$(dirname "$0")/../../../.."
here=examples/wan2.2/A14B

torchrun --nproc_per_node 16 -m mm_core train \
    --mm-model "$here/t2v/pretrain_model_both.json" \
    --mm-data "$here/t2v/data.json" \
    --mm-tool examples/wan2.2/tools.json \
    --fsdp2-config-path "$here/fsdp2_both.yaml" \
    --micro-batch-size 1 --global-batch-size 64 --num-workers 8 \
    --lr 1e-5 --lr-decay-style constant --weight-decay 1e-2 --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 1.0 \
    --train-iters 5000 --seed 42 \
    --save runs/wan2.2-a14b-t2v-both --save-interval 500
