# LoRA flags, a value in quotes with commas, PROCESSES known only outside.
LORA_ARGS="
    --lora-r 32 \
    --lora-alpha 32 \
    --lora-target-modules "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2" \
    --lora-register-forward-hook patch_embedding \
"
accelerate launch --num_machines 1 --num_processes $PROCESSES --multi_npu \
  pretrain_sora.py $LORA_ARGS --lr 1e-4 --train-iters 10 \
  --mm-model ./pretrain_model.json --mm-data ./data.json
