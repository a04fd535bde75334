"""Our training step against a plain loop over diffusers' class, alternating in one process.

Both train the same architecture from the same files with the same switches: fp32, fused AdamW, gradient clipping at 1.0, the same
loader, autoencoder and text encoder, the same number of threads. The plain loop is what one would write by hand with
`WanTransformer3DModel`. Printed: medians and their ratio; the target is <= 1.03.

    python benchmarks/train_step.py [--steps 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags
from mm_core.data import build_dataset, build_loader
from mm_core.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TINY = Path("examples/tiny/wan22-t2v")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"hidden_size": 512, "ffn_dim": 1536, "num_heads": 8, "num_layers": 8},  # about 30 M parameters
}


def make_trainer(size: str, folder: Path) -> Trainer:
    """The demo's job with another size of predictor, nothing saved."""
    from mm_core.config import read_document

    model = read_document(TINY / "model.json").data
    model["predictor"] |= SIZES[size]
    path = folder / f"{size}.json"
    path.write_text(json.dumps(model))
    flags = parse_train_flags(
        ["--mm-model", str(path), "--mm-data", str(TINY / "data.json"), "--mm-tool", str(TINY / "tools.json"),
         "--fsdp2-config-path", str(TINY / "fsdp2.yaml"), "--train-iters", "100000", "--micro-batch-size", "4",
         "--global-batch-size", "4", "--lr", "1e-4", "--clip-grad", "1.0", "--seed", "1"]
    )  # fmt: skip
    job = load_training_job(flags)
    return Trainer(job, Accelerator.current(), None, build_dataset(job.components["dataset"], flags.seed))


def plain_step(trainer: Trainer) -> Callable[[], float]:
    """One step of a hand-written loop over diffusers' class, with the weights that ours starts from."""
    ours = trainer.model.predictor
    config = {k: v for k, v in ours.config.items() if not k.startswith("_")}
    model = WanTransformer3DModel(**config)
    model.load_state_dict(
        {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in ours.state_dict().items()}
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
    )
    dataset = build_dataset(trainer.job.components["dataset"], 1)
    batches: Iterator[dict[str, Any]] = iter(
        build_loader(dataset, trainer.job.data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=4, global_batch_size=4,
                     num_workers=trainer.flags.num_workers, consumed_samples=0)
    )  # fmt: skip
    sigmas = torch.as_tensor(trainer.model.diffusion.sigmas).float()
    weights = trainer.model.diffusion.training_weight(trainer.model.diffusion.timesteps).float()
    length = trainer.job.components["predictor"].fields["text_len"]

    def step() -> float:
        batch = next(batches)
        with torch.no_grad():
            latents = trainer.model.ae.encode(batch["video"])
            prompt, mask = trainer.model.text_encoder.encode(batch["prompt_ids"], batch["prompt_mask"])
            prompt = F.pad(prompt * mask[..., None], (0, 0, 0, length - prompt.shape[1]))
            noise = torch.randn_like(latents)
            index = torch.randint(len(sigmas), (len(latents),))
            sigma = sigmas[index].view(-1, 1, 1, 1, 1)
            noised = (1 - sigma) * latents + sigma * noise
        output = model(noised, sigmas[index] * 1000, prompt, return_dict=False)[0]
        losses = (output.float() - (noise - latents)).pow(2).flatten(1).mean(1) * weights[index]
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(size: str, steps: int, folder: Path) -> dict[str, Any]:
    """Alternate the two, after a warm-up of both."""
    trainer = make_trainer(size, folder)
    plain = plain_step(trainer)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(steps + 5):
        for name, run in (("ours", lambda: trainer._train_step(lambda: False)), ("plain", plain)):
            started = time.perf_counter()
            run()
            if number >= 5:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "size": size,
        "parameters": sum(p.numel() for p in trainer.model.predictor.parameters()),
        "steps": steps,
        "ours_ms": medians["ours"] * 1e3,
        "plain_ms": medians["plain"] * 1e3,
        "ratio": medians["ours"] / medians["plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    os.chdir(ROOT)  # the example's paths are meant from here
    Accelerator.current().init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(size, options.steps * (4 if size == "tiny" else 1), Path(folder)) for size in SIZES]
    sys.stdout.write(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
    )
    for row in rows:
        sys.stdout.write(
            f"{row['size']:>6}: {row['parameters'] / 1e6:.1f} M parameters, ours {row['ours_ms']:.1f} ms, "
            f"plain {row['plain_ms']:.1f} ms, ratio {row['ratio']:.3f} (target <= 1.03)\n"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
