"""Validation while training: exact on any ranks, and without a trace in the training. Real jobs in ranks that are forked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from mm_core.config import load_training_job, parse_train_flags
from mm_core.data import build_dataset
from mm_core.data.collate import collate
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_core.random import keyed_seed
from mm_core.training.tasks.diffusion import DiffusionTask
from mm_core.weights.tensors import state_tensors
from tests import tiny_vlm
from tests.distributed import test_transformers_training as language
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import ROOT, TINY, trainer_of

pytestmark = pytest.mark.timeout(120)

SAMPLES = 5  # one rank of two has three of them, the other two


class Clips:
    """The tiny job's two clips again and again, each time with another noise."""

    def __init__(self, clips: Any, samples: int, validation: Any = None) -> None:
        self.clips, self.samples, self.validation = clips, samples, validation

    def __len__(self) -> int:
        return self.samples

    def get(self, index: int, key: int) -> Any:
        return self.clips.get(index % len(self.clips), key)


def clips_with_validation() -> Clips:
    os.chdir(ROOT)
    files = ["--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json")]
    job = load_training_job(
        parse_train_flags([*files, "--lr", "1", "--train-iters", "1", "--micro-batch-size", "1"])
    )
    clips = build_dataset(job.components["dataset"], 7)
    return Clips(clips, 2, Clips(clips, SAMPLES))


def by_hand(trainer: Any) -> float:
    """The mean over the samples, one after the other."""
    task = DiffusionTask(trainer.model, seed=keyed_seed(7, "validation") % 2**31, device=torch.device("cpu"))
    losses = []
    with torch.no_grad():
        for k in range(SAMPLES):
            batch = {
                **collate([trainer.looks.validation.batches.dataset.get(k, k)]),
                "sample_index": torch.tensor([k]),
            }
            parts = [
                task.loss(task.forward(trainer.model, one), one) for one in task.validation_inputs(batch)
            ]
            assert sum(weights.item() for _, weights, _ in parts) == pytest.approx(1)
            losses.append(sum(loss.item() for loss, _, _ in parts))
    return sum(losses) / SAMPLES


def validated(run: Path, *more: str) -> tuple[list[dict[str, Any]], float | None]:
    trainer = trainer_of(
        run, "--eval-interval", "2", "--train-iters", "3", *more, dataset=clips_with_validation()
    )
    trainer.train(lambda: False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], by_hand(trainer) if not trainer.mesh.pp else None


@pytest.mark.parametrize(
    "ways",
    [
        [("--micro-batch-size", "1")],
        pytest.param(
            [("--context-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")],
            marks=[pytest.mark.slow, pytest.mark.timeout(180)],
        ),
    ],
    ids=["data", "context and stages"],
)
def test_every_sample_counts_once_on_any_ranks(ways: list[tuple[str, ...]], tmp_path: Path) -> None:
    ((alone, expected),) = run_ranks(validated, 1, tmp_path / "one")
    assert [("val_loss" in record) for record in alone] == [
        False,
        True,
        True,
    ]  # after the last step in any case
    assert alone[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)
    for number, way in enumerate(ways):
        (records, again), _ = run_ranks(validated, 2, tmp_path / f"two{number}", *way)
        assert [record.get("val_samples") for record in records] == [None, SAMPLES, SAMPLES]
        for step in (1, 2):
            assert records[step]["val_loss"] == pytest.approx(alone[step]["val_loss"], rel=1e-5)
        assert again is None or records[-1]["val_loss"] == pytest.approx(again, rel=1e-6)


class Conversations:
    """Texts, images and videos by turns."""

    KINDS = ("text", "text", "image", "video", "two_images")

    def __init__(self, validation: Conversations | None = None) -> None:
        self.validation = validation

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return tiny_vlm.sample(self.KINDS[index], texts=4 + 3 * index, seed=index)

    @staticmethod
    def collate_fn(items: list[dict[str, Any]]) -> dict[str, Any]:
        return tiny_vlm.collate(items)


class Records(BaseCallback):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        self.records.append(record)


def network_files(folder: Path) -> Path:
    config = tiny_vlm.tiny_qwen3_vl(moe=True, attention_dropout=0.2)
    model = language.job_files(
        folder, loss_cfg={"router_aux_loss_coef": 0.0, "compute_mode": "dynamic_chunk", "chunk_size": 7}
    )
    config.save_pretrained(folder)
    return model


def conversed(model: Path, fsdp2: str, validate: bool, *more: str) -> tuple[list[StepRecord], dict[str, Any]]:
    """Train with two samples on a rank at a time: of three rounds one rank has the last alone, and the other none."""
    dataset = Conversations(Conversations() if validate else None)
    sizes = ("--micro-batch-size", "2", "--global-batch-size", "4", "--eval-interval", "2")
    trainer = language.trainer_of(model, fsdp2, False, None, *sizes, *more, dataset=dataset)
    seen = Records()
    trainer.callbacks.append(seen)
    trainer.train(lambda: False)
    weights = {
        name: language.whole(t).numpy().copy() for name, t in state_tensors(trainer.model.model).items()
    }
    return seen.records, weights


def cross_entropy_of(weights: dict[str, Any], folder: Path) -> float:
    """What transformers' own network says, in float64, one sample after the other."""
    # torch's grouped matrix products have no float64
    network = tiny_vlm.network_of(AutoConfig.from_pretrained(folder), experts_implementation="eager")
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    network.double().eval()
    total, count = 0.0, 0
    for index in range(SAMPLES):
        batch = tiny_vlm.collate([Conversations()[index]])
        labels = batch.pop("labels")[:, 1:]
        del batch["sample_index"]
        with torch.no_grad():
            logits = network(**batch).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != tiny_vlm.IGNORED).sum())
    return total / count


EXPERTS = "expert_parallel_size: 2\nmoe_modules: ['model.language_model.layers.{*}.mlp.experts']\n"


@pytest.mark.parametrize(
    ("fsdp2", "flags"),
    [
        (EXPERTS, ()),
        pytest.param("{}\n", ("--tensor-model-parallel-size", "2"), marks=pytest.mark.slow),
    ],
    ids=["experts", "tensors"],
)
def test_a_run_with_validation_trains_as_one_without(
    fsdp2: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    model = network_files(tmp_path)
    without, weights = run_ranks(conversed, 2, model, fsdp2, False, *flags)[0]
    records, same = run_ranks(conversed, 2, model, fsdp2, True, *flags)[0]
    assert [(r.loss, r.grad_norm) for r in records] == [(r.loss, r.grad_norm) for r in without]
    assert all((same[name] == weights[name]).all() for name in weights)
    assert ["val_loss" in r.extra for r in records] == [False, True, True]
    assert records[-1].extra["val_loss"] == pytest.approx(cross_entropy_of(same, tmp_path), rel=1e-5)
