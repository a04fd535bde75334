"""LoRA under FSDP2: parity with PEFT in one process, exact resume on other numbers of ranks, folders that PEFT and
transformers load.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_core.config.lora import LoraConfig
from mm_core.data.order import GlobalOrder
from mm_core.models.conversion import convert
from mm_core.models.lora import add_lora, initialise_adapters
from mm_core.models.lora_inference import with_adapter
from mm_core.sharding.plan import bare_name
from mm_core.training.tasks.language import IGNORED
from mm_core.weights.errors import WeightsError
from mm_core.weights.metadata import read_metadata
from mm_core.weights.peft_names import adapter_tensors
from tests import tiny_vlm
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.test_transformers_training import Conversations, trainer_of
from tests.distributed.tiny import _whole as whole

pytestmark = pytest.mark.timeout(120)

PLAIN = "align_fsdp_param_groups: false\n"
LAYERS = ("--lora-target-modules", "q_proj,v_proj,down_proj", "--lora-r", "4", "--lora-alpha", "12")
STEPS = 3
ONCE = ("--save-interval", "1", "--exit-interval", "1", *LAYERS)


def job_files(folder: Path, moe: bool = False, frozen: bool = True, **model: Any) -> Path:
    """A tiny network with weights, and a model file that trains its text part."""
    tiny_vlm.folder(folder, moe=moe, weights=True, chat=False)
    section = {
        "model_id": "qwen3_vl_moe" if moe else "qwen3_vl", "init_from_hf_path": str(folder),
        "image_encoder": {"vision_encoder": {"freeze": frozen}, "vision_projector": {"freeze": frozen}},
        "text_decoder": {"freeze": False}, "loss_cfg": {}, **model,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(section))
    return folder / "model.json"


def trained(model: Path, fsdp2: str, run: Path | None, *more: str) -> tuple[list[float], dict[str, Any]]:
    """Losses, and the adapter's final values by the module's names."""
    trainer = trainer_of(model, fsdp2, False, run, *more)
    losses: list[float] = []
    tell = trainer._tell

    def note(context: Any, unread: int = 0) -> bool:
        losses.extend(report.read()[1] for report in list(trainer.reports)[: len(trainer.reports) - unread])
        return tell(context, unread)

    trainer._tell = note  # type: ignore[method-assign]
    trainer.train(lambda: False)
    values = {n: whole(t).detach().numpy().copy() for n, t in adapter_tensors(trainer.model.model).items()}
    return losses, values


def close(a: tuple[list[float], dict[str, Any]], b: tuple[list[float], dict[str, Any]], atol: float) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    assert max(abs(a[1][name] - b[1][name]).max() for name in b[1]) < atol


def by_peft(folder: Path, start: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """The same training by PEFT and torch alone, in float64."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=targets)).double().train()
    parameters = {
        name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad
    }
    assert parameters.keys() == start.keys()
    for name, parameter in parameters.items():
        parameter.data = torch.as_tensor(start[name]).double()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
    losses = []
    data = Conversations(False)
    order = GlobalOrder(len(data), seed=7)
    for step in range(STEPS):
        batch = data.collate_fn([data[order[4 * step + i]] for i in range(4)])
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy() for name, p in parameters.items()}


def first_values(folder: Path) -> dict[str, Any]:
    """What an adapter starts from."""
    from transformers import AutoModelForImageTextToText

    network = AutoModelForImageTextToText.from_pretrained(folder)
    network.model.visual.requires_grad_(False)
    add_lora(network, LoraConfig(("q_proj", "v_proj", "down_proj"), rank=4, alpha=12.0))
    initialise_adapters(network, 7)
    return {name: tensor.detach().numpy() for name, tensor in adapter_tensors(network).items()}


def test_two_ranks_train_as_peft_does_in_one_process(tmp_path: Path) -> None:
    model = job_files(tmp_path)
    expected = by_peft(tmp_path, first_values(tmp_path))
    for rank in run_ranks(trained, 2, model, PLAIN, None, *LAYERS):
        close(rank, expected, 2e-5)


def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    """A checkpoint holds the adapter alone; what is continued is the same to the bit."""
    model, run = job_files(tmp_path), tmp_path / "run"
    whole_run = run_ranks(trained, 2, model, PLAIN, None, *LAYERS)[0]
    first = run_ranks(trained, 2, model, PLAIN, run, *ONCE)[0]
    keys = {
        k for k in read_metadata(run / "checkpoints/iter_0000001").state_dict_metadata if "optim." not in k
    }
    assert keys == {f"model.{name}" for name in whole_run[1]}
    same = run_ranks(trained, 2, model, PLAIN, None, "--load", str(run), *LAYERS)[0]
    assert first[0] + same[0] == whole_run[0]
    assert all((same[1][name] == whole_run[1][name]).all() for name in same[1])


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    """2 ranks, then 1, then 4."""
    model, run = job_files(tmp_path), tmp_path / "run"
    whole_run = run_ranks(trained, 2, model, PLAIN, None, *LAYERS)[0]
    first = run_ranks(trained, 2, model, PLAIN, run, *ONCE)[0]
    second = run_ranks(trained, 1, model, PLAIN, run, "--load", str(run), *ONCE)[0]
    third = run_ranks(trained, 4, model, PLAIN, run, "--load", str(run), *LAYERS)[0]
    close((first[0] + second[0] + third[0], third[1]), whole_run, 2e-6)


def exported(model: Path, run: Path, *more: str) -> Any:
    """What the network computes after its steps: logits of a text."""
    trainer = trainer_of(model, PLAIN, False, run, "--save-hf", *more)
    trainer.train(lambda: False)
    with torch.no_grad():
        return trainer.model(input_ids=torch.arange(20, 36)[None]).logits.numpy().copy()


def logits_of(network: Any) -> Any:
    with torch.no_grad():
        return network.eval()(input_ids=torch.arange(20, 36)[None]).logits.numpy()


@pytest.mark.parametrize(
    "moe", [pytest.param(False, id="layers", marks=pytest.mark.slow), pytest.param(True, id="experts")]
)
def test_folders_are_those_of_peft_and_transformers(moe: bool, tmp_path: Path) -> None:
    """Adapter and merged weights of a sharded run compute what it does; with experts, adapters of parameters too."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = job_files(tmp_path / "base", moe, lora_save_full_weight=True)
    parameters = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj") if moe else ()
    targets = ("q_proj,v_proj",) if moe else (LAYERS[1],)
    flags = ("--lora-target-modules", *targets, "--lora-r", "4", "--lr", "1e-2")
    flags += ("--lora-target-parameters", *parameters) if moe else ()
    run = tmp_path / "run"
    expected = run_ranks(exported, 2, model, run, *flags)[0]
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert abs(logits_of(base) - expected).max() > 1e-3
    step = run / f"hf/iter_{STEPS:07d}"
    merged = AutoModelForImageTextToText.from_pretrained(step / "model-merged")
    assert logits_of(merged) == pytest.approx(expected, abs=1e-5)
    by_peft = PeftModel.from_pretrained(base, step / "model")
    assert logits_of(by_peft) == pytest.approx(expected, abs=1e-5)
    by_transformers = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    by_transformers.load_adapter(str(step / "model"))
    assert logits_of(by_transformers) == pytest.approx(expected, abs=1e-5)


def test_a_checkpoint_becomes_an_adapter_or_a_merged_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model, run = job_files(tmp_path / "base", moe=True), tmp_path / "run"
    flags = (
        "--lora-target-modules",
        "q_proj",
        "--lora-target-parameters",
        "mlp.experts.down_proj",
        "--lr",
        "1e-2",
    )
    flags += ("--train-iters", "1")
    expected = run_ranks(exported, 1, model, run, *flags)[0]
    done = convert(run, tmp_path / "adapter")
    theirs = run / "hf/iter_0000001/model"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (theirs / name).read_bytes()
    assert done.tensors == 8
    convert(run, tmp_path / "merged", merge_lora=True)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert logits_of(merged) == pytest.approx(expected, abs=1e-5)
    for source in (run, theirs):
        added = with_adapter(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), source)
        assert logits_of(added) == pytest.approx(expected, abs=1e-5)
        assert not any(p.requires_grad or "lora" in name for name, p in added.named_parameters())
    shutil.copytree(tmp_path / "base", tmp_path / "another")
    tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl(True), seed=5).save_pretrained(tmp_path / "another")
    with pytest.raises(WeightsError, match=r"these are not the weights that .* was trained on"):
        convert(run, tmp_path / "none", merge_lora=True, base=str(tmp_path / "another"))


@pytest.mark.slow
def test_what_a_run_starts_from(tmp_path: Path) -> None:
    """A run without LoRA lies under the adapter, a folder of PEFT is the adapter; each wrong mixture is named."""
    model, run = job_files(tmp_path / "base"), tmp_path / "run"
    full = tmp_path / "full"
    run_ranks(trained, 1, model, PLAIN, full, "--train-iters", "1", "--save-hf")
    on_full = ("--load-base-model", str(full), "--train-iters", "1", *LAYERS)
    (of_run,) = run_ranks(trained, 1, model, PLAIN, run, *on_full, "--save-hf")
    of_folder = run_ranks(
        trained, 2, model, PLAIN, None, "--load", str(full / "hf/iter_0000001/model"), *on_full[2:]
    )[0]
    close(of_folder, of_run, 1e-5)
    adapter = ("--lora-load", str(run / "hf/iter_0000001/model"), *on_full)
    (again,) = run_ranks(trained, 1, model, PLAIN, None, *adapter, "--lr", "1e-12", "--weight-decay", "0")
    close(([], again[1]), ([], of_run[1]), 1e-8)
    for flags, text in (
        (("--load", str(full), *LAYERS), "was trained without LoRA and has no adapter; .* --load-base-model"),
        (("--load", str(run)), "has an adapter alone, and the job trains without LoRA"),
        (("--load", str(run), *LAYERS), "weights under the adapters: .*full → .*base"),
        (
            ("--lora-target-modules", "q_porj"),
            "q_porj: the network has no layer of that name; did you mean q_proj",
        ),
        (("--lora-target-modules", "qkv"), "lie in parts that are frozen"),
    ):
        with pytest.raises(RankError, match=text):
            run_ranks(trained, 1, model, PLAIN, None, *flags)


def trained_names(model: Path, *more: str) -> list[str]:
    trainer = trainer_of(model, "param_dtype: bf16\nreduce_dtype: fp32\n", False, None, *more)
    trainer.train(lambda: False)
    parameters = [(bare_name(n), p) for n, p in trainer.model.model.named_parameters()]
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for _, p in parameters)
    return [name for name, parameter in parameters if parameter.requires_grad]


@pytest.mark.slow
def test_other_parts_are_trained_whole_beside_adapters_of_some(tmp_path: Path) -> None:
    """What is frozen is kept in the dtype in which it is computed."""
    model = job_files(
        tmp_path, frozen=False, lora_apply_modules=["model.language_model"], lora_mixed_training=True
    )
    names = run_ranks(trained_names, 2, model, "--lora-target-modules", "q_proj", "--train-iters", "1")[0]
    assert {name for name in names if "lora_" not in name} == {
        name for name in names if not name.startswith("model.language_model.")
    }
    assert any(name.startswith("model.visual.blocks.0.attn.qkv.weight") for name in names)
    assert sum("lora_A" in name for name in names) == 2
