"""Training a diffusion predictor: encode, add noise, predict, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mm_core.config.component import ComponentConfig
from mm_core.config.latents import latent_channels, latent_strides
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_core.training.tasks.base import LossParts
from mm_core.training.tasks.encoding import Encoded, Encoders
from mm_registry.errors import UserError


@dataclass(frozen=True)
class DiffusionInputs:
    """One prepared micro batch. `conditions` are keyword arguments of the predictor beside latents and timestep."""

    latents: torch.Tensor  # [B, C, T, H, W], normalised
    noised_latents: torch.Tensor  # [B, C, T, H, W]
    noise: torch.Tensor  # [B, C, T, H, W]
    timesteps: torch.Tensor  # [B], timestep values
    conditions: dict[str, Any]


class DiffusionTask:
    """The loss of `SoRAModel`: `diffusion.training_losses(predictor(x_t, t, prompt), x_0, x_t, noise, t)`.

    Noise and timestep of a sample are keyed by (seed, purpose, consumed-sample index): each sample has its own
    timestep, and neither the rank, the world size, the micro batch nor a resume changes it.

    Args:
        model: components; only its predictor is trained.
        seed: the run's seed.
        device: where inputs are put.
    """

    def __init__(self, model: SoRAModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.encoders = Encoders(model, seed=seed, device=device)

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[DiffusionInputs]:
        for encoded in self.encoders.encode(micro_batches):
            yield self._noised(encoded)

    @torch.no_grad()
    def _noised(self, encoded: Encoded) -> DiffusionInputs:
        latents, indices = encoded.latents, encoded.sample_index
        noise = keyed_normal(self.seed, "noise", indices, latents.shape[1:])
        noised, noise, timesteps = self.model.diffusion.q_sample(
            latents,
            noise=noise.to(latents.device, latents.dtype),
            generator=[keyed_generator(self.seed, "timestep", i) for i in indices],
            **encoded.conditions,
        )
        return DiffusionInputs(
            latents=latents,
            noised_latents=noised,
            noise=noise,
            timesteps=timesteps,
            conditions=encoded.conditions,
        )

    def forward(self, model: torch.nn.Module, inputs: DiffusionInputs) -> torch.Tensor:
        # The predictor is its own FSDP root, so it is called directly and not through the composite.
        predictor: Any = model.predictor
        output: torch.Tensor = predictor(inputs.noised_latents, inputs.timesteps, **inputs.conditions)
        return output  # [B, C, T, H, W]

    def loss(self, outputs: torch.Tensor, inputs: DiffusionInputs) -> LossParts:
        losses = self.model.diffusion.training_losses(
            outputs,
            inputs.latents,
            inputs.noised_latents,
            inputs.noise,
            inputs.timesteps,
            **inputs.conditions,
        )  # [B] fp32
        return losses, torch.ones_like(losses), {}

    def tokens(self, inputs: DiffusionInputs) -> int:
        batch, _, *sizes = inputs.latents.shape
        patch = _patch_size(self.model.predictor)
        return batch * math.prod(-(-size // step) for size, step in zip(sizes, patch, strict=True))

    @staticmethod
    def example_batch(
        components: Mapping[str, ComponentConfig],
        *,
        batch_size: int,
        sequence_length: int | None = None,
        device: torch.device | str = "meta",
    ) -> DiffusionInputs:
        """Inputs of `forward` in the sizes that the sections say, with values that mean nothing; no folder of weights is
        needed.

        The clip is as large as `preprocess_parameters` allows. Its latents have the channels that the autoencoder or the
        predictor tells, and sides by the strides that these tell, else by `vae_scale_factor`; the prompt has
        `model_max_length` tokens of the predictor's width.

        Args:
            components: of the job.
            sequence_length: has no meaning here: a clip's size says how many tokens it has.

        Raises:
            UserError: a section does not tell a size.
        """
        predictor, dataset = components["predictor"], components["dataset"]
        clip = dataset.fields.get("preprocess_parameters") or {}
        sizes: list[Any] = [clip.get(key) for key in ("num_frames", "max_height", "max_width")]
        ae = components.get("ae")
        scale: Any = latent_strides(ae, predictor) or clip.get("vae_scale_factor")
        if None in (*sizes, scale):
            raise UserError(
                f"{dataset.label}: its section does not tell how large a clip is (num_frames, max_height, max_width, "
                "vae_scale_factor), which an example needs; only datasets with these keys have one"
            )
        channels = (latent_channels(ae) if ae is not None else None) or _told(
            predictor, "latent_channels", "out_dim"
        )
        frames, height, width = sizes
        size = (channels, (frames - 1) // scale[0] + 1, height // scale[1], width // scale[2])
        latents = torch.randn(batch_size, *size, device=device)
        tokenizer = dataset.fields.get("tokenizer_config") or {}
        length = tokenizer.get("model_max_length") or _told(predictor, "text_len")
        prompt = torch.randn(batch_size, length, _told(predictor, "text_width", "text_dim"), device=device)
        mask = torch.ones(batch_size, length, dtype=torch.int64, device=device)
        return DiffusionInputs(
            latents=latents,
            noised_latents=latents,
            noise=latents,
            timesteps=torch.full((batch_size,), 500.0, device=device),
            conditions={"prompt": prompt, "prompt_mask": mask},
        )


def _told(component: ComponentConfig, *names: str) -> int:
    """A size that a component's config class or its section tells."""
    for name in names:
        for value in (getattr(component.config, name, None), component.fields.get(name)):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise UserError(
        f"{component.label}: neither its section nor its config class tells {' or '.join(names)}, which an example needs; "
        f"give the config class a property {names[0]}"
    )


def _patch_size(predictor: Any) -> tuple[int, ...]:
    """Latent frames, rows and columns of one token: `patch_size` of the predictor's config, or its own, where
    that says three numbers; else a token for each position.
    """
    # The config first: diffusers' models warn when they are asked for what is in theirs.
    for holder in (getattr(predictor, "config", None), predictor):
        patch = getattr(holder, "patch_size", None)
        if isinstance(patch, list | tuple) and len(patch) == 3:
            return tuple(patch)
    return (1, 1, 1)
