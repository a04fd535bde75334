"""The flags of `mm train`, one class a group. Names and meanings are Megatron-LM's and MindSpeed-MM's."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


_One: TypeAlias = Annotated[
    int, Only(1, reason="this kind of parallelism is not available yet; models are sharded by FSDP2")
]
_MODEL_FILE = "model.json and the weights' folder describe the model"
_ModelInt: TypeAlias = Annotated[int | None, NoEffect(_MODEL_FILE)]
_ModelText: TypeAlias = Annotated[str | None, NoEffect(_MODEL_FILE)]
_ModelSwitch: TypeAlias = Annotated[bool, NoEffect(_MODEL_FILE)]
_RECOMPUTE = "recompute_modules in fsdp2.yaml chooses what is computed again"
_MEGATRON = "FSDP2 does it its own way"
_LORA = "LoRA is not available yet"
_DPO = "preference training (DPO) is not available yet"
_LM = "it concerns language models, which cannot be trained yet"
_MUON = "only the Muon optimizer reads it"


class FileFlags(SectionModel):
    """Files"""

    mm_model: Annotated[str | None, _help("model file (model.json)", min_length=1)] = None
    mm_data: Annotated[str | None, _help("data file (data.json)", min_length=1)] = None
    mm_tool: Annotated[str | None, _help("tools file (tools.json)", min_length=1)] = None
    fsdp2_config_path: Annotated[str | None, _help("sharding file (fsdp2.yaml)", min_length=1)] = None
    locked: Annotated[
        bool, _help("train only with the plugins of the lock file, which `mm plugin lock` writes")
    ] = False
    lock_file: Annotated[
        str | None, _help("lock file; default: mmzoo.lock. Giving it means --locked", min_length=1)
    ] = None


class BatchFlags(SectionModel):
    """Batch"""

    micro_batch_size: Annotated[int, _help("samples of one rank in one forward pass", ge=1, le=2**20)] = 1
    global_batch_size: Annotated[
        int,
        _help(
            "samples of one optimizer step, over all ranks and accumulated passes; default: micro "
            "batch × ranks",
            ge=1,
            le=2**20,
        ),
    ] = 0
    num_workers: Annotated[
        int, _help("processes that load data, for each rank; 0 loads in the rank itself", ge=0, le=1024)
    ] = 2
    seed: Annotated[int, _help("fixes data order, noise, timesteps and random weights", ge=0, lt=2**63)] = (
        1234
    )


class OptimizerFlags(SectionModel):
    """Optimizer"""

    optimizer: Annotated[str, Only("adam", reason="AdamW is the only optimizer yet")] = "adam"
    optimizer_selection: Annotated[
        Literal["fused_torch_adamw", "torch_adamw", "fused_adamw"], _help("which AdamW; all are torch's")
    ] = "fused_torch_adamw"
    lr: Annotated[float, _help("learning rate after warm-up; required", gt=0.0)] = 1e-5
    min_lr: Annotated[float, _help("learning rate at the end of the decay", ge=0.0)] = 0.0
    adam_beta1: Annotated[float, _help("decay of the first moment", ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, _help("decay of the second moment", ge=0.0, lt=1.0)] = 0.999
    adam_eps: Annotated[float, _help("added to the square root of the second moment", gt=0.0)] = 1e-8
    weight_decay: Annotated[float, _help("decoupled weight decay", ge=0.0)] = 0.01
    clip_grad: Annotated[float, _help("largest norm of the gradient; 0 does not clip", ge=0.0)] = 1.0
    lr_mult: Annotated[float, Only(1.0, reason="learning rates by module are not available yet")] = 1.0
    lr_scale_modules: Annotated[
        list[str] | None, Only(None, reason="learning rates by module are not available yet")
    ] = None
    weight_decay_exclude_modules: Annotated[
        list[str] | None, Only(None, reason="weight decay by module is not available yet")
    ] = None
    enable_dummy_optimizer: Annotated[bool, NoEffect("every rank has parameters to train")] = False
    matched_adamw_rms: Annotated[float | None, NoEffect(_MUON)] = None
    muon_momentum: Annotated[float | None, NoEffect(_MUON)] = None
    ns_steps: Annotated[int | None, NoEffect(_MUON)] = None


class ScheduleFlags(SectionModel):
    """Schedule"""

    train_iters: Annotated[int, _help("optimizer steps of the whole run; required", ge=1, le=2**40)] = 1
    train_samples: Annotated[
        int | None, Only(None, reason="state the length of the run as --train-iters")
    ] = None
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine"], _help("shape of the learning rate after warm-up")
    ] = "linear"
    lr_decay_iters: Annotated[int | None, _help("steps until --min-lr; default: --train-iters", ge=1)] = None
    lr_warmup_iters: Annotated[int, _help("steps of linear warm-up", ge=0)] = 0
    lr_warmup_fraction: Annotated[
        float | None, _help("warm-up as a share of --lr-decay-iters", ge=0.0, le=1.0)
    ] = None
    lr_warmup_init: Annotated[float, _help("learning rate from which warm-up starts", ge=0.0)] = 0.0
    exit_interval: Annotated[
        int | None, _help("leave, after saving, when the step is a multiple of this", ge=1)
    ] = None
    override_opt_param_scheduler: Annotated[bool, NoEffect("the flags always decide the schedule")] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool, Only(False, reason="the flags decide the schedule; give the flags of the earlier run")
    ] = False


class CheckpointFlags(SectionModel):
    """Checkpoints"""

    load: Annotated[
        str | None,
        _help(
            "run or checkpoint to continue, or a Hugging Face folder with the predictor's weights",
            min_length=1,
        ),
    ] = None
    save: Annotated[str | None, _help("folder of the run: metrics, logs, checkpoints", min_length=1)] = None
    save_interval: Annotated[
        int | None, _help("steps between checkpoints; the last step is saved too", ge=1)
    ] = None
    ckpt_format: Annotated[
        str, Only("torch_dcp", reason="checkpoints are torch's distributed checkpoints")
    ] = "torch_dcp"
    finetune: Annotated[bool, _help("take only the weights of --load; start at step 0")] = False
    no_load_optim: Annotated[bool, _help("do not load the optimizer's state")] = False
    no_load_rng: Annotated[bool, _help("do not load the generators' states")] = False
    no_save_optim: Annotated[bool, _help("do not save the optimizer's state")] = False
    no_save_rng: Annotated[bool, _help("do not save the generators' states")] = False
    async_save: Annotated[bool, Only(False, reason="checkpoints are written synchronously yet")] = False
    exit_on_missing_checkpoint: Annotated[bool, NoEffect("a missing checkpoint is always an error")] = False
    no_load_strict: Annotated[bool, Only(False, reason="weights are always loaded strictly")] = False


class PrecisionFlags(SectionModel):
    """Precision"""

    bf16: Annotated[
        bool, _help("compute in bf16 over fp32 master weights, as param_dtype: bf16 in fsdp2.yaml")
    ] = False
    fp16: Annotated[bool, Only(False, reason="fp16 needs loss scaling, which is not available; use bf16")] = (
        False
    )
    downcast_to_bf16: Annotated[bool, NoEffect("loaded weights stay fp32 as master weights")] = False
    accumulate_allreduce_grads_in_fp32: Annotated[
        bool, NoEffect("reduce_dtype in fsdp2.yaml decides; accumulated gradients are fp32")
    ] = False
    allow_tf32: Annotated[bool, NoEffect("TF32 stays as torch sets it")] = False
    use_deter_comp: Annotated[
        bool, _help("deterministic kernels only, so that a run on an accelerator repeats bit for bit")
    ] = False


class LaunchFlags(SectionModel):
    """Processes and devices"""

    nproc_per_node: Annotated[
        int | None, _help("ranks to start on this machine; default: 1", ge=1, le=1024)
    ] = None
    nnodes: Annotated[int | None, _help("machines of the job; default: 1", ge=1)] = None
    node_rank: Annotated[int | None, _help("number of this machine, from 0", ge=0)] = None
    master_addr: Annotated[str | None, _help("address of the first machine", min_length=1)] = None
    master_port: Annotated[int | None, _help("port on the first machine", ge=0, le=65535)] = None
    distributed_backend: Annotated[
        str | None,
        _help("communication, such as nccl, hccl or gloo; default: the device's own", min_length=1),
    ] = None
    distributed_timeout_minutes: Annotated[int, _help("minutes until a waiting rank gives up", ge=1)] = 10
    tensor_model_parallel_size: _One = 1
    pipeline_model_parallel_size: _One = 1
    virtual_pipeline_model_parallel_size: _One = 1
    context_parallel_size: _One = 1
    expert_model_parallel_size: _One = 1
    context_parallel_algo: Annotated[
        Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] | None,
        NoEffect("--context-parallel-size is 1"),
    ] = None
    use_torch_fsdp2: Annotated[bool, NoEffect("FSDP2 is always used", quiet_for=(True,))] = False
    sequence_parallel: Annotated[bool, NoEffect("--tensor-model-parallel-size is 1")] = False
    use_distributed_optimizer: Annotated[bool, NoEffect(_MEGATRON)] = False
    overlap_grad_reduce: Annotated[bool, NoEffect(_MEGATRON)] = False
    overlap_param_gather: Annotated[bool, NoEffect(_MEGATRON)] = False
    hetero_parallel: Annotated[bool, Only(False, reason="heterogeneous parallelism is not available")] = False
    hetero_encoder_mbs_scale: Annotated[int, Only(1, reason="heterogeneous parallelism is not available")] = 1
    auto_parallel_mm: Annotated[bool, Only(False, reason="automatic parallelism is not available")] = False


class LogFlags(SectionModel):
    """Logging and evaluation"""

    log_interval: Annotated[
        int, _help("steps between lines on the console; metrics.jsonl has every step", ge=1)
    ] = 1
    tensorboard_dir: Annotated[
        str | None, _help("folder of the event files; default: inside --save", min_length=1)
    ] = None
    log_throughput: Annotated[bool, NoEffect("samples/s are always logged", quiet_for=(True,))] = False
    log_tps: Annotated[bool, NoEffect("tokens/s are always logged", quiet_for=(True,))] = False
    timing_log_level: Annotated[int | None, NoEffect("tools.json chooses what is profiled")] = None
    eval_interval: Annotated[int | None, NoEffect("there is no validation yet")] = None
    eval_iters: Annotated[int | None, NoEffect("there is no validation yet")] = None


class AcceptedFlags(SectionModel):
    """Accepted without effect"""

    untie_embeddings_and_output_weights: _ModelSwitch = False
    use_fused_rmsnorm: _ModelSwitch = False
    use_fused_swiglu: _ModelSwitch = False
    use_flash_attn: _ModelSwitch = False
    swiglu: _ModelSwitch = False
    no_masked_softmax_fusion: _ModelSwitch = False
    normalization: _ModelText = None
    attention_mask_type: _ModelText = None
    tokenizer_type: _ModelText = None
    position_embedding_type: _ModelText = None
    vocab_size: _ModelInt = None
    padded_vocab_size: _ModelInt = None
    make_vocab_size_divisible_by: _ModelInt = None
    seq_length: _ModelInt = None
    max_position_embeddings: _ModelInt = None
    num_layers: _ModelInt = None
    hidden_size: _ModelInt = None
    ffn_hidden_size: _ModelInt = None
    num_attention_heads: _ModelInt = None
    use_cpu_initialization: Annotated[bool, NoEffect("models are built on the meta device")] = False
    init_model_with_meta_device: Annotated[
        bool, NoEffect("models are built on the meta device", quiet_for=(True,))
    ] = False
    no_gradient_accumulation_fusion: Annotated[bool, NoEffect(_MEGATRON, quiet_for=(True,))] = False
    data_parallel_random_init: Annotated[bool, NoEffect("random weights depend on --seed alone")] = False
    dataloader_type: Annotated[str | None, NoEffect("data.json chooses the loader")] = None
    recompute_granularity: Annotated[str | None, NoEffect(_RECOMPUTE)] = None
    recompute_method: Annotated[str | None, NoEffect(_RECOMPUTE)] = None
    recompute_num_layers: Annotated[int | None, NoEffect(_RECOMPUTE)] = None
    recompute_skip_core_attention: Annotated[bool, NoEffect(_RECOMPUTE)] = False
    jit_compile: Annotated[bool, NoEffect("operators are not compiled on the fly")] = False
    allow_internal_format: Annotated[bool, NoEffect("torch-npu's own default stands")] = False
    manual_gc: Annotated[bool, NoEffect("Python collects garbage as usual")] = False
    manual_gc_interval: Annotated[int | None, NoEffect("Python collects garbage as usual")] = None


class RefusedFlags(SectionModel):
    """Known and refused"""

    lora_r: Annotated[int | None, Only(None, reason=_LORA)] = None
    lora_alpha: Annotated[int | None, Only(None, reason=_LORA)] = None
    lora_dropout: Annotated[float | None, Only(None, reason=_LORA)] = None
    lora_target_modules: Annotated[list[str] | None, Only(None, reason=_LORA)] = None
    lora_apply_modules: Annotated[list[str] | None, Only(None, reason=_LORA)] = None
    lora_register_forward_hook: Annotated[list[str] | None, Only(None, reason=_LORA)] = None
    lora_mixed_training: Annotated[bool, Only(False, reason=_LORA)] = False
    lora_load: Annotated[str | None, Only(None, reason=_LORA)] = None
    load_base_model: Annotated[str | None, Only(None, reason=_LORA)] = None
    dpo_beta: Annotated[float | None, Only(None, reason=_DPO)] = None
    dpo_label_smoothing: Annotated[float | None, Only(None, reason=_DPO)] = None
    ref_model: Annotated[str | None, Only(None, reason=_DPO)] = None
    pref_ftx: Annotated[float | None, Only(None, reason=_DPO)] = None
    stage: Annotated[str | None, Only(None, reason="reinforcement learning is not available")] = None
    trust_remote_code: Annotated[
        bool, Only(False, reason="code from a folder of weights is never run; install a plugin instead")
    ] = False
    calculate_per_sample_loss: Annotated[bool, Only(False, reason=_LM)] = False
    calculate_per_token_loss: Annotated[bool, Only(False, reason=_LM)] = False
    use_data_balance: Annotated[bool, Only(False, reason="data balancing is not available yet")] = False
    use_image_mbs_data_balance: Annotated[bool, Only(False, reason=_LM)] = False
    data_balance_sorting_algo: Annotated[
        str | None, Only(None, reason="data balancing is not available yet")
    ] = None
    mbs_data_balance_sorting_algo: Annotated[str | None, Only(None, reason=_LM)] = None
    use_txt_dynamic_batching: Annotated[bool, Only(False, reason=_LM)] = False
    dynamic_batch_buffer_size: Annotated[int | None, Only(None, reason=_LM)] = None
    max_seq_len: Annotated[int | None, Only(None, reason=_LM)] = None


#: In the order of the help page.
GROUPS: tuple[type[SectionModel], ...] = (
    FileFlags,
    BatchFlags,
    OptimizerFlags,
    ScheduleFlags,
    CheckpointFlags,
    PrecisionFlags,
    LaunchFlags,
    LogFlags,
    AcceptedFlags,
    RefusedFlags,
)
