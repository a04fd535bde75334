"""Images and videos of a micro batch go through a network's vision tower in one call.

Networks of transformers call it once for images and once more for videos. Then a rank whose micro batch has both would gather
the tower's units twice, and others once, and they would wait for each other for ever. Rows of patches do not see those of
other images or videos, so one call for all of them gives the same features; it also computes larger products.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from mm_core.sharding.plan import ShardingError

# transformers' names, alike in all of its networks.
_IMAGES = ("pixel_values", "image_grid_thw")
_VIDEOS = ("pixel_values_videos", "video_grid_thw")
_OUTPUTS = "mm_encoder_outputs"


def join_vision_calls(module: nn.Module, forward: Any, name: str) -> None:
    """Let a module of transformers see its images and videos in one call of `get_image_features`, by a hook.

    Args:
        module: whose forward takes `mm_encoder_outputs`; `get_image_features` returns a tuple of features, one tensor an
            image, in `pooler_output` and in each part of `deepstack_features`.
        forward: of the bare module.
        name: of the module, for messages.

    Raises:
        ShardingError: it is another kind of module.
    """
    names = list(inspect.signature(forward).parameters)
    if not callable(getattr(module, "get_image_features", None)) or _OUTPUTS not in names:
        raise ShardingError(
            f"policy, joint_vision: {name} has no get_image_features, or takes no {_OUTPUTS}; name a module of transformers "
            "that sees images."
        )

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get(_OUTPUTS) is not None:
            return None
        parts = [(given[p], given[g]) for p, g in (_IMAGES, _VIDEOS) if given.get(p) is not None]
        if not parts:
            return None
        pixels, grids = (torch.cat(each) for each in zip(*parts, strict=True))
        seen = module.get_image_features(pixels, grids, return_dict=True)
        images = 0 if given.get(_IMAGES[0]) is None else len(given[_IMAGES[1]])
        given[_OUTPUTS] = {
            kind: _part(seen, which)
            for kind, which, pixels in (
                ("image", slice(None, images), _IMAGES[0]),
                ("video", slice(images, None), _VIDEOS[0]),
            )
            if given.get(pixels) is not None
        }
        return (), {**given, _IMAGES[0]: None, _VIDEOS[0]: None}

    module.register_forward_pre_hook(see, with_kwargs=True)


def _part(seen: Any, which: slice) -> Any:
    """What the tower returned of some of the images."""
    part = copy.copy(seen)
    part.pooler_output = seen.pooler_output[which]
    if getattr(seen, "deepstack_features", None) is not None:
        part.deepstack_features = [features[which] for features in seen.deepstack_features]
    return part
