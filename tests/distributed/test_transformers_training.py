"""Jobs with a network of transformers: the loop, sharded, with and without images; saved, continued, exported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import Qwen3VLMoeForConditionalGeneration

from mm_core.accelerator import Accelerator
from mm_core.config import TrainFlags, load_training_job, parse_train_flags
from mm_core.config.assemble import Assembly
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.job import draft_training_job
from mm_core.config.parallel import ParallelSizes
from mm_core.models.factory import build_model
from mm_core.random import keyed_generator
from mm_core.training.run_folder import RunFolder
from mm_core.training.tasks.language import IGNORED
from mm_core.training.trainer import Trainer
from mm_core.weights.tensors import state_tensors
from mm_registry import default_manager
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.tiny import _whole as whole
from tests.model.test_moe_layouts import qwen3_vl_moe

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny/wan22-t2v"
LENGTH, PATCHES, MERGED = 16, 16, 4  # of an image of 4 by 4 patches, two by two of which become a token


class Conversations(Dataset[dict[str, Any]]):
    """Samples of random tokens, of which every second begins with an image."""

    def __init__(self, images: bool) -> None:
        self.images = images

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = keyed_generator(0, "conversation", index)
        ids = torch.randint(50, (LENGTH,), generator=generator)
        kinds = torch.zeros_like(ids)
        item: dict[str, Any] = {}
        if self.images and index % 2:
            ids[:MERGED], kinds[:MERGED] = 60, 1
            item = {
                "pixel_values": torch.randn(PATCHES, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([1, 4, 4]),
            }
        labels = ids.masked_fill(torch.arange(LENGTH) < 5 + index % 3, IGNORED)
        mask = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "mm_token_type_ids": kinds,
            **item,
        }

    @staticmethod
    def collate_fn(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
        return batch


def job_files(folder: Path, **model: Any) -> Path:
    """config.json of a tiny network of experts, and a model file that starts it from random weights."""
    network: Any = qwen3_vl_moe()
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    frozen = {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": False}}
    section = {
        "model_id": "qwen3_vl_moe", "init_from_hf_path": str(folder), "init": "random", "image_encoder": frozen,
        "text_decoder": {"freeze": False}, "loss_cfg": {"router_aux_loss_coef": 0.01}, **model,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(section))
    return folder / "model.json"


def trainer_of(
    model: Path, fsdp2: str, images: bool, run: Path | None, *more: str, dataset: Any = None
) -> Trainer:
    os.chdir(ROOT)
    sharding = model.parent / f"fsdp2-{os.getpid()}.yaml"
    sharding.write_text(fsdp2)
    flags = parse_train_flags([
        "--mm-model", str(model), "--mm-data", str(TINY / "data.json"), "--fsdp2-config-path", str(sharding),
        "--lr", "1e-3", "--lr-decay-style", "constant", "--seed", "7", "--num-workers", "0", "--train-iters", "3",
        "--micro-batch-size", "1", "--global-batch-size", "4",
        *([] if run is None else ["--save", str(run)]), *more,
    ])  # fmt: skip
    job = load_training_job(flags)
    if run is not None and dist.get_rank() == 0:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator.current()
    accelerator.seed_all(flags.seed)
    folder = None if run is None else RunFolder(run)
    return Trainer(job, accelerator, folder, dataset or Conversations(images))


def trained(*args: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses, and the final weights."""
    trainer = trainer_of(*args)
    losses: list[float] = []
    tell = trainer._tell

    def note(context: Any, unread: int = 0) -> bool:
        losses.extend(report.read()[1] for report in list(trainer.reports)[: len(trainer.reports) - unread])
        return tell(context, unread)

    trainer._tell = note  # type: ignore[method-assign]
    trainer.train(lambda: False)
    weights = {name: whole(t).numpy().copy() for name, t in state_tensors(trainer.model.model).items()}
    return losses, weights


def close(
    a: tuple[list[float], dict[str, Any]], b: tuple[list[float], dict[str, Any]], tolerance: float
) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    assert max(abs(a[1][name] - b[1][name]).max() for name in b[1]) < tolerance


@pytest.mark.parametrize(
    ("fsdp2", "images"),
    [
        ("sharding_size: auto\n", True),
        ("sharding_size: auto\nexpert_parallel_size: 2\nmoe_modules: ['model.language_model.layers.{*}.mlp.experts']\n", False),
    ],
    ids=["images", "experts"],
)  # fmt: skip
def test_two_ranks_train_as_one(fsdp2: str, images: bool, tmp_path: Path) -> None:
    model = job_files(tmp_path)
    (one,) = run_ranks(trained, 1, model, "sharding_size: auto\n", images, None)
    two = run_ranks(trained, 2, model, fsdp2, images, None)
    assert len(one[0]) == 3
    for rank in two:
        close(rank, one, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["tensor", "context", None])
def test_a_run_is_saved_continued_and_exported(shared: str | None, tmp_path: Path) -> None:
    """What is shared by two ranks goes on with FSDP2 alone."""
    model = job_files(tmp_path)
    fsdp2, run = f"align_fsdp_param_groups: {str(shared is None).lower()}\n", tmp_path / "run"
    flags = ("--tensor-model-parallel-size", "2") if shared == "tensor" else ()
    flags = ("--context-parallel-size", "2") if shared == "context" else flags
    (whole_run,) = run_ranks(trained, 1, model, fsdp2, True, None)
    first = run_ranks(trained, 2, model, fsdp2, True, run, "--exit-interval", "2", "--save-hf", *flags)
    rest = run_ranks(trained, 2, model, fsdp2, True, run, "--load", str(run))
    losses = first[0][0] + rest[0][0]
    close((losses, rest[0][1]), whole_run, 2e-4)
    exported = Qwen3VLMoeForConditionalGeneration.from_pretrained(run / "hf/iter_0000002/model")
    assert all((first[0][1][name] == t.numpy()).all() for name, t in exported.state_dict().items())


def test_a_loss_without_a_gradient_is_an_error(tmp_path: Path) -> None:
    model = job_files(tmp_path)
    with pytest.raises(RankError, match="the routers get no gradient from it; write use_reentrant: false"):
        run_ranks(trained, 1, model, "use_reentrant: true\n", False, None)


def real_size(world: int) -> tuple[float, int, int]:
    """Parameters of one rank of the 235B model, in the forked process of a single one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.chdir(ROOT)
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=world)
    assembly = Assembly(default_manager())
    flags = TrainFlags(mm_model="examples/qwen3vl/235B-A22B/model.json")
    model = build_model(draft_training_job(flags, assembly, to_run=False).components, device="cpu")
    whole = sum(p.numel() for p in model.parameters())
    fsdp2 = Fsdp2Config(expert_parallel_size=8, param_dtype="bf16", align_fsdp_param_groups=True)
    model.fully_shard(None, fsdp2, ParallelSizes(ep=8))
    experts = model.model.model.language_model.layers[93].mlp.experts.gate_up_proj
    return sum(p.to_local().numel() for p in model.parameters()) / whole, experts.to_local().shape[0], whole


@pytest.mark.slow
def test_the_largest_model_is_sharded_without_its_weights() -> None:
    ((share, experts, whole),) = run_ranks(real_size, 1, 128)
    assert whole == 235_670_022_896
    assert share == pytest.approx(1 / 128, rel=1e-3)
    assert experts == 1  # of 128: eight ranks share a layer's experts, and sixteen each of theirs
