"""Flags of Megatron-LM and MindSpeed-MM that this version reads without effect, cannot honour yet, or refuses.

Scripts written for MindSpeed-MM give them; a script stays as it is.
"""

from typing import Annotated, TypeAlias

from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import SectionModel

_MODEL_FILE = "model.json and the weights' folder describe the model"
_ModelInt: TypeAlias = Annotated[int | None, NoEffect(_MODEL_FILE)]
_ModelFloat: TypeAlias = Annotated[float | None, NoEffect(_MODEL_FILE)]
_ModelText: TypeAlias = Annotated[str | None, NoEffect(_MODEL_FILE)]
_ModelSwitch: TypeAlias = Annotated[bool, NoEffect(_MODEL_FILE)]
_FusedSwitch: TypeAlias = Annotated[bool, NoEffect("the model and the device choose their kernels")]
_RECOMPUTE = "--recompute-granularity selective keeps the results of attention"
_MEGATRON = "FSDP2 does it its own way"
_GC = "Python collects garbage as usual"
_METRICS = "metrics.jsonl and TensorBoard's files have the numbers of every step"
_LENGTHS = "samples are not dealt out by their sizes yet"
_BALANCE = "samples are dealt in one global order, whatever their size"
_BATCHING = "only --use-txt-dynamic-batching reads it"
_DPO = "preference training (DPO) is not available yet"
_DPO_ONLY = "only preference training (DPO) reads it"
_SIMULATION = "only automatic parallelism reads it"
_DATA_FILE = "the data file (--mm-data) names data and tokenizer"


class AcceptedFlags(SectionModel):
    """Accepted without effect"""

    untie_embeddings_and_output_weights: _ModelSwitch = False
    swiglu: _ModelSwitch = False
    disable_bias_linear: _ModelSwitch = False
    add_qkv_bias: _ModelSwitch = False
    qk_layernorm: _ModelSwitch = False
    group_query_attention: _ModelSwitch = False
    use_rotary_position_embeddings: _ModelSwitch = False
    use_mcore_models: _ModelSwitch = False
    variable_seq_lengths: _ModelSwitch = False
    normalization: _ModelText = None
    attention_mask_type: _ModelText = None
    position_embedding_type: _ModelText = None
    transformer_impl: _ModelText = None
    vocab_size: _ModelInt = None
    padded_vocab_size: _ModelInt = None
    make_vocab_size_divisible_by: _ModelInt = None
    max_position_embeddings: _ModelInt = None
    num_layers: _ModelInt = None
    hidden_size: _ModelInt = None
    ffn_hidden_size: _ModelInt = None
    kv_channels: _ModelInt = None
    num_attention_heads: _ModelInt = None
    num_query_groups: _ModelInt = None
    num_experts: _ModelInt = None
    moe_router_topk: _ModelInt = None
    rotary_base: _ModelInt = None
    rotary_percent: _ModelFloat = None
    norm_epsilon: _ModelFloat = None
    init_method_std: _ModelFloat = None
    attention_dropout: _ModelFloat = None
    hidden_dropout: _ModelFloat = None
    tokenizer_type: Annotated[str | None, NoEffect(_DATA_FILE)] = None
    tokenizer_model: Annotated[str | None, NoEffect(_DATA_FILE)] = None
    tokenizer_name_or_path: Annotated[str | None, NoEffect(_DATA_FILE)] = None
    use_fused_rmsnorm: _FusedSwitch = False
    use_fused_swiglu: _FusedSwitch = False
    use_fused_rotary_pos_emb: _FusedSwitch = False
    use_flash_attn: _FusedSwitch = False
    no_masked_softmax_fusion: _FusedSwitch = False
    no_bias_gelu_fusion: _FusedSwitch = False
    no_bias_swiglu_fusion: _FusedSwitch = False
    no_bias_dropout_fusion: _FusedSwitch = False
    no_rope_fusion: _FusedSwitch = False
    use_cpu_initialization: Annotated[bool, NoEffect("models are built on the meta device")] = False
    init_model_with_meta_device: Annotated[
        bool, NoEffect("models are built on the meta device", quiet_for=(True,))
    ] = False
    no_gradient_accumulation_fusion: Annotated[bool, NoEffect(_MEGATRON, quiet_for=(True,))] = False
    data_parallel_random_init: Annotated[bool, NoEffect("random weights depend on --seed alone")] = False
    dataloader_type: Annotated[str | None, NoEffect("data.json chooses the loader")] = None
    encoder_dp_balance: Annotated[bool, NoEffect("each rank encodes its own samples")] = False
    recompute_skip_core_attention: Annotated[bool, NoEffect(_RECOMPUTE)] = False
    recompute_num_layers_skip_core_attention: Annotated[int | None, NoEffect(_RECOMPUTE)] = None
    jit_compile: Annotated[bool, NoEffect("operators are not compiled on the fly")] = False
    allow_internal_format: Annotated[bool, NoEffect("torch-npu's own default stands")] = False
    manual_gc: Annotated[bool, NoEffect(_GC)] = False
    manual_gc_interval: Annotated[int | None, NoEffect(_GC)] = None
    log_params_norm: Annotated[bool, NoEffect(_METRICS)] = False
    log_num_zeros_in_grad: Annotated[bool, NoEffect(_METRICS)] = False
    log_timers_to_tensorboard: Annotated[bool, NoEffect(_METRICS)] = False
    log_memory_to_tensorboard: Annotated[bool, NoEffect(_METRICS)] = False
    log_validation_ppl_to_tensorboard: Annotated[bool, NoEffect(_METRICS)] = False
    tensorboard_log_interval: Annotated[int | None, NoEffect(_METRICS)] = None
    tensorboard_queue_size: Annotated[int | None, NoEffect(_METRICS)] = None
    dpo_beta: Annotated[float | None, NoEffect(_DPO_ONLY)] = None
    dpo_loss_type: Annotated[str | None, NoEffect(_DPO_ONLY)] = None
    dpo_label_smoothing: Annotated[float | None, NoEffect(_DPO_ONLY)] = None
    simulated_nnodes: Annotated[int | None, NoEffect(_SIMULATION)] = None
    simulated_nproc_per_node: Annotated[int | None, NoEffect(_SIMULATION)] = None
    data_balance_sorting_algo: Annotated[str | None, NoEffect("only --use-data-balance reads it")] = None
    mbs_data_balance_sorting_algo: Annotated[
        str | None, NoEffect("only --use-image-mbs-data-balance reads it")
    ] = None
    dynamic_batch_buffer_size: Annotated[int | None, NoEffect(_BATCHING)] = None
    max_seq_len: Annotated[int | None, NoEffect(_BATCHING)] = None


class UnavailableFlags(SectionModel):
    """Right in MindSpeed-MM, not available yet"""

    use_txt_dynamic_batching: Annotated[bool, NotYet(False, reason=_LENGTHS)] = False
    use_data_balance: Annotated[bool, NotYet(False, reason=_BALANCE)] = False
    use_image_mbs_data_balance: Annotated[bool, NotYet(False, reason=_LENGTHS)] = False
    ref_model: Annotated[str | None, NotYet(None, reason=_DPO)] = None
    pref_ftx: Annotated[float | None, NotYet(None, 0.0, reason=_DPO)] = None


class RefusedFlags(SectionModel):
    """Known and refused"""

    stage: Annotated[str | None, Only(None, reason="reinforcement learning is not available")] = None
    trust_remote_code: Annotated[
        bool, Only(False, reason="code from a folder of weights is never run; install a plugin instead")
    ] = False
    profile_subgraph_seg: Annotated[bool, Only(False, reason="automatic parallelism is not available")] = (
        False
    )
    profile_stage: Annotated[int | None, Only(None, reason="automatic parallelism is not available")] = None
    data_path: Annotated[
        list[str] | None, Only(None, reason="data is named in the data file; give that as --mm-data")
    ] = None
    lr_warmup_samples: Annotated[
        int | None, Only(None, 0, reason="state it in steps, as --lr-warmup-iters")
    ] = None
    lr_decay_samples: Annotated[int | None, Only(None, reason="state it in steps, as --lr-decay-iters")] = (
        None
    )
