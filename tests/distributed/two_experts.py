"""A tiny job with two experts, and the same training as a plain loop on one process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags
from mm_core.config.document import read_document
from mm_core.data import build_dataset
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_core.sharding.plan import bare_name
from mm_core.training.run_folder import RunFolder
from mm_core.training.trainer import Trainer
from tests.distributed.test_participation import whole
from tests.e2e.conftest import ROOT, TINY

BOUNDARY = 0.7
CLIP = 0.3
SEED = 7


def write_files(folder: Path, *, boundary: float = BOUNDARY, **fsdp2: Any) -> dict[str, str]:
    """The tiny example with a second expert; `fsdp2` are keys of its sharding file."""
    data = json.loads(json.dumps(read_document(str(ROOT / TINY / "model.json")).data))
    data.pop("$schema", None)
    data["diffusion"]["boundary"] = boundary
    data["predictor"] |= {"num_layers": 2, "hidden_size": 32, "ffn_dim": 48, "num_heads": 2}
    data["low_noise_predictor"] = dict(data["predictor"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "fsdp2.yaml").write_text(json.dumps({"sharding_size": "auto", **fsdp2}), encoding="utf-8")
    return {"model": str(folder / "model.json"), "fsdp2": str(folder / "fsdp2.yaml")}


def job_of(files: dict[str, str], *more: str, steps: int = 4, batch: int = 4, micro: int = 1) -> Any:
    os.chdir(ROOT)  # classic files name others from there
    return load_training_job(parse_train_flags([
        "--mm-model", files["model"], "--mm-data", str(ROOT / TINY / "data.json"),
        "--fsdp2-config-path", files["fsdp2"], "--lr", "1e-2", "--seed", str(SEED), "--num-workers", "0",
        "--train-iters", str(steps), "--micro-batch-size", str(micro), "--global-batch-size", str(batch),
        "--clip-grad", str(CLIP), "--lr-decay-style", "constant", "--weight-decay", "0.1", *more,
    ]))  # fmt: skip


class Seen(BaseCallback):
    """Records of the steps, and the timesteps that each expert is given."""

    def __init__(self, trainer: Trainer) -> None:
        self.records: list[StepRecord] = []
        self.timesteps: dict[str, list[float]] = {}
        for name, module in trainer.trained.items():
            seen = self.timesteps.setdefault(name, [])

            def note(_: nn.Module, args: tuple[Any, ...], seen: list[float] = seen) -> None:
                seen += args[1].tolist()

            module.register_forward_pre_hook(note)

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        self.records.append(record)


def trained(files: dict[str, str], *more: str, save: str | None = None, **sizes: Any) -> dict[str, Any]:
    """Train on all ranks; whole weights, records, and what the experts saw on this rank."""
    job = job_of(files, *more, *(("--save", save) if save else ()), **sizes)
    accelerator = Accelerator.current()
    run = None
    if save is not None:
        run = RunFolder(Path(save))
        if dist.get_rank() == 0:
            run.path.mkdir(parents=True, exist_ok=True)
        dist.barrier()
    trainer = Trainer(job, accelerator, run, build_dataset(job.components["dataset"], SEED))
    seen = Seen(trainer)
    trainer.callbacks = [seen]
    trainer.train(lambda: False)
    trainer.updates.all_here()
    ema: dict[str, Any] = {}
    if trainer.ema is not None:
        for name in trainer.trained:
            ema |= {f"{name}.{key}": whole(t) for key, t in trainer.ema.tensors(name).items()}
    return {
        "weights": {
            f"{n}.{bare_name(k)}": whole(p)
            for n, m in trainer.trained.items()
            for k, p in m.named_parameters()
        },
        "ema": ema,
        "losses": [record.loss for record in seen.records],
        "extra": [dict(record.extra) for record in seen.records],
        "norms": [record.grad_norm for record in seen.records],
        "timesteps": seen.timesteps,
        "passes": str(trainer.exchange),
    }


def plainly(
    files: dict[str, str], steps: int, batch: int, decay: float | None = None, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Two single runs on one stream of samples: each expert by a loop of its own over the samples whose timestep it owns, one
    at a time, with torch's AdamW and clipping; a step without a sample of its own does not happen to it.
    """
    job = job_of(files, *more, steps=steps, batch=batch)
    dataset = build_dataset(job.components["dataset"], SEED)
    trainer = Trainer(job, Accelerator.current(), None, dataset)  # for its initial weights and encoders
    boundary = 1000 * job.components["diffusion"].fields["boundary"]
    weights, averages, log = {}, {}, [dict[str, float]() for _ in range(steps)]
    for name, high in (("predictor", True), ("low_noise_predictor", False)):
        network: Any = trainer.trained[name]
        learned = [p for p in network.parameters() if p.requires_grad]  # with LoRA the adapters
        optimizer = torch.optim.AdamW(learned, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        for group in optimizer.param_groups:
            flags = job.flags
            group |= {"betas": (flags.adam_beta1, flags.adam_beta2), "eps": flags.adam_eps}
        average = {key: p.detach().clone() for key, p in network.named_parameters()}
        for step in range(steps):
            losses = []
            for inputs in _samples(trainer, dataset, range(step * batch, (step + 1) * batch)):
                if (inputs.timesteps.item() >= boundary) is not high:
                    continue
                output = network(inputs.noised_latents, inputs.timesteps, **inputs.conditions)
                error = (output - (inputs.noise - inputs.latents)).square().mean()
                losses.append(error * trainer.model.diffusion.training_weight(inputs.timesteps)[0])
            if not losses:
                continue
            loss = torch.stack(losses).mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learned, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            short = "high" if high else "low"
            log[step] |= {f"loss/{short}": loss.item(), f"grad_norm/{short}": norm.item(), short: len(losses)}
            if decay is not None:
                for key, parameter in network.named_parameters():
                    average[key] = decay * average[key] + (1 - decay) * parameter.detach()
        weights |= {f"{name}.{key}": p.detach().numpy() for key, p in network.named_parameters()}
        averages |= {f"{name}.{key}": value.numpy() for key, value in average.items()}
    for told in log:
        assert math.isfinite(sum(told.values()))
    return {"weights": weights, "ema": averages, "log": log}


def _samples(trainer: Trainer, dataset: Any, keys: range) -> Iterable[Any]:
    from mm_core.data.order import GlobalOrder

    order = GlobalOrder(len(dataset), SEED)
    for key in keys:
        item = dataset.get(order[key], key)
        tensors = {k: v[None] for k, v in item.items() if isinstance(v, torch.Tensor)}
        yield from trainer.task.prepare([{**tensors, "sample_index": torch.tensor([key])}])
