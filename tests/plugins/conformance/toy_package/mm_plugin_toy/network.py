"""A network of the transformers library, whose tokens see the mean of those before them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ToyNetConfig(PreTrainedConfig):
    model_type = "toy_net"

    vocab_size: int = 32
    width: int = 12
    num_layers: int = 2


class ToyLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = (
            tokens.cumsum(1)
            / torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)[:, None]
        )
        return tokens + torch.tanh(self.mix(self.norm(seen)))


class ToyNet(PreTrainedModel):
    config_class = ToyNetConfig
    config: ToyNetConfig
    _supports_sdpa = True

    def __init__(self, config: ToyNetConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([ToyLayer(config.width) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        tokens = self.embed(input_ids)
        for layer in self.layers:
            tokens = layer(tokens)
        logits = self.head(tokens)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
