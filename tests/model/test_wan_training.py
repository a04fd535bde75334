"""The training loss of each of Wan's models, and its gradients, against a derivation from diffusers' classes and formulas.

The derivation shares the generators (they are the contract of resuming) and the weights with ours, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_wan_i2v_processors import MEAN, STD
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN, TYPES
from torch import nn

from mm_core.models.sora import SoRAModel
from mm_core.models.text_encoders import UMT5
from mm_core.random import keyed_generator, keyed_normal
from mm_core.training.tasks.diffusion import DiffusionTask
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.i2v_processors import WanI2VProcessor, WanTI2VProcessor
from mm_plugin_wan22.predictor import WanDiT
from mm_plugin_wan22.scheduler import WanFlowMatchScheduler

SEED, SAMPLES = 11, [40, 41]
GRID: dict[str, Any] = {"shift": 5.0, "sigma_min": 0.0, "extra_one_step": True}
KINDS = ["t2v", "wan2.2-i2v", "i2v", "flf2v", "ti2v", "ti2v without a frame"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 257 tokens, as Wan's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("clip") / "image_encoder"
    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def build(name: str, clip: Path) -> SoRAModel:
    kind = name.split()[0]
    torch.manual_seed(3)
    processor: Any = None
    if kind in ("wan2.2-i2v", "i2v", "flf2v"):
        folder = None if kind == "wan2.2-i2v" else str(clip)
        processor = WanI2VProcessor(image_encoder=folder, last_frame=kind == "flf2v")
    elif name == "ti2v":
        processor = WanTI2VProcessor()
    return SoRAModel(
        predictor=WanDiT(**{**TINY_WAN, **TYPES[kind]}),
        diffusion=WanFlowMatchScheduler(**GRID),
        ae=WanVideoVAE(**TINY_VAE, latents_mean=MEAN, latents_std=STD, do_sample=False).eval(),
        text_encoder=UMT5(config=TINY_T5).eval(),
        i2v_processor=processor,
    )


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(2, 8, dtype=torch.int64)
    mask[0, :5] = mask[1, :8] = 1
    return {
        "video": torch.rand(2, 3, 9, 32, 48, generator=generator) * 2 - 1,
        "prompt_ids": torch.randint(0, 64, (2, 8), generator=generator) * mask,
        "prompt_mask": mask,
        "sample_index": torch.tensor(SAMPLES),
        "captions": ["a", "b"],
    }


def derived(name: str, model: SoRAModel, theirs: nn.Module, clip: Path) -> torch.Tensor:
    """The losses `[B]`, sample by sample, as one reads them in the papers and in upstream's pipelines."""
    from transformers import CLIPVisionModel

    kind = name.split()[0]
    given, vae, t5 = batch(), model.ae.model, model.text_encoder.model
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:1000]
    sigmas = 5 * sigmas / (1 + 4 * sigmas)
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    total = float((bell - bell.min()).sum())

    def encode(video: torch.Tensor) -> torch.Tensor:
        return (vae.encode(video).latent_dist.mode() - mean) / std

    losses = []
    for row, index in enumerate(SAMPLES):
        video = given["video"][row : row + 1]
        with torch.no_grad():
            clean = encode(video)
            ids, mask = (given[key][row : row + 1] for key in ("prompt_ids", "prompt_mask"))
            text = t5(input_ids=ids, attention_mask=mask).last_hidden_state[0, : int(mask.sum())]
            length = TYPES[kind].get("text_len", 16)
            text = F.pad(text, (0, 0, 0, length - len(text)))[None]
        noise = keyed_normal(SEED, "noise", [index], clean.shape[1:])
        point = int(torch.randint(0, 1000, (1,), generator=keyed_generator(SEED, "timestep", index)))
        sigma = float(sigmas[point])
        noised = (1 - sigma) * clean + sigma * noise
        target = noise - clean
        timestep = torch.tensor([1000 * sigma])
        images = None
        with torch.no_grad():
            if name == "ti2v":
                first = encode(video[:, :, :1])
                noised = torch.cat([first, noised[:, :, 1:]], 2)
                target = torch.cat([torch.zeros_like(first), target[:, :, 1:]], 2)
                timestep = torch.cat([torch.zeros(1, 6), torch.full((1, 12), 1000 * sigma)], 1)
            elif kind in ("wan2.2-i2v", "i2v", "flf2v"):
                grey = torch.zeros_like(video)
                grey[:, :, 0] = video[:, :, 0]
                mask = torch.zeros(1, 4, 3, 4, 6)
                mask[:, :, 0] = 1
                frames = [video[:, :, 0]]
                if kind == "flf2v":
                    grey[:, :, -1] = video[:, :, -1]
                    mask[:, 3, 2] = 1
                    frames.append(video[:, :, -1])
                noised = torch.cat([noised, mask, encode(grey)], 1)
                if kind != "wan2.2-i2v":
                    images = torch.cat([_clip(CLIPVisionModel.from_pretrained(clip), f) for f in frames])
        output = theirs(
            hidden_states=noised,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=images,
            return_dict=False,
        )[0]
        weight = (math.exp(-2 * (sigma - 0.5) ** 2) - float(bell.min())) * 1000 / total
        losses.append(weight * F.mse_loss(output, target))
    return torch.stack(losses)


def _clip(model: nn.Module, frame: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    square = F.interpolate(frame, (32, 32), mode="bicubic", align_corners=False)
    return model(((square + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients(name: str, upstream_wan: Callable[..., nn.Module], clip_folder: Path) -> None:
    model = build(name, clip_folder)
    theirs = upstream_wan(**TYPES[name.split()[0]])
    theirs.load_state_dict(model.predictor.state_dict(), strict=True)

    task = DiffusionTask(model, seed=SEED, device=torch.device("cpu"))
    (inputs,) = task.prepare([batch()])
    losses, weights, _ = task.loss(task.forward(model, inputs), inputs)
    assert weights.tolist() == [1.0, 1.0]
    expected = derived(name, model, theirs, clip_folder)
    assert (losses - expected).abs().max() <= 1e-6 * expected.abs().max()
    losses.sum().backward()
    expected.sum().backward()
    gradients = dict(theirs.named_parameters())
    total = torch.stack([p.grad.norm() for p in gradients.values()]).norm()
    for parameter_name, parameter in model.predictor.named_parameters():
        other = gradients[parameter_name].grad
        assert parameter.grad is not None, parameter_name
        difference = (parameter.grad - other).norm()
        assert difference <= 1e-4 * other.norm() + 1e-7 * total, (
            parameter_name,
            float(difference / other.norm()),
        )
    if name == "ti2v":  # what is given is clean, and there is nothing to predict
        first = inputs.conditions["first_frame_latents"]
        assert (inputs.noised_latents[:, :, :1] - first).abs().max() <= 1e-6
        assert (inputs.noise[:, :, :1] - inputs.latents[:, :, :1]).abs().max() <= 1e-6
