#!/usr/bin/env bash
# A MindSpeed-MM launch script for Wan2.2, on the tiny model of examples/tiny. All that differs from a script for MindSpeed-MM is
# the program: `-m mm_core train` stands where pretrain_sora.py stood. Variables and flags that have no effect here may stay.
#
#   bash examples/launch/pretrain_wan22_tiny.sh
#
# It runs two ranks, on the CPU if there is no accelerator. NPUS_PER_NODE, MASTER_PORT and SAVE_PATH may be set from outside.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
set -o pipefail

export ASCEND_SLOG_PRINT_TO_STDOUT=0
export ASCEND_GLOBAL_LOG_LEVEL=3
export TASK_QUEUE_ENABLE=2
export COMBINED_ENABLE=1
export CPU_AFFINITY_CONF=1
export HCCL_CONNECT_TIMEOUT=1200
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export CUDA_DEVICE_MAX_CONNECTIONS=2
export TOKENIZERS_PARALLELISM=false
export MULTI_STREAM_MEMORY_REUSE=2

NPUS_PER_NODE=${NPUS_PER_NODE:-2}
MASTER_ADDR=localhost
MASTER_PORT=${MASTER_PORT:-29501}
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE * $NNODES))

TP=1
PP=1
VP=1
CP=1
CP_TYPE="ulysses_cp_algo"
MBS=1
GRAD_ACC_STEP=2
DP=$(($WORLD_SIZE / $TP / $PP / $CP))
GBS=$(($MBS * $GRAD_ACC_STEP * $DP))

HERE="examples/tiny/wan22-t2v"
MM_DATA="$HERE/data.json"
MM_MODEL="$HERE/model.json"
MM_TOOL="$HERE/tools.json"
FSDP2_PATH="$HERE/fsdp2.yaml"
SAVE_PATH=${SAVE_PATH:-runs/launch-tiny}

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --virtual-pipeline-model-parallel-size ${VP} \
    --context-parallel-size ${CP} \
    --context-parallel-algo ${CP_TYPE} \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --num-workers 1 \
    --lr 1e-3 \
    --min-lr 1e-3 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --adam-eps 1e-8 \
    --lr-decay-style constant \
    --weight-decay 1e-2 \
    --lr-warmup-init 0 \
    --lr-warmup-iters 0 \
    --clip-grad 1.0 \
    --train-iters ${TRAIN_ITERS:-10} \
    --no-gradient-accumulation-fusion \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --use-torch-fsdp2 \
    --fsdp2-config-path ${FSDP2_PATH} \
    --untie-embeddings-and-output-weights \
    --optimizer-selection fused_torch_adamw \
    --use-cpu-initialization \
    --use-fused-rmsnorm \
    --attention-mask-type general \
    --distributed-timeout-minutes 20
"

MM_ARGS="
    --mm-data $MM_DATA \
    --mm-model $MM_MODEL \
    --mm-tool $MM_TOOL
"

OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --eval-iters 10 \
    --save $SAVE_PATH \
    --ckpt-format torch_dcp
"

logfile=$(date +%Y%m%d_%H%M%S)
mkdir -p "$SAVE_PATH"
torchrun $DISTRIBUTED_ARGS -m mm_core train \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    | tee "$SAVE_PATH/train_${logfile}.log" || exit

# The mean step time, from the log: the fifth field between colons.
STEP_TIME=$(awk -F: '/elapsed time per iteration/ {sum += $5; n++} END {if (n) printf("%.1f", sum / n)}' "$SAVE_PATH/train_${logfile}.log")
awk -v gbs="$GBS" -v ms="$STEP_TIME" 'BEGIN {printf("Elapsed Time Per iteration: %s ms, Average Samples per Second: %.3f\n", ms, gbs * 1000 / ms)}'
