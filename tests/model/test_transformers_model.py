"""`TransformersModel` and the language task against transformers' own loss and gradients; the real networks on meta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

import mm_core
from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.flags import TrainFlags
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.job import draft_training_job
from mm_core.config.parallel import ParallelSizes
from mm_core.models.factory import build_component, build_model
from mm_core.models.transformers_model import TransformersModel
from mm_core.random import keyed_generator
from mm_core.sharding.combinations import parallel_problems
from mm_core.training.precheck import check_patterns
from mm_core.training.tasks.language import IGNORED, LanguageTask, token_losses
from mm_registry import default_manager
from mm_registry.errors import UserError
from tests.distributed.models import moe
from tests.model.test_moe_layouts import qwen3_vl_moe

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen3vl"
VOCABULARY = 64


def dense() -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, pad_token_id=None,
        )
    )  # fmt: skip


def qwen3_vl() -> Any:
    config = qwen3_vl_moe().config.to_dict()
    text = {key: config["text_config"][key] for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "pad_token_id",
    )}  # fmt: skip
    vision = {**config["vision_config"], "model_type": "qwen3_vl_vision"}
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )


NETWORKS = {"qwen3": dense, "qwen3_moe": moe, "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe}


def batch(samples: int = 3, length: int = 10, seed: int = 0) -> dict[str, Any]:
    """Samples of different lengths, padded at the end; the first tokens are not learnt."""
    generator = keyed_generator(seed, "text", 0)
    ids = torch.randint(VOCABULARY - 8, (samples, length), generator=generator)
    lengths = torch.tensor([length - 2 * i for i in range(samples)])[:, None]
    places = torch.arange(length)
    mask = (places < lengths).long()
    labels = ids.masked_fill((places < 2) | (mask == 0), IGNORED)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "sample_index": torch.arange(samples)}


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def run(task: LanguageTask, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a global batch as the loop takes it, and its gradients."""
    sums, weight = torch.zeros(()), torch.zeros(())
    task.model.zero_grad()
    for inputs in task.prepare(batches):
        losses, weights, _ = task.loss(task.forward(task.model, inputs), inputs)
        losses.sum().backward()
        sums, weight = sums + losses.detach().sum(), weight + weights.sum()
    for parameter in task.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= weight
    return (sums / weight).item(), gradients(task.model.model)


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    network: Any = NETWORKS[name]().train()
    given = batch()
    network(
        input_ids=given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"], use_cache=False
    ).loss.backward()  # fmt: skip
    wanted = gradients(network)
    task = LanguageTask(TransformersModel(network), seed=0, device=torch.device("cpu"))
    loss, found = run(task, [given])
    with torch.no_grad():
        own = network(**{k: v for k, v in given.items() if k != "sample_index"}).loss
    assert loss == pytest.approx(own.item(), rel=1e-6)
    assert found.keys() == wanted.keys()
    assert wanted
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_any_size_give_one_loss() -> None:
    torch.manual_seed(0)
    model = TransformersModel(moe(), router_aux_loss_coef=0.1)
    task = LanguageTask(model, seed=0, device=torch.device("cpu"))
    whole = batch(4)
    parts = [{key: value[i : i + n] for key, value in whole.items()} for i, n in ((0, 1), (1, 2), (3, 1))]
    loss, one = run(task, [whole])
    again, several = run(task, parts)
    assert again == pytest.approx(loss, rel=1e-6)
    for key, gradient in one.items():
        torch.testing.assert_close(several[key], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_for_balanced_experts_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    network: Any = moe().train()
    network.config.router_aux_loss_coef = network.router_aux_loss_coef = 0.1
    given = batch(1)
    own = network(
        input_ids=given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"],
        output_router_logits=True, use_cache=False,
    ).loss  # fmt: skip
    own.backward()
    wanted = gradients(network)
    model = TransformersModel(network, router_aux_loss_coef=0.1)
    loss, found = run(LanguageTask(model, seed=0, device=torch.device("cpu")), [given])
    assert loss == pytest.approx(own.item(), rel=1e-6)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0\.1, but Qwen3ForCausalLM has no experts"):
        LanguageTask(TransformersModel(dense(), router_aux_loss_coef=0.1), seed=0, device=torch.device("cpu"))


def test_tokens_that_are_not_learnt_have_no_loss() -> None:
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED] * 3])
    losses = token_losses(torch.zeros(2, 3, 4), targets)
    torch.testing.assert_close(losses, torch.tensor([[1.0, 0, 1.0], [0, 0, 0]]) * torch.tensor(4.0).log())


# -- from files ---------------------------------------------------------------------------------------------------------


def write(folder: Path, network: Any, **model: Any) -> str:
    """A folder with the network's config.json, and a model file beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    file = folder.parent / "model.json"
    section = {
        "init_from_hf_path": str(folder),
        "init": "random",
        "image_encoder": {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}},
        "text_decoder": {"freeze": False},
    }
    file.write_text(json.dumps({**section, **model}))
    return str(file)


def components(file: str, data: str | None = None) -> dict[str, ComponentConfig]:
    assembly = Assembly(default_manager())
    draft = draft_training_job(TrainFlags(mm_model=file, mm_data=data), assembly, to_run=False)
    assert not [str(f) for f in assembly.findings if f.level == "error" and f.code != "missing-path"]
    return draft.components


def test_a_model_is_built_from_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "network", qwen3_vl_moe(), loss_cfg={"router_aux_loss_coef": 0.01})
    parts = components(file)  # by model_type, for no id is given
    assert parts["model"].model_id == "qwen3_vl_moe"
    assert parts["task"].model_id == "language"
    assert mm_core.TASK_MAPPINGS["language"] is LanguageTask
    model = build_model(parts, device="cpu")
    assert isinstance(model, TransformersModel)
    assert isinstance(model.model, Qwen3VLMoeForConditionalGeneration)
    assert model.router_aux_loss_coef == 0.01
    assert all(p.is_meta and p.dtype is torch.float32 for p in model.parameters())
    trained = {name.split(".")[1] for name, p in model.model.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "weight"}  # lm_head.weight
    assert model.model.config.vision_config._attn_implementation == "sdpa"


def test_parts_are_frozen_as_the_file_says(tmp_path: Path) -> None:
    freeze = {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": True}}
    file = write(tmp_path / "network", qwen3_vl(), image_encoder=freeze, text_decoder={"freeze": True})
    network = build_model(components(file), device="cpu").model
    trained = {".".join(name.split(".")[:3]) for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"}
    freeze["vision_encoder"]["freeze"] = True
    file = write(tmp_path / "network", qwen3_vl(), image_encoder=freeze, text_decoder={"freeze": True})
    with pytest.raises(UserError, match="every part is frozen"):
        build_model(components(file), device="cpu")


def test_attention_that_needs_an_absent_package_is_an_error(tmp_path: Path) -> None:
    text = {"freeze": False, "attn_implementation": "flash_attention_2"}
    file = write(tmp_path / "network", qwen3_vl(), text_decoder=text)
    with pytest.raises(UserError, match=r"config\.json with flash_attention_2 attention"):
        build_model(components(file), device="cpu")
    network = build_component(components(file)["model"], "meta", attention="eager")  # as a plan does
    assert network.config.text_config._attn_implementation == "eager"


def test_a_folder_that_asks_for_foreign_code_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "network", qwen3_vl())
    config = json.loads((tmp_path / "network/config.json").read_text())
    config["text_config"]["attn_implementation"] = "someone/kernel"
    (tmp_path / "network/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="someone/kernel"):
        build_model(components(file), device="cpu")


# -- the published models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8B", 8_767_123_696), ("30B-A3B", 31_070_754_032), ("235B-A22B", 235_670_022_896)],
)
def test_examples_describe_the_published_models(name: str, parameters: int, monkeypatch: Any) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    parts = components(str(EXAMPLES / name / "model.json"), str(EXAMPLES / "data.json"))
    network = build_component(parts["model"], "meta")
    count = sum(p.numel() for p in network.parameters())
    assert count == parameters
    plan = check_patterns(parts, {"model": network}, Fsdp2Config(), None)["model"]
    paths = [unit.path for unit in plan.units]
    blocks = [path.removeprefix("model.visual.") for path in paths if "visual" in path]
    assert blocks[8:11] == ["blocks.8", "deepstack_merger_list.0", "blocks.9"]
    assert paths[paths.index("model.visual.merger") + 1] == "model.language_model.embed_tokens"
    assert paths[-1] == "lm_head"
    assert {info.name.split(".")[1] for info in plan.root.parameters} == {"visual", "language_model"}
    for sizes in (ParallelSizes(cp=8), ParallelSizes(cp=64, cp_algo="ring"), ParallelSizes(tp=4, cp=8)):
        assert not list(parallel_problems(network, plan, sizes))
    inputs = LanguageTask.example_batch(parts, batch_size=2, sequence_length=1024)
    assert inputs.arguments["pixel_values"].shape == (2 * 32 * 32, 3 * 2 * 16 * 16)
    assert inputs.arguments["image_grid_thw"].tolist() == [[1, 32, 32]] * 2
    assert inputs.targets.shape == (2, 1024)
    assert inputs.targets.is_meta


@pytest.mark.parametrize(
    ("size", "model", "latents"),
    [
        ("A14B", "pretrain_model_high.json", (16, 13, 60, 104)),  # 49 frames of 480 × 832 pixels
        # 704 × 1280; its autoencoder halves a side once more, which nothing but the channels tells without its folder.
        ("5B", "pretrain_model.json", (48, 13, 44, 80)),
    ],
)
def test_an_example_of_the_diffusion_task_has_the_sizes_of_its_files(
    size: str, model: str, latents: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    folder = EXAMPLES.parent / "wan2.2" / size / "t2v"
    parts = components(str(folder / model), str(folder / "data.json"))
    inputs = mm_core.TASK_MAPPINGS[parts["task"].model_id].example_batch(parts, batch_size=2)
    assert inputs.latents.shape == (2, *latents)
    assert inputs.conditions["prompt"].shape == (2, 512, 4096)
    assert inputs.latents.is_meta
