"""From prompts to videos with LTX-Video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mm_core.generation.text_to_video import TextToVideoPipeline
from mm_core.models.protocols import Tokenizer
from mm_core.models.sora import SoRAModel
from mm_registry.errors import UserError


class LTXPipeline(TextToVideoPipeline):
    """Text to video.

    Args:
        model, tokenizer, input_size, negative_prompt, seed, device: as the base class has them.
        frame_rate: frames a second that the model is told; the predictor's own by default.

    Raises:
        UserError: there is a second expert, which LTX-Video has not.
    """

    def __init__(
        self,
        model: SoRAModel,
        tokenizer: Tokenizer,
        *,
        input_size: Sequence[int],
        frame_rate: float | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if model.low_noise_predictor is not None:
            raise UserError(
                "LTXPipeline: low_noise_predictor is given, but LTX-Video has one expert; remove it"
            )
        super().__init__(
            model,
            tokenizer,
            input_size=input_size,
            negative_prompt=negative_prompt,
            seed=seed,
            device=device,
        )
        self.frame_rate = frame_rate

    def conditions(self) -> Mapping[str, Any]:
        """The frame rate, where one is given."""
        return {} if self.frame_rate is None else {"frame_rate": self.frame_rate}
