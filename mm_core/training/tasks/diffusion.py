"""Training a diffusion predictor: encode, add noise, predict, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mm_core.config.component import ComponentConfig
from mm_core.config.conditions import example_shapes
from mm_core.config.latents import latent_channels, latent_strides
from mm_core.data.dealing import Deal, Owners
from mm_core.models.patches import patch_size
from mm_core.models.protocols import ExpertDiffusion
from mm_core.models.sora import EXPERT_NAMES, EXPERTS, SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_core.training.tasks.base import LossParts
from mm_core.training.tasks.encoding import Encoded, Encoders
from mm_registry.errors import UserError

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the trained timesteps, at which the loss of a validation set is taken; 0.9 is more noise than 0.1."""


@dataclass(frozen=True)
class DiffusionInputs:
    """One prepared micro batch. `conditions` are keyword arguments of the predictor beside latents and timestep."""

    latents: torch.Tensor  # [B, C, T, H, W], normalised
    noised_latents: torch.Tensor  # [B, C, T, H, W]
    noise: torch.Tensor  # [B, C, T, H, W]
    timesteps: torch.Tensor  # [B], timestep values
    conditions: dict[str, Any]
    expert: int = 0  # position in EXPERTS of the predictor that runs it
    sample_weight: torch.Tensor | None = None  # [B] fp32, 0 where a sample only fills a slot; None: 1
    samples: int | None = None  # that have a weight; None: all
    deal: Deal | None = None  # its place in the step, where two experts are trained
    scales: tuple[tuple[str, float], ...] = ()  # metrics that are so many times the loss


class DiffusionTask:
    """The loss of `SoRAModel`: `diffusion.training_losses(predictor(x_t, t, prompt), x_0, x_t, noise, t)`.

    Noise and timestep of a sample are keyed by (seed, purpose, consumed-sample index): each sample has its own
    timestep, and neither the rank, the world size, the micro batch nor a resume changes it.

    Args:
        model: components; its predictor is trained, or its two experts, each with the samples whose timesteps it owns.
        seed: the run's seed.
        device: where inputs are put.
    """

    def __init__(self, model: SoRAModel, *, seed: int, device: torch.device) -> None:
        if model.experts:
            _check_schedule(model.diffusion)
        self.model = model
        self.seed = seed
        self.device = device
        self.encoders = Encoders(model, seed=seed, device=device)

    @property
    def owners(self) -> Owners | None:
        """From consumed-sample indices to the expert, 0 or 1, that owns each by its timestep; None if one is trained."""
        return self._owners if self.model.experts else None

    def _owners(self, indices: Sequence[int]) -> list[int]:
        schedule: ExpertDiffusion = self.model.diffusion
        return self._sides(schedule.timesteps_of([self._generator(i) for i in indices]))

    def _sides(self, timesteps: torch.Tensor) -> list[int]:
        boundary = self.model.diffusion.boundary_timestep
        return [0 if t >= boundary else 1 for t in timesteps.tolist()]

    def _generator(self, index: int) -> torch.Generator:
        return keyed_generator(self.seed, "timestep", index)

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[DiffusionInputs]:
        for encoded in self.encoders.encode(micro_batches):
            inputs = self._noised(encoded)
            weight, deal = encoded.beside.get("sample_weight"), encoded.beside.get("deal")
            if deal is not None and weight is not None:
                inputs = replace(
                    inputs,
                    expert=deal.expert,
                    sample_weight=weight.to(self.device, non_blocking=True),
                    samples=int(weight.count_nonzero()),
                    deal=deal,
                )
            yield inputs

    def validation_inputs(self, batch: dict[str, Any]) -> Iterator[DiffusionInputs]:
        """One batch of a validation set, noised to each of `QUANTILES` of the trained timesteps: the loss at each is told as
        `loss/q10`, …, and of two experts as the mean of their own, `loss/high` and `loss/low`; the loss is the mean over
        all.

        A diffusion without `timestep_at` draws a timestep for each sample, keyed by it, as training does.
        """
        timestep_at = getattr(self.model.diffusion, "timestep_at", None)
        for encoded in self.encoders.encode([batch]):
            if timestep_at is None:
                yield self._own_side(self._noised(encoded))
                continue
            noised = [
                replace(
                    self._own_side(self._noised(encoded, timestep_at(quantile))),
                    sample_weight=torch.full(
                        (len(encoded.sample_index),), 1 / len(QUANTILES), device=self.device
                    ),
                )
                for quantile in QUANTILES
            ]
            sides = [inputs.expert for inputs in noised]
            for quantile, inputs in zip(QUANTILES, noised, strict=True):
                own = sides.count(inputs.expert) / len(sides)
                scales = [(f"loss/q{100 * quantile:02.0f}", float(len(QUANTILES)))]
                if self.model.experts:
                    scales.append((f"loss/{EXPERT_NAMES[inputs.expert]}", 1 / own))
                yield replace(inputs, scales=tuple(scales))

    def _own_side(self, inputs: DiffusionInputs) -> DiffusionInputs:
        """Of a batch whose samples have one timestep, the expert that owns it."""
        if not self.model.experts:
            return inputs
        return replace(inputs, expert=self._sides(inputs.timesteps[:1])[0])

    @torch.no_grad()
    def _noised(self, encoded: Encoded, timestep: float | None = None) -> DiffusionInputs:
        latents, indices = encoded.latents, encoded.sample_index
        noise = keyed_normal(self.seed, "noise", indices, latents.shape[1:])
        noised, noise, timesteps = self.model.diffusion.q_sample(
            latents,
            noise=noise.to(latents.device, latents.dtype),
            t=None if timestep is None else torch.full((len(indices),), timestep),
            generator=[self._generator(i) for i in indices],
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
        # Each predictor is an FSDP root of its own, so it is called directly and not through the composite.
        predictor: Any = getattr(model, EXPERTS[inputs.expert])
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
        weights = torch.ones_like(losses)
        if inputs.sample_weight is not None:
            weights = weights * inputs.sample_weight
            losses = losses * weights
        return losses, weights, {name: losses.detach().sum() * scale for name, scale in inputs.scales}

    def tokens(self, inputs: DiffusionInputs) -> int:
        batch, _, *sizes = inputs.latents.shape
        batch = batch if inputs.samples is None else inputs.samples
        patch = patch_size(self.model.predictor)
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
        `model_max_length` tokens of the predictor's width. What given frames become has the shapes that the predictor's
        config class tells.

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
        given = {
            name: torch.randn(batch_size, *shape, device=device)
            for name, shape in example_shapes(components, size).items()
        }
        return DiffusionInputs(
            latents=latents,
            noised_latents=latents,
            noise=latents,
            timesteps=torch.full((batch_size,), 500.0, device=device),
            conditions={"prompt": prompt, "prompt_mask": mask, **given},
        )


def _check_schedule(diffusion: Any) -> None:
    if not isinstance(diffusion, ExpertDiffusion) or diffusion.boundary_timestep is None:
        raise UserError(
            f"low_noise_predictor: {type(diffusion).__name__} does not say at which timestep it takes over, so that both "
            "experts cannot be trained in one job; give diffusion a boundary (a sigma) and no expert, if it takes them"
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
