"""What `wan_step.py` trains: our trainer, a loop over diffusers' class, and DiffSynth-Studio's step."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags, read_document
from mm_core.data import build_dataset, build_loader
from mm_core.training.tasks.diffusion import DiffusionInputs
from mm_core.training.tasks.encoding import Encoded
from mm_core.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TINY = Path("examples/tiny/wan22-t2v")
LR, BETAS, EPS, DECAY, CLIP, SEED = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0, 1
UNFUSED = ("--optimizer-selection", "torch_adamw")

#: Fields of `predictor` in place of the demo's. Heads are such that every implementation splits the rotary axes alike.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"hidden_size": 512, "ffn_dim": 1536, "num_heads": 4, "num_layers": 8},  # about 30 M parameters
}

#: Published shapes; `latents` are channels, frames, rows and columns.
SHAPES: dict[str, dict[str, Any]] = {
    "A14B": {
        "hidden_size": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096, "text_len": 512,
        "freq_dim": 256, "max_seq_len": 1024, "latents": (16, 21, 60, 104),  # 81 frames of 480 x 832: 32,760 tokens
    },
    "5B": {
        "hidden_size": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "text_dim": 4096, "text_len": 512,
        "freq_dim": 256, "max_seq_len": 1024, "latents": (48, 31, 44, 80),  # 121 frames of 704 x 1280: 27,280 tokens
    },
    # The same cases where there is no accelerator.
    "toy": {
        "hidden_size": 96, "ffn_dim": 256, "num_heads": 3, "num_layers": 4, "text_dim": 64, "text_len": 16,
        "freq_dim": 64, "max_seq_len": 64, "latents": (16, 3, 8, 8),
    },
}  # fmt: skip


def flops_of_block(shape: Mapping[str, Any]) -> float:
    """Floating-point operations of a block in forward and twice that in backward: matrix products and both attentions."""
    width, feed, text, tokens = shape["hidden_size"], shape["ffn_dim"], shape["text_len"], tokens_of(shape)
    products = (
        2 * tokens * (6 * width**2 + 2 * width * feed) + 2 * text * 2 * width**2
    )  # q, k, v, o; q, o; feed-forward
    return float(3 * (products + 4 * tokens * (tokens + text) * width))


def tokens_of(shape: Mapping[str, Any]) -> int:
    """Tokens of a clip."""
    _, frames, rows, columns = shape["latents"]
    return int(frames * (rows // 2) * (columns // 2))


# -- ours ---------------------------------------------------------------------------------------------------------------


def our_trainer(
    predictor: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    fsdp2: str = "recompute_modules: []\n",
    flags: tuple[str, ...] = (),
    micro_batch: int = 4,
) -> Trainer:
    """The demo's job with another predictor; nothing is saved.

    Args:
        predictor: fields in place of the demo's.
        model: sections in place of the demo's.
        data: a whole data.json in place of the demo's.
        fsdp2: text of fsdp2.yaml.
        flags: of the command line, after those that all runs share.
    """
    sections = read_document(TINY / "model.json").data | (model or {})
    sections.pop("$schema", None)
    sections["predictor"] = sections["predictor"] | predictor
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("model.json", "data.json", "fsdp2.yaml")}
        paths["model.json"].write_text(json.dumps(sections))
        written = data or read_document(TINY / "data.json").data
        written.pop("$schema", None)
        paths["data.json"].write_text(json.dumps(written))
        paths["fsdp2.yaml"].write_text(fsdp2)
        parsed = parse_train_flags([
            "--mm-model", str(paths["model.json"]), "--mm-data", str(paths["data.json"]),
            "--fsdp2-config-path", str(paths["fsdp2.yaml"]), "--train-iters", "100000", "--micro-batch-size", str(micro_batch),
            "--global-batch-size", str(micro_batch), "--lr", str(LR), "--lr-decay-style", "constant", "--clip-grad", str(CLIP),
            "--weight-decay", str(DECAY), "--seed", str(SEED), *flags,
        ])  # fmt: skip
        job = load_training_job(parsed)
        return Trainer(
            job, Accelerator.current(), None, build_dataset(job.components["dataset"], parsed.seed)
        )


def stored_features(folder: Path) -> dict[str, Any]:
    """Store latents and embeddings of the demo's clips; what `our_trainer` needs to train on them."""
    command = (
        "extract-features", "--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"),
        "--output", str(folder),
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "mm_core", *command], check=True, stdout=subprocess.DEVNULL)
    data = read_document(TINY / "data.json").data
    data["dataset_param"]["basic_parameters"] |= {
        "data_path": str(folder / "index.json"),
        "data_storage_mode": "sorafeatured",
    }
    return {"model": {"load_video_features": True, "load_text_features": True}, "data": data}


def our_step(trainer: Trainer) -> Callable[[], float]:
    """A step, with the reading of its numbers."""
    return lambda: trainer._train_step(lambda: False).read()[1]


def loss_of_ours(trainer: Trainer, inputs: DiffusionInputs) -> torch.Tensor:
    """The mean loss of a micro batch."""
    sums, weights, _ = trainer.task.loss(trainer.task.forward(trainer.model, inputs), inputs)
    return sums.sum() / weights.sum()


class GivenLatents:
    """Stands in for a task's encoders: latents and prompts of one shape, made once."""

    def __init__(self, shape: dict[str, Any], device: torch.device) -> None:
        self.encoded = Encoded(
            torch.randn(1, *shape["latents"], device=device),
            {
                "prompt": torch.randn(1, shape["text_len"], shape["text_dim"], device=device),
                "prompt_mask": torch.ones(1, shape["text_len"], dtype=torch.int64, device=device),
            },
            [0],
        )

    def encode(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[Encoded]:
        """The same for each micro batch."""
        for _ in micro_batches:
            yield self.encoded


def give_latents(trainer: Trainer, shape: dict[str, Any]) -> GivenLatents:
    """Let a trainer train on made-up latents of a shape, without data or encoders."""
    task: Any = trainer.task
    task.encoders = given = GivenLatents(shape, trainer.device)
    index = torch.zeros(1, dtype=torch.int64)
    batches: Any = trainer.batches
    batches._batches = iter(lambda: {"sample_index": index}, None)
    return given


# -- a loop over diffusers' class ---------------------------------------------------------------------------------------


class Plain:
    """What one would write by hand with `WanTransformer3DModel`.

    Args:
        model: on its device; with `bf16` it is wrapped by FSDP2, so that fp32 weights compute in bf16, as ours.
        trainer: whose encoders, loader and timesteps are used.
        batches: of the loader; None: `latents` and `prompt` are given.
        recompute, offload: as diffusers and FSDP2 offer them.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        trainer: Trainer,
        batches: Iterator[dict[str, Any]] | None,
        *,
        given: GivenLatents | None = None,
        bf16: bool = False,
        recompute: bool = False,
        offload: bool = False,
    ) -> None:
        self.model, self.trainer, self.batches, self.given = model, trainer, batches, given
        self.device, self.dtype = trainer.device, torch.bfloat16 if bf16 else torch.float32
        if recompute:
            model.enable_gradient_checkpointing()
        if bf16 or offload:
            shard: dict[str, Any] = {
                # FSDP2 would cast what is computed in fp32 on purpose: timesteps, rotary tables.
                "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
                if bf16
                else MixedPrecisionPolicy(),
                "offload_policy": CPUOffloadPolicy(pin_memory=Accelerator.current().has_pinned_memory)
                if offload
                else OffloadPolicy(),
            }
            for block in model.blocks:
                fully_shard(block, **shard)
            fully_shard(model, **shard)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        diffusion = trainer.model.diffusion
        self.sigmas = torch.as_tensor(diffusion.sigmas).float().to(self.device)
        self.weights = diffusion.training_weight(diffusion.timesteps).float().to(self.device)
        self.length = trainer.job.components["predictor"].fields["text_len"]

    @torch.no_grad()
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and prompts of the next micro batch."""
        if self.given is not None:
            return self.given.encoded.latents, self.given.encoded.conditions["prompt"]
        assert self.batches is not None
        batch, model = next(self.batches), self.trainer.model
        latents = model.ae.encode(batch["video"].to(self.device))
        prompt, mask = model.text_encoder.encode(
            batch["prompt_ids"].to(self.device), batch["prompt_mask"].to(self.device)
        )
        return latents, self.padded(prompt, mask)

    def padded(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Zeros beyond the mask and up to the model's length."""
        return F.pad(prompt * mask[..., None], (0, 0, 0, self.length - prompt.shape[1]))

    def predict(self, noised: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The model's output."""
        return self.model(noised.to(self.dtype), timestep, prompt.to(self.dtype), return_dict=False)[0]

    def loss(
        self,
        latents: torch.Tensor,
        prompt: torch.Tensor,
        noise: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Flow matching with Wan's weights, the mean over samples."""
        if noise is None or index is None:
            noise = torch.randn_like(latents)
            index = torch.randint(len(self.sigmas), (len(latents),), device=latents.device)
        sigma = self.sigmas[index].view(-1, 1, 1, 1, 1)
        output = self.predict((1 - sigma) * latents + sigma * noise, self.sigmas[index] * 1000, prompt)
        losses = (output.float() - (noise - latents)).pow(2).flatten(1).mean(1) * self.weights[index]
        return losses.mean()

    def __call__(self) -> float:
        """One step."""
        loss = self.loss(*self.inputs())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def own_batches(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """The batches of a trainer's job from a loader of their own."""
    flags = trainer.flags
    return iter(
        build_loader(
            build_dataset(trainer.job.components["dataset"], SEED), trainer.job.data, seed=SEED, dp_rank=0, dp_size=1,
            micro_batch_size=flags.micro_batch_size, global_batch_size=flags.global_batch_size, num_workers=flags.num_workers,
            consumed_samples=0,
        )
    )  # fmt: skip


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The predictor's whole weights, by diffusers' names."""
    state = trainer.model.predictor.state_dict()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): v.full_tensor() if hasattr(v, "full_tensor") else v
        for name, v in state.items()
    }


def upstream(trainer: Trainer, **changes: Any) -> WanTransformer3DModel:
    """diffusers' class in the predictor's shape, on the device, with random weights."""
    config = {k: v for k, v in trainer.model.predictor.config.items() if not k.startswith("_")}
    with trainer.device:
        return WanTransformer3DModel(**{**config, **changes})


def plain_twin(trainer: Trainer, bf16: bool = False) -> Plain:
    """The loop by hand, from the weights that ours starts from."""
    model = upstream(trainer)
    model.load_state_dict(weights_of(trainer))
    return Plain(model, trainer, own_batches(trainer), bf16=bf16)


# -- DiffSynth-Studio's step --------------------------------------------------------------------------------------------


class Synth(Plain):
    """DiffSynth-Studio's network, pipeline function and loss, under accelerate as its `launch_training_task` does it; with
    the fused optimizer and the clipping of the others.

    One timestep serves a whole micro batch, and the loss is in fp32.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, trainer: Trainer) -> None:
        from accelerate import Accelerator as Accelerate
        from diffsynth.diffusion.loss import FlowMatchSFTLoss
        from diffsynth.models.wan_video_dit import WanModel
        from diffsynth.pipelines.wan_video import WanVideoPipeline
        from diffsynth.utils.state_dict_converters.wan_video_dit import WanVideoDiTFromDiffusers

        fields = trainer.job.components["predictor"].fields
        names = ("in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "num_heads", "num_layers")
        pipe = WanVideoPipeline(device=trainer.device, torch_dtype=torch.float32)
        pipe.dit = WanModel(
            dim=fields["hidden_size"], eps=fields.get("eps", 1e-6), patch_size=tuple(fields["patch_size"]), has_image_input=False,
            **{name: fields[name] for name in names},
        ).to(trainer.device)  # fmt: skip
        pipe.dit.load_state_dict(WanVideoDiTFromDiffusers(weights_of(trainer)))
        pipe.scheduler.set_timesteps(1000, training=True, shift=trainer.model.diffusion.shift)
        self.sft_loss, self.pipe = FlowMatchSFTLoss, pipe
        super().__init__(pipe.dit, trainer, own_batches(trainer))
        self.accelerate = Accelerate(cpu=trainer.device.type == "cpu")
        pipe.dit, self.optimizer = self.accelerate.prepare(pipe.dit, self.optimizer)

    def predict(self, noised: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.pipe.model_fn(
            dit=self.pipe.dit, latents=noised, timestep=timestep, context=prompt
        )
        return output

    def __call__(self) -> float:
        latents, prompt = self.inputs()
        loss = self.sft_loss(self.pipe, input_latents=latents, context=prompt).mean()
        self.accelerate.backward(loss)
        self.accelerate.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
