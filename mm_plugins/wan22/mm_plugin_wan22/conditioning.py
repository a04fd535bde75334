"""The image conditions of Wan's transformer: checked, and brought to where upstream's forward takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from mm_plugin_wan22.variants import taken
from mm_registry.errors import UserError


class TokenTimesteps(nn.Module):
    """A timestep for each token where a first frame is given; a module, so that ranks which share a sequence can be
    given their own tokens' here.
    """

    def forward(
        self, timestep: torch.Tensor, tokens: tuple[int, int, int], first_frame_given: bool
    ) -> torch.Tensor:
        """Timesteps `[B]` -> `[B, S]`, 0 for the tokens of the first frame; as they are if no frame is given, or if there
        is one for each token already.

        Args:
            tokens: of a sample, in frames, rows and columns.
        """
        if not first_frame_given or timestep.ndim == 2:
            return timestep
        each = timestep.unsqueeze(1).repeat(1, math.prod(tokens))
        each[:, : tokens[1] * tokens[2]] = 0
        return each


def check_conditions(
    model_type: str,
    given: Mapping[str, torch.Tensor | None],
    latents: torch.Tensor,
    channels: int,
    positions: int | None,
) -> None:
    """Refuse conditions that a type does not take, that it lacks, or that do not fit the latents.

    Args:
        given: name -> tensor, None if absent.
        latents: noised ones `[B, C, T, H, W]`.
        channels: that the input has beside the latents.
        positions: length of the table of positions in CLIP's features, if there is one.

    Raises:
        UserError: naming condition and type.
    """
    takes = taken(model_type)
    for name, value in given.items():
        if value is None and takes.get(name):
            raise UserError(
                f"wandit: a model of type {model_type} needs {name}, which ae.i2v_processor makes of the given frames; "
                "give the section, or stored features that have it"
            )
        if value is not None and name not in takes:
            raise UserError(
                f"wandit: a model of type {model_type} takes no {name}; remove ae.i2v_processor, or choose the model_type "
                "that it belongs to"
            )
    batch, _, *sizes = latents.shape
    feature, first = given.get("i2v_vae_feature"), given.get("first_frame_latents")
    for name, value, expected in (
        ("i2v_vae_feature", feature, (batch, channels, *sizes)),
        ("first_frame_latents", first, (batch, latents.shape[1], 1, *sizes[1:])),
    ):
        if value is not None and tuple(value.shape) != expected:
            raise UserError(
                f"wandit: {name} is {list(value.shape)}, but beside latents {list(latents.shape)} it must be "
                f"{list(expected)}"
            )
    images = given.get("clip_feature")
    if images is not None and positions not in (None, images.shape[1]):
        raise UserError(
            f"wandit: clip_feature has {images.shape[1]} tokens, but a model of type {model_type} is given those of a first "
            f"and a last frame, {positions}; give i2v_processor last_frame true"
        )


def image_tokens(clip_feature: torch.Tensor | None) -> int:
    """How many tokens CLIP's features `[B, N, D]` add to the context."""
    return 0 if clip_feature is None else clip_feature.shape[1]


def for_upstream(clip_feature: torch.Tensor, pairs: bool) -> torch.Tensor:
    """CLIP's features `[B, N, D]` as upstream's embedding takes them: with first and last frame, one image a row."""
    return clip_feature.reshape(2 * len(clip_feature), -1, clip_feature.shape[2]) if pairs else clip_feature
