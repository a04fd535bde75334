"""Keys of MindSpeed-MM that other projects, other versions or typing errors brought about: one table says for each in
which file it stands, of which kind it is here, and what is said about it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import check_file, read_document
from mm_core.config.data import DataloaderConfig

CORPUS = Path(__file__).resolve().parents[2] / "corpus"
MODELS = {
    "wan": "wan2.2/A14B/t2v/pretrain_model_high.json",
    "wan i2v": "wan2.2/5B/ti2v/pretrain_model.json",
    "wan i2v A14B": "wan2.2/A14B/i2v/pretrain_model_low.json",
    "wan data": "wan2.2/5B/t2v/data.json",
    "wan inference": "wan2.2/5B/t2v/inference_model.json",
    "qwen": "qwen3vl/model_8B.json",
    "qwen moe": "qwen3vl/model_30B.json",
    "qwen data": "qwen3vl/data_8B.json",
    "fsdp2": "qwen3vl/fsdp2_config.yaml",
    "tools": "tools.json",
}
#: Kind of key -> level and code of what is said; None: nothing.
KINDS: dict[str, tuple[str, str] | None] = {
    "effective": None,
    "no effect": ("note", "no-effect"),
    "legacy": ("warning", "legacy-key"),
    "not yet": ("warning", "not-available"),
    "refused": ("error", "refused-value"),
    "unknown": ("error", "unknown-key"),
    "invalid": ("error", "invalid-value"),
    "type": ("error", "wrong-type"),
    "experts": ("error", "experts"),
    "condition": ("error", "condition"),
}

# (file, path of the key, value, kind, words of what is said)
TABLE: list[tuple[str, str, Any, str, str]] = [
    # model.json of Wan2.2
    ("wan", "load_video_features", True, "effective", ""),
    ("wan", "load_text_features", True, "effective", ""),
    ("wan", "task", "i2v", "condition", 'no "i2v_processor" in ae'),
    ("wan i2v", "task", "t2v", "condition", "gives the model frames"),
    ("wan i2v", "predictor.seperated_timestep", False, "invalid", "timestep 0; write true"),
    ("wan", "task", "ti2v", "type", 'expected "t2v" or "i2v"'),
    ("wan", "encoder_offload_interval", 8, "effective", ""),
    ("wan", "enable_encoder_dp", True, "effective", ""),
    ("wan", "interleaved", True, "no effect", "when they are needed"),
    ("wan", "dpo", {"loss_interval": 1}, "not yet", "DPO"),
    ("wan", "lora_apply_modules", ["all"], "effective", ""),
    ("wan", "lora_mixed_training", True, "effective", ""),
    ("wan", "lora_save_full_weight", True, "effective", ""),
    (
        "wan",
        "low_noise_predictor",
        "./transformer_2",
        "experts",
        "does not say at which noise level it takes over",
    ),
    ("wan", "patch.get_dist_model_load_from_pt", True, "no effect", "read straight from"),
    ("wan", "patch.bridge_patch", True, "no effect", "read straight from"),
    ("wan", "patch.scale_grad", True, "no effect", "global batch"),
    ("wan", "patch.infer_fa", True, "no effect", "attention backend"),
    ("wan", "patch.use_fsdp1", True, "no effect", "FSDP2"),
    ("wan", "patch.ae_float32", True, "refused", '"dtype": "fp32"'),
    ("wan", "patch.adaptive_clip_grad_norm", True, "not yet", "--clip-grad"),
    ("wan", "patch.muon_optimizer", True, "not yet", "Muon"),
    ("wan", "patch.layerwise_disaggregated_training", True, "refused", "disaggregated"),
    ("wan", "patch.hetero_parallel_cp", True, "unknown", "in patch of"),
    ("wan", "predictor.seperated_timestep", True, "no effect", "first frame"),
    ("wan", "predictor.separated_timestep", True, "unknown", 'Did you mean "seperated_timestep"?'),
    ("wan", "predictor.pipeline_num_layers", [10, 10, 10, 10], "effective", ""),
    ("wan", "predictor.model_type", "vace", "type", '"wan2.2-i2v"'),
    ("wan", "predictor.qk_norm", False, "refused", "always normalises"),
    ("wan", "predictor.recompute_granularity", "full", "effective", ""),
    ("wan", "predictor.recompute_granularity", "selective", "effective", ""),
    ("wan", "predictor.recompute_granularity", "all", "type", '"full" or "selective"'),
    ("wan", "predictor.recompute_method", "block", "invalid", "which is missing"),
    ("wan", "predictor.recompute_num_layers", 4, "invalid", '"block" recomputes the first 4 layers'),
    ("wan", "predictor.FPDT", True, "no effect", "long contexts"),
    ("wan", "predictor.FPDT_chunk_number", 4, "no effect", "long contexts"),
    ("wan", "predictor.attention_async_offload", True, "effective", ""),
    ("wan", "diffusion.num_train_steps", 1000, "invalid", 'newer spelling "num_train_timesteps"'),
    ("wan", "diffusion.reverse_sigmas", True, "refused", "another model"),
    ("wan", "ae.hub_backend", "om", "no effect", "nothing is downloaded"),
    ("wan", "ae.tiling_param.tile_size", [8, 8], "invalid", "both say"),
    ("wan", "text_encoder.hub_backend", "hf", "effective", ""),
    ("wan", "text_encoder.hub_backend", "modelscope", "no effect", "nothing is downloaded"),
    ("wan", "text_encoder.hub_backend", "huggingface", "type", '"hf", "modelscope" or "om"'),
    ("wan", "text_encoder.load_in_8bit", True, "no effect", "dtype"),
    ("wan i2v", "ae.i2v_processor", None, "effective", ""),
    ("wan i2v", "ae.i2v_processor.i2v_vae_encode_tiling", "auto", "effective", ""),
    ("wan i2v", "ae.i2v_processor.i2v_vae_encode_tiling", "yes", "type", '"auto" or true or false'),
    ("wan i2v", "ae.i2v_processor.i2v_vae_encod_tiling", False, "unknown", 'mean "i2v_vae_encode_tiling"?'),
    ("wan i2v", "predictor.out_dim", 16, "invalid", "reads and predicts the same latent channels"),
    ("wan i2v A14B", "predictor.in_dim", 32, "invalid", "36 for out_dim 16"),
    # data.json
    ("wan data", "dataloader_param.sampler_type", "LengthGroupedSampler", "effective", ""),
    ("wan data", "dataloader_param.sampler_type", "VariableVideoBatchSampler", "refused", "group_data"),
    ("wan data", "dataloader_param.sampler_type", "BucketSampler", "type", '"LengthGroupedSampler"'),
    ("wan data", "dataloader_param.group_data", True, "effective", ""),
    ("wan data", "dataloader_param.group_frame", True, "effective", ""),
    ("wan data", "dataloader_param.group_resolution", True, "effective", ""),
    ("wan data", "dataloader_param.dataloader_mode", "variable", "refused", "one global sampler"),
    ("wan data", "dataloader_param.batch_size", 2, "no effect", "--micro-batch-size"),
    ("wan data", "dataloader_param.num_workers", 2, "no effect", "--num-workers"),
    ("wan data", "dataloader_param.seed", 2, "no effect", "--seed"),
    ("wan data", "dataloader_param.initial_global_step_for_sampler", 5, "refused", "--load"),
    ("wan data", "dataset_param.basic_parameters.data_storage_mode", "sorafeatured", "effective", ""),
    ("wan data", "dataset_param.preprocess_parameters.video_reader_type", "DecordVideo", "no effect", "PyAV"),
    ("wan data", "dataset_param.preprocess_parameters.use_aesthetic", True, "refused", "aesthetic"),
    ("wan data", "dataset_param.use_img_num", 4, "refused", "spliced"),
    ("wan data", "dataset_param.use_clean_caption", True, "no effect", "text_preprocess_methods alone"),
    ("wan data", "dataset_param.preprocess_parameters.truncate_t_by_sp", True, "effective", ""),
    ("wan data", "dataset_param.preprocess_parameters.hw_aspect_thr", 0.5, "invalid", "must be at least 1"),
    ("wan data", "dataloader_param.persistent_workers", None, "effective", ""),
    ("wan data", "dataloader_param.priority_mode", "data_bucketing_img", "effective", ""),
    ("qwen data", "dataset_param.basic_parameters.cutoff_len", 1024, "effective", ""),
    (
        "qwen data",
        "dataset_param.basic_parameters.tool_format",
        "qwen",
        "refused",
        "as the model's own chat template",
    ),
    ("qwen data", "dataset_param.basic_parameters.async_preprocess", True, "no effect", "--num-workers"),
    ("qwen data", "dataset_param.basic_parameters.streaming", True, "effective", ""),
    ("qwen data", "dataset_param.basic_parameters.neat_packing", True, "effective", ""),
    ("qwen data", "dataset_param.basic_parameters.val_rate", 0.1, "effective", ""),
    ("qwen data", "dataset_param.basic_parameters.val_max_samples", 3, "invalid", "nothing to validate with"),
    ("qwen data", "dataset_param.preprocess_parameters.split_special_tokens", True, "refused", "split too"),
    (
        "qwen data",
        "dataloader_param.collate_param.ignore_pad_token_for_loss",
        False,
        "refused",
        "micro batch",
    ),
    ("qwen data", "dataset_param.basic_parameters.use_pmcc_data", True, "not yet", "PMCC"),
    ("qwen data", "dataset_param.attr.assistant_tags", "x", "unknown", 'Did you mean "assistant_tag"?'),
    (
        "qwen data",
        "dataset_param.preprocess_parameters.image_min_pixels",
        10**6,
        "invalid",
        "at most image_max",
    ),
    ("qwen data", "dataloader_param.sampler_type", "BaseRandomBatchSampler", "effective", ""),
    ("qwen data", "dataloader_param.drop_last", False, "invalid", "always drops the last batch"),
    ("qwen data", "dataloader_param.shuffle", False, "invalid", "draws at random"),
    (
        "qwen data",
        "dataloader_param.collate_param.model_nam",
        "qwen3vl",
        "unknown",
        'Did you mean "model_name"?',
    ),
    # inference_model.json
    ("wan inference", "diffusion.num_train_steps", 1000, "legacy", 'Write "num_train_timesteps": 1000'),
    ("wan inference", "device", "npu", "no effect", "accelerator at hand"),
    ("wan inference", "video", "clips.txt", "refused", "pipelines of other models"),
    ("wan inference", "strength", 0.5, "refused", "pipelines of other models"),
    ("wan inference", "mask_type", "i2v", "refused", "pipelines of other models"),
    ("wan inference", "crop_for_hw", True, "effective", ""),
    ("wan inference", "max_hxw", 399360, "effective", ""),
    ("wan inference", "num_frames", 81, "refused", "input_size"),
    ("wan inference", "pipeline_config.expand_timesteps", True, "no effect", "first frame"),
    ("wan inference", "pipeline_config.vae_scale_factor_spatial", 16, "no effect", "autoencoder itself"),
    # model.json of Qwen3-VL
    ("qwen", "text_decoder.synchronize_per_layer", True, "no effect", "without waiting"),
    ("qwen", "text_decoder.synchronize", True, "legacy", 'Write "synchronize_per_layer": true'),
    ("qwen", "image_encoder.vision_encoder.synchronize", True, "legacy", "synchronize_per_layer"),
    ("qwen", "text_decoder.attn_implementation", "sdpa", "effective", ""),
    ("qwen", "text_decoder.attn_implementation", "spda", "type", 'Did you mean "sdpa"?'),
    ("qwen", "text_decoder.attn_layout", "BNSD", "no effect", "backend"),
    ("qwen", "text_decoder.is_causal", True, "no effect", "always causal"),
    ("qwen", "text_decoder.activation_offload", True, "effective", ""),
    ("qwen", "text_decoder.use_npu_fused_moe", True, "no effect", "a dense model has no experts"),
    ("qwen", "text_decoder.experts_implementation", "eager", "unknown", "in text_decoder of"),
    ("qwen", "text_decoder.num_layers", 36, "no effect", "config.json"),
    ("qwen", "text_decoder.freeze", "false", "type", "Remove the quotes: false"),
    ("qwen", "text_decoder.num_moe_experts", 128, "unknown", "in text_decoder of"),
    ("qwen", "image_encoder.attn_implementation", "sdpa", "unknown", "in image_encoder of"),
    ("qwen", "image_encoder.vision_encoder.recompute_granularity", "full", "no effect", "fsdp2.yaml"),
    ("qwen", "loss_cfg.chunk_size", 512, "no effect", "all logits are computed at once"),
    ("qwen", "loss_cfg.compute_mode", "chunk", "effective", ""),
    ("qwen", "loss_cfg.compute_mode", "chunked", "type", '"dynamic_chunk"'),
    ("qwen", "loss_cfg.loss_type", "per_token_loss", "effective", ""),
    ("qwen", "loss_cfg.loss_type", "sum", "type", '"square_loss"'),
    ("qwen", "model_type", "qwen3_vl", "unknown", 'Did you mean "model_id"?'),
    ("qwen", "patch.bridge_patch", True, "no effect", "read straight from"),
    ("qwen", "lora_apply_modules", ["all"], "effective", ""),
    ("qwen moe", "text_decoder.use_npu_fused_moe", True, "effective", ""),
    ("qwen moe", "text_decoder.experts_implementation", "eager", "effective", ""),
    ("qwen moe", "text_decoder.experts_implementation", "sonicmoe", "type", '"grouped_mm"'),
    ("qwen moe", "text_decoder.num_moe_experts", 128, "no effect", "config.json"),
    # fsdp2.yaml
    ("fsdp2", "sharding_size", None, "effective", ""),
    ("fsdp2", "sharding_size", "8", "type", "Remove the quotes: 8"),
    ("fsdp2", "align_fsdp_param_groups", True, "effective", ""),
    ("fsdp2", "expert_parallel_size", None, "effective", ""),
    ("fsdp2", "expert_parallel_size", 8, "effective", ""),
    ("fsdp2", "moe_modules", ["model.layers.{*}.mlp.experts"], "no effect", "expert_parallel_size above 1"),
    ("fsdp2", "moe_modules", [], "effective", ""),
    ("fsdp2", "reshard_local_experts", False, "no effect", "expert_parallel_size above 1"),
    ("fsdp2", "use_reentrant", True, "effective", ""),
    # tools.json
    ("tools", "profile.profile_type", "dynamic", "effective", ""),  # while profiling is off
    ("tools", "profile.static_param.level", "level1", "no effect", "Ascend"),
    ("tools", "memory_profile.enable", True, "not yet", "memory snapshots"),
    ("tools", "memory_profile.max_entries", None, "effective", ""),
    (
        "tools",
        "sorafeature",
        {"save_path": "./f", "extract_video_feature": True},
        "no effect",
        "--output",
    ),
    ("tools", "sorafeature.extract_text_features", True, "unknown", 'mean "extract_text_feature"?'),
]


def _checked(name: str, path: str, value: Any, folder: Path) -> list[Any]:
    source = CORPUS / MODELS[name]
    data: Any = copy.deepcopy(dict(read_document(source).data))
    *outer, last = path.split(".")
    node = data
    for key in outer:
        node = node.setdefault(key, {})
    node[last] = value
    file = folder / f"changed{source.suffix}"
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")  # JSON is YAML as well
    return [finding for finding in check_file(str(file)) if finding.path == path]


@pytest.mark.parametrize(("name", "path", "value", "kind", "words"), TABLE)
def test_each_key_is_of_its_kind(
    name: str, path: str, value: Any, kind: str, words: str, tmp_path: Path
) -> None:
    found = _checked(name, path, value, tmp_path)
    expected = KINDS[kind]
    assert [(finding.level, finding.code) for finding in found] == ([expected] if expected else [])
    for finding in found:
        assert words in finding.text
        assert finding.line is not None
        assert (finding.code == "not-available") == ("this version cannot run it" in finding.message)


def test_random_sampler_shuffles_by_itself() -> None:
    assert DataloaderConfig.model_validate({"sampler_type": "BaseRandomBatchSampler"}).shuffle
    assert not DataloaderConfig().shuffle


def test_dynamic_profiling_waits_until_it_is_on(tmp_path: Path) -> None:
    data = json.loads((CORPUS / "tools.json").read_text())
    data["profile"].update(enable=True, profile_type="dynamic")
    (tmp_path / "tools.json").write_text(json.dumps(data))
    found = [f for f in check_file(str(tmp_path / "tools.json")) if f.level != "note"]
    assert [(f.code, f.path) for f in found] == [("not-available", "profile.profile_type")]
