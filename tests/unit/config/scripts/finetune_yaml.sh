#!/bin/bash
# A combined YAML, several machines, what only the cluster knows.
set -e
. "$(dirname "$0")/set_env.sh"
export NON_MEGATRON=true
export HCCL_CONNECT_TIMEOUT=1200 ACLNN_CACHE_LIMIT=100000

NPUS_PER_NODE=16
NNODES=2
NODE_RANK=$1
if [ -z "$MASTER_ADDR" ]; then
    MASTER_ADDR=localhost
fi
for name in a b; do echo $name; done

DISTRIBUTED_ARGS=(
    --nproc_per_node "$NPUS_PER_NODE"   # of one machine
    --nnodes=$NNODES --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR --master_port 29502
)
config_path=examples/qwen3vl/qwen3vl_full_sft_8B.yaml
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_transformers.py ${config_path} \
    --distributed-backend nccl > "logs/train_$(date +%s).log" 2>&1 &
wait $!
