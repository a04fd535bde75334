"""What wrappers of diffusers' video autoencoders share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from mm_core.models.protocols import Generators
from mm_registry.errors import UserError


def posterior_latents(
    posterior: Any, *, do_sample: bool, generator: Generators | None = None
) -> torch.Tensor:
    """Latents `[B, C, T', h, w]` of a diffusers `DiagonalGaussianDistribution`, at least fp32.

    Args:
        do_sample: draw from it; otherwise its mode.
        generator: one for all or one a sample; torch's global one if None.
    """
    latents: torch.Tensor
    if not do_sample:
        latents = posterior.mode()
    elif generator is None or isinstance(generator, torch.Generator):
        latents = posterior.sample(generator=generator)
    else:
        latents = posterior.sample(generator=list(generator))
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def check_folder_agrees(
    label: str, given: Mapping[str, Any], config: Mapping[str, Any], *, in_weights: Collection[str] = ()
) -> None:
    """Refuse fields of a section that describe another network than its pretrained folder.

    Args:
        label: id of the component, for the message.
        given: fields that the section gives.
        config: of the loaded network.
        in_weights: fields that the folder's weights hold, so that none may be given.

    Raises:
        UserError: naming all of them.
    """
    wrong = [f"{name} (the folder's weights hold them)" for name in in_weights if name in given]
    wrong += [
        f"{name} {value} (the folder has {config.get(name)})"
        for name, value in given.items()
        if name not in in_weights and _comparable(config.get(name)) != _comparable(value)
    ]
    if wrong:
        raise UserError(
            f"{label}: the ae section contradicts its pretrained folder: {', '.join(wrong)}; remove these keys"
        )


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
