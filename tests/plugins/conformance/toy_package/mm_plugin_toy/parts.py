"""An image processor, a dataset, a task, a callback and a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mm_core.data.buckets import ClipShape
from mm_core.observe.callback import BaseCallback
from mm_core.random import keyed_generator, keyed_normal


class ToyFirstFrame:
    """The first frames, in grey."""

    def __init__(self, *, frames: int = 1) -> None:
        self.frames = frames

    def __call__(self, ae: Any, videos: torch.Tensor, latents: Any = None, **batch: Any) -> dict[str, Any]:
        return {"first_frames": videos[:, :, : self.frames].mean(1)}


class ToyClips(torch.utils.data.Dataset):
    """Noise for videos; sample and key say which."""

    def __init__(self, *, samples: int = 4, seed: int = 0) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index, index)

    def bucket(self, index: int) -> ClipShape:
        return ClipShape(2, 4, 4)

    def get(self, index: int, key: int) -> dict[str, Any]:
        generator = keyed_generator(self.seed, "clip", index, key)
        return {"video": torch.randn(3, 2, 4, 4, generator=generator), "file": f"{index}.mp4"}


class ToyTask:
    """The loss of a diffusion, noise keyed by the consumed sample."""

    def __init__(self, model: Any, *, seed: int, device: torch.device) -> None:
        self.model, self.seed, self.device = model, seed, device

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[Any]:
        for batch in micro_batches:
            with torch.no_grad():
                yield self._prepare(batch)

    def _prepare(self, batch: dict[str, Any]) -> Any:
        indices = batch["sample_index"].tolist()
        latents = self.model.encode_video(batch["video"])
        prompt, mask = self.model.encode_text(batch["prompt_ids"], batch["prompt_mask"])
        noise = keyed_normal(self.seed, "noise", indices, latents.shape[1:])
        keys = [keyed_generator(self.seed, "timestep", i) for i in indices]
        noised, noise, t = self.model.diffusion.q_sample(latents, noise=noise, generator=keys)
        return latents, noised, noise, t, {"prompt": prompt, "prompt_mask": mask}

    def forward(self, model: Any, inputs: Any) -> torch.Tensor:
        _, noised, _, t, conditions = inputs
        return model.predictor(noised, t, **conditions)

    def loss(self, outputs: torch.Tensor, inputs: Any) -> Any:
        latents, noised, noise, t, _ = inputs
        losses = self.model.diffusion.training_losses(outputs, latents, noised, noise, t)
        return losses, torch.ones_like(losses), {"loss": losses.detach().sum()}

    def tokens(self, inputs: Any) -> int:
        return inputs[0][:, 0].numel()


class ToyCallback(BaseCallback):
    """Remembers the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, context: Any, record: Any) -> None:
        self.losses.append(record.loss)


class ToyPipeline:
    """Noise to videos."""

    def __init__(self, model: Any, tokenizer: Any, *, input_size: Sequence[int], device: Any = None) -> None:
        self.model, self.tokenizer, self.input_size = model, tokenizer, input_size

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: Any = None,
        negative_prompt: str | None = None,
        latents: torch.Tensor | None = None,
        progress: Any = None,
    ) -> torch.Tensor:
        model = self.model
        ids, masks = zip(*(self.tokenizer(prompt) for prompt in prompts), strict=True)
        prompt, mask = model.encode_text(torch.stack(ids), torch.stack(masks))
        indices = list(range(len(prompts)) if indices is None else indices)
        if latents is None:
            shape = (model.ae.latent_channels, *model.ae.latent_shape(*self.input_size))
            latents = keyed_normal(seed or 0, "noise", indices, shape)
        conditions = {"prompt": prompt, "prompt_mask": mask}
        latents = model.diffusion.sample(model.predictor, latents, conditions, steps=steps, progress=progress)
        return model.ae.decode(latents).clamp(-1, 1)
