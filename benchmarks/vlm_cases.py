"""What `vlm_step.py` trains: networks, samples, our trainer and transformers' own, stepping by turns."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PrinterCallback,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags, read_document
from mm_core.data.chat.collate import ChatCollate, join
from mm_core.data.chat.packing import pack
from mm_core.training.trainer import Trainer as OurTrainer

ROOT = Path(__file__).resolve().parents[1]
CLIPS = "examples/tiny/wan22-t2v/data.json"
IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = 1, 2, 3, 4, 8
PATCH, MERGE, GRID = 16, 2, (1, 8, 12)  # an image of 128 by 192 pixels is 24 tokens
LR, CLIP, SEED = 1e-4, 1.0, 1

#: hidden size, layers, heads, vocabulary; of the vision tower width and blocks.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "vocabulary": 1024, "vision": 32, "blocks": 3},
    "small": {"hidden": 384, "layers": 6, "heads": 6, "vocabulary": 8192, "vision": 128, "blocks": 4},
    "experts": {"hidden": 192, "layers": 4, "heads": 4, "vocabulary": 4096, "vision": 64, "blocks": 3, "experts": 16},
    "vocabulary": {"hidden": 128, "layers": 2, "heads": 4, "vocabulary": 151936, "vision": 32, "blocks": 3},
    "8B": {
        "hidden": 4096, "layers": 36, "heads": 32, "vocabulary": 151936, "vision": 1152, "blocks": 27,
        "intermediate": 12288, "key_values": 8, "head_dim": 128,
    },
}  # fmt: skip


def config_of(size: str, layers: int | None = None) -> Any:
    """transformers' configuration of a size; with other layers than its own if they are given."""
    s = SIZES[size]
    head_dim = s.get("head_dim", s["hidden"] // s["heads"])
    rotary = head_dim // 2
    text: dict[str, Any] = {
        "vocab_size": s["vocabulary"], "hidden_size": s["hidden"], "num_hidden_layers": layers or s["layers"],
        "intermediate_size": s.get("intermediate", s["hidden"] * 3), "num_attention_heads": s["heads"],
        "num_key_value_heads": s.get("key_values", s["heads"] // 2), "head_dim": head_dim,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
            "mrope_section": [rotary - 2 * (rotary * 5 // 16), rotary * 5 // 16, rotary * 5 // 16],
        },
    }  # fmt: skip
    if experts := s.get("experts"):
        text |= {
            "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": s["hidden"] * 3 // 4,
            "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [],
        }  # fmt: skip
    vision = {
        "depth": s["blocks"], "hidden_size": s["vision"], "intermediate_size": s["vision"] * 4,
        "num_heads": max(2, s["vision"] // 72), "patch_size": PATCH, "spatial_merge_size": MERGE,
        "temporal_patch_size": 2, "num_position_embeddings": 2304 if size == "8B" else 256,
        "out_hidden_size": s["hidden"], "deepstack_visual_indexes": [8, 16, 24] if size == "8B" else [0, 1],
    }  # fmt: skip
    cls = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    return cls(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip


def network_class(config: Any) -> Any:
    """transformers' class of a configuration."""
    return (
        Qwen3VLMoeForConditionalGeneration
        if isinstance(config, Qwen3VLMoeConfig)
        else Qwen3VLForConditionalGeneration
    )


def write_weights(folder: Path, size: str, layers: int | None = None) -> Path:
    """A folder as the hub has them, with random weights that both trainers start from."""
    torch.manual_seed(SEED)
    config = config_of(size, layers)
    network_class(config)._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


# -- samples ------------------------------------------------------------------------------------------------------------


def lengths_of(count: int, median: float = 150.0, spread: float = 0.9, longest: int = 1024) -> list[int]:
    """Tokens of samples as instruction sets have them: log-normal, many short ones and a long tail, cut at `longest`."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.empty(count).log_normal_(torch.tensor(median).log().item(), spread, generator=generator)
    return [int(length) for length in drawn.clamp(40, longest)]


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Random tokens; every second sample begins with an image. The last two thirds are learnt.

    Args:
        lengths: tokens of each sample.
        vocabulary: of the network.
        capacity: several samples share a sequence of so many tokens; 0: each has its own.
        images: whether there are any.
    """

    def __init__(self, lengths: list[int], vocabulary: int, capacity: int = 0, images: bool = True) -> None:
        self.lengths, self.vocabulary, self.images = lengths, vocabulary, images
        self.rows = pack(lengths, capacity) if capacity else None
        self.collate_fn = ChatCollate(pad_id=0)

    def __len__(self) -> int:
        return len(self.rows if self.rows is not None else self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.rows is None:
            return self._sample(index)
        return join([self._sample(i) for i in self.rows[index]], documents=True)

    def _sample(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = self.lengths[index]
        ids = torch.randint(FIRST_WORD, self.vocabulary, (length,), generator=generator)
        kinds = torch.zeros_like(ids)
        item = {}
        if self.images and index % 2 == 0:
            tokens = GRID[1] * GRID[2] // MERGE**2
            ids[0], ids[1 : tokens + 1], ids[tokens + 1] = VISION_START, IMAGE, VISION_END
            kinds[1 : tokens + 1] = 1
            patches = GRID[0] * GRID[1] * GRID[2]
            item = {
                "pixel_values": torch.randn(patches, 3 * 2 * PATCH**2, generator=generator),
                "image_grid_thw": torch.tensor([GRID]),
            }
        labels = ids.masked_fill(torch.arange(length) < max(length // 3, 30), -100)
        return {"input_ids": ids, "labels": labels, "mm_token_type_ids": kinds, **item}


def tokens_of(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens that are no padding."""
    return int(batch["attention_mask"].sum())


# -- ours ---------------------------------------------------------------------------------------------------------------


def our_trainer(
    folder: Path,
    samples: Samples,
    micro_batch: int,
    *,
    loss: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    fsdp2: str = "",
    flags: tuple[str, ...] = (),
) -> OurTrainer:
    """Our trainer over a folder of weights.

    Args:
        loss: of model.json's `loss_cfg`.
        text: of its `text_decoder`.
        fsdp2: text of fsdp2.yaml.
        flags: of the command line.
    """
    experts = _has_experts(folder)
    trained = {"freeze": False}
    model = {
        "model_id": "qwen3_vl_moe" if experts else "qwen3_vl", "init_from_hf_path": str(folder),
        "image_encoder": {"vision_encoder": trained, "vision_projector": trained},
        "text_decoder": {**trained, **(text or {})}, "loss_cfg": {"router_aux_loss_coef": 0.0, **(loss or {})},
    }  # fmt: skip
    # The samples are made here; the section only has to be that of some dataset.
    data = {
        **read_document(CLIPS).data,
        "dataloader_param": {"sampler_type": "SequentialSampler"},
    }
    with tempfile.TemporaryDirectory() as files:
        paths = {name: Path(files) / name for name in ("model.json", "data.json", "fsdp2.yaml")}
        paths["model.json"].write_text(json.dumps(model))
        paths["data.json"].write_text(json.dumps(data))
        # transformers' Trainer recomputes nothing by default.
        paths["fsdp2.yaml"].write_text(f"recompute_modules: []\n{fsdp2}")
        job = load_training_job(parse_train_flags([
            "--mm-model", str(paths["model.json"]), "--mm-data", str(paths["data.json"]),
            "--fsdp2-config-path", str(paths["fsdp2.yaml"]), "--train-iters", "100000", "--num-workers", "0",
            "--micro-batch-size", str(micro_batch), "--global-batch-size", str(micro_batch), "--lr", str(LR),
            "--lr-decay-style", "constant", "--clip-grad", str(CLIP), "--weight-decay", "0.0", "--seed", str(SEED), *flags,
        ]))  # fmt: skip
        return OurTrainer(job, Accelerator.current(), None, samples)


class Ours:
    """Steps of our trainer, with the reading of its numbers; losses and seen tokens are kept."""

    def __init__(self, trainer: OurTrainer) -> None:
        self.trainer = trainer
        self.losses: list[float] = []
        self.tokens = 0
        source: Any = trainer.batches
        batches = source._batches

        def counted() -> Any:
            for batch in batches:
                self.tokens += tokens_of(batch)
                yield batch

        source._batches = counted()

    def __call__(self) -> None:
        report = self.trainer._train_step(lambda: False)
        self.losses.append(report.read()[1])


# -- theirs -------------------------------------------------------------------------------------------------------------


Seconds = tuple[float, float]
"""By the clock, and of this process's CPUs: with other jobs on the machine the second says more."""


def now() -> Seconds:
    """The time."""
    return time.perf_counter(), time.process_time()


class _InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class _Turns(TrainerCallback):
    """Times transformers' steps, all that is between two of them included, and runs the others after each."""

    def __init__(self, others: Mapping[str, Callable[[], None]], synchronize: Callable[[], None]) -> None:
        self.others, self.synchronize = others, synchronize
        self.times: dict[str, list[Seconds]] = {name: [] for name in ("transformers", *others)}
        self.began: Seconds | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self.began or now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.began is not None
        self._note("transformers", self.began)
        for name, step in self.others.items():
            began = now()
            step()
            self._note(name, began)
        self.began = now()

    def _note(self, name: str, began: Seconds) -> None:
        self.synchronize()
        wall, cpu = now()
        self.times[name].append((wall - began[0], cpu - began[1]))


def by_turns(
    folder: Path,
    samples: Samples,
    micro_batch: int,
    steps: int,
    others: Mapping[str, Callable[[], None]],
    *,
    fused: bool = True,
    experts: str | None = None,
    bf16: bool = False,
) -> tuple[dict[str, list[Seconds]], list[float]]:
    """Train with transformers' `Trainer` over accelerate, and after each of its steps one of each of the others.

    Returns:
        Times of each step by name, `transformers` first; and the losses of transformers' steps.
    """
    accelerator = Accelerator.current()
    config = config_of_folder(folder)
    options = {"experts_implementation": experts} if experts else {}
    network = network_class(config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **options
    )
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, max_steps=steps, per_device_train_batch_size=micro_batch, learning_rate=LR,
            lr_scheduler_type="constant", optim="adamw_torch_fused" if fused else "adamw_torch", weight_decay=0.0,
            max_grad_norm=CLIP, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=SEED,
            use_cpu=accelerator.type == "cpu", bf16=bf16, remove_unused_columns=False, dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        turns = _Turns(others, accelerator.synchronize)
        trainer = _InOrder(
            model=network,
            args=arguments,
            train_dataset=samples,
            data_collator=samples.collate_fn,
            callbacks=[turns],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return turns.times, losses


def config_of_folder(folder: Path) -> Any:
    """The configuration that `write_weights` wrote."""
    return (Qwen3VLMoeConfig if _has_experts(folder) else Qwen3VLConfig).from_pretrained(folder)


def _has_experts(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_vl_moe")
