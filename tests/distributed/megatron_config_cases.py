"""Megatron's `TransformerConfig` from model files, with the real Megatron-Core. `test_megatron_core` installs it and runs
this file; a plain run of the tests does not collect it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config import ConfigError, load_training_job, read_document
from mm_core.megatron import describe, transformer_config
from tests.e2e.conftest import ROOT
from tests.unit.config.conftest import JobFiles
from tests.unit.config.conftest import files as files  # the fixture

pytestmark = pytest.mark.timeout(240)
CORPUS = ROOT / "tests/corpus"
WAN = CORPUS / "wan2.2/5B/t2v/pretrain_model.json"
QWEN = CORPUS / "qwen3vl/model_8B.json"
#: layers, hidden size, heads, width of the feed-forward, kind and epsilon of the norm
A14B = (40, 5120, 40, 13824, "RMSNorm", 1e-6)
B5 = (30, 3072, 24, 14336, "RMSNorm", 1e-6)
DECODER = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 32}


def test_the_version_is_told() -> None:
    assert describe()[0][:2] == ("megatron-core", "0.16.1")
    assert describe()[1][1] is None  # the wheel has no megatron.training


def _sizes(config: Any) -> tuple[Any, ...]:
    return (
        config.num_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.ffn_hidden_size,
        config.normalization,
        config.layernorm_epsilon,
    )


@pytest.mark.parametrize(
    ("pattern", "expected", "count"),
    [
        ("wan2.2/A14B/*/*model*.json", A14B, 6),
        ("wan2.2/5B/*/*model*.json", B5, 4),
        ("qwen3vl/model_8B.json", (36, 4096, 32, 16384, "LayerNorm", 1e-5), 1),
        ("qwen3vl/model_30B.json", (48, 2048, 32, 8192, "LayerNorm", 1e-5), 1),
        ("qwen3vl/model_235B.json", (94, 4096, 64, 16384, "LayerNorm", 1e-5), 1),
    ],
)
def test_the_config_of_every_model_file_that_users_have(
    pattern: str, expected: tuple[Any, ...], count: int
) -> None:
    files = sorted(CORPUS.glob(pattern))
    assert len(files) == count
    for file in files:
        config = transformer_config(file)
        assert _sizes(config) == expected, file
        assert config.qk_layernorm is ("wan2.2" in str(file))
        assert config.params_dtype is torch.float32
        assert (config.attention_dropout, config.hidden_dropout) == (0.0, 0.0)


def test_the_config_of_our_own_examples() -> None:
    documents = [read_document(file) for file in sorted((ROOT / "examples").glob("**/*model.json"))]
    documents += [read_document(file) for file in sorted((ROOT / "examples").glob("**/*model_*.json"))]
    sized = [document for document in documents if "num_heads" in document.data.get("predictor", {})]
    assert len(sized) >= 8
    for document in sized:
        config = transformer_config(document)
        assert config.num_attention_heads == document.data["predictor"]["num_heads"]


def test_a_combined_yaml_with_its_flags() -> None:
    data = read_document(CORPUS / "qwen3vl_yaml/qwen3vl_full_sft_8B.yaml").data
    config = transformer_config(data["model"], data["gpt_args"])
    assert _sizes(config) == (
        36,
        4096,
        32,
        16384,
        "RMSNorm",
        1e-5,
    )  # the file is silent about the norm, the flags not
    assert config.gated_linear_unit  # --swiglu
    assert config.activation_func is nn.functional.silu


def test_a_checked_job_with_its_flags_and_the_defaults_of_its_class(files: JobFiles) -> None:
    del files.model["predictor"]["eps"]
    files.write()
    job = load_training_job(files.flags("--bf16"))
    config = transformer_config(job)
    assert _sizes(config) == A14B  # the default of eps is the class's, not Megatron's
    assert (config.bf16, config.tensor_model_parallel_size) == (True, 1)
    assert config.pipeline_dtype is torch.bfloat16
    with pytest.raises(ConfigError) as caught:
        transformer_config(job, {"tensor_model_parallel_size": 7})
    assert caught.value.findings[0].where == files.find('"num_heads": ^40')


def test_layers_in_lists_heads_with_a_size_and_experts() -> None:
    config = transformer_config({"predictor": {"num_layers": [2, 3], "num_heads": 4, "head_dim": 8}})
    assert (config.num_layers, config.hidden_size, config.kv_channels) == (5, 32, 8)
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "n_shared_experts": 2}
    config = transformer_config(
        {"text_decoder": {**DECODER, **experts}},
        {"expert_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 1},
    )
    assert (config.num_moe_experts, config.moe_shared_expert_intermediate_size) == (8, 96)
    assert config.expert_model_parallel_size == 4
    assert config.virtual_pipeline_model_parallel_size is None
    config = transformer_config(read_document(QWEN), part="image_encoder.vision_encoder")
    assert _sizes(config)[:3] == (27, 1152, 16)


@pytest.mark.parametrize(
    ("model", "flags", "where", "message"),
    [
        pytest.param(
            WAN,
            {"tensor_model_parallel_size": 5},
            ("25:22", "predictor.num_heads"),
            'Megatron-Core refuses this model: "num_heads" (24) must be a multiple of --tensor-model-parallel-size (5)',
            id="heads-tp",
        ),
        pytest.param(
            WAN,
            {"fp16": True, "bf16": True},
            ("--fp16", "--fp16"),
            "Megatron-Core refuses this model: --fp16 and --bf16 are both given, and exclude each other",
            id="two-precisions",
        ),
        pytest.param(
            WAN,
            {"expert_model_parallel_size": 2},
            ("--expert-model-parallel-size",) * 2,
            "Megatron-Core refuses this model: --expert-model-parallel-size is given, but the section has no "
            "num_moe_experts to spread",
            id="experts-absent",
        ),
        pytest.param(
            WAN,
            {"tensor_model_parallel_size": 0},
            ("--tensor-model-parallel-size",) * 2,
            '"tensor_model_parallel_size" is 0: must be at least 1',
            id="tp-zero",
        ),
        pytest.param(
            WAN,
            {"recompute_granularity": "all"},
            ("--recompute-granularity",) * 2,
            '"recompute_granularity" is "all", expected "full" or "selective"',
            id="recompute",
        ),
        pytest.param(
            WAN,
            {"recompute_granularity": "full"},
            ("--recompute-granularity",) * 2,
            "Megatron-Core refuses this model: Using --recompute-granularity: full so recompute_method must be "
            '"block" or "uniform"',
            id="recompute-method",
        ),
        pytest.param(
            QWEN,
            {"seq_length": 300000},
            ("23:36", "text_decoder.max_position_embeddings"),
            'Megatron-Core refuses this model: --seq-length (300000) must be at most "max_position_embeddings" (262144)',
            id="too-long",
        ),
        pytest.param(
            QWEN,
            {"pipeline_model_parallel_size": 5},
            ("20:23", "text_decoder.num_layers"),
            'Megatron-Core refuses this model: "num_layers" (36) must be a multiple of --pipeline-model-parallel-size (5)',
            id="stages",
        ),
        pytest.param(
            {"text_decoder": {**DECODER, "num_query_groups": 3}},
            None,
            ("text_decoder.num_attention_heads",) * 2,
            'Megatron-Core refuses this model: "num_attention_heads" (4) must be a multiple of "num_query_groups" (3)',
            id="groups",
        ),
        pytest.param(
            {"text_decoder": {**DECODER, "moe_ffn_hidden_size": 8}},
            None,
            ("text_decoder.moe_ffn_hidden_size",) * 2,
            'Megatron-Core refuses this model: "moe_ffn_hidden_size" must be None when num_experts is not set',
            id="width-of-no-experts",
        ),
        pytest.param(
            {"text_decoder": {**DECODER, "moe_token_dispatcher_type": "best"}},
            None,
            ("text_decoder.moe_token_dispatcher_type",) * 2,
            '"moe_token_dispatcher_type" is "best", expected "allgather", "alltoall" or "flex"',
            id="choice",
        ),
        pytest.param({"ae": {}}, None, ("", ""), "the model file has neither predictor nor text_decoder, which Megatron's "
                     "TransformerConfig is made from", id="no-part"),
        pytest.param({"predictor": 3}, None, ("predictor",) * 2, "predictor is no object of keys and values", id="no-object"),
    ],
)  # fmt: skip
def test_what_megatron_refuses_is_one_sentence_at_its_place(
    model: Any, flags: Any, where: tuple[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        transformer_config(model, flags)
    (finding,) = caught.value.findings
    place, path = where
    assert finding.where == (f"{model}:{place}" if isinstance(model, Path) and place[0].isdigit() else place)
    assert finding.path == path
    assert finding.text == message


def test_all_missing_and_mistyped_sizes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        transformer_config({"predictor": {"num_layers": "3", "hidden_size": 5.5}})
    assert sorted(finding.text for finding in caught.value.findings) == [
        '"hidden_size" is 5.5, expected a whole number',
        '"num_layers" is "3", expected a whole number or a list. Remove the quotes: 3',
        'predictor needs "num_heads". Add "num_heads"',
    ]
