"""Text encoders of transformers, under MindSpeed-MM's ids."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MT5Config,
    MT5EncoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers import T5Config as T5ModelConfig

from mm_core.models.pretrained import load_pretrained
from mm_registry.errors import UserError

_POOLED = ("pooler_output", "text_embeds")


class TransformersTextEncoder(nn.Module):
    """A transformers encoder behind `encode`.

    Args:
        model: the network to wrap; None builds one with random weights from `config`.
        config: fields of the network's transformers config, for random weights; None and left-out ones take
            its values.
        output_key: `last_hidden_state`; `hidden_states` with `hidden_state_skip_layer`; `pooler_output` or
            `text_embeds` where the network has them.
        hidden_state_skip_layer: which hidden state from the end, 0 the last. It has not passed the network's
            final norm.
        use_attention_mask: whether the network is given the mask.

    Raises:
        UserError: no network is described, or an output that it does not have.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    outputs: ClassVar[tuple[str, ...]] = ("last_hidden_state", "hidden_states")

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        output_key: str = "last_hidden_state",
        hidden_state_skip_layer: int | None = None,
        use_attention_mask: bool = True,
        ucg_rate: float | None = None,
        using_kwargs: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if output_key not in self.outputs:
            raise UserError(
                f"text_encoder {name}: output_key {output_key!r} is none of {', '.join(self.outputs)}"
            )
        if (output_key == "hidden_states") != (hidden_state_skip_layer is not None):
            raise UserError(
                f"text_encoder {name}: output_key 'hidden_states' and hidden_state_skip_layer belong together"
            )
        if ucg_rate or using_kwargs:
            raise UserError(f"text_encoder {name}: ucg_rate and using_kwargs are not offered")
        if model is None:
            if config is None:
                raise UserError(
                    f"text_encoder {name}: a random network needs its sizes, "
                    f'"config": {{…}} with fields of {self.config_class.__name__}; or give from_pretrained'
                )
            given = {key: value for key, value in config.items() if value is not None}
            model = self.model_class(self.config_class(**given))
        elif config is not None:
            raise UserError(
                f"text_encoder {name}: config describes a random network, but from_pretrained brings its "
                "own; remove config"
            )
        self.model = model
        self.output_key = output_key
        self.hidden_state_skip_layer = hidden_state_skip_layer
        self.use_attention_mask = use_attention_mask

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **fields: Any
    ) -> TransformersTextEncoder:
        """Load a transformers folder (config.json and safetensors); see `mm_core.models.pretrained`.

        Raises:
            UserError: no such folder, missing or misshapen weights.
        """
        return cls(load_pretrained(cls.model_class, folder, dtype=dtype, what="text_encoder"), **fields)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, L]` -> embeddings `[B, L, D]` in the network's dtype, and the mask.

        A pooled output is one token: `[B, 1, D]` with a mask of ones.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask if self.use_attention_mask else None,
            output_hidden_states=self.output_key == "hidden_states",
            return_dict=True,
        )
        embeddings = output[self.output_key]
        if self.hidden_state_skip_layer is not None:
            if self.hidden_state_skip_layer >= len(embeddings):
                raise UserError(
                    f"text_encoder {type(self).__name__}: hidden_state_skip_layer "
                    f"{self.hidden_state_skip_layer}, "
                    f"but there are {len(embeddings)} hidden states"
                )
            embeddings = embeddings[-1 - self.hidden_state_skip_layer]
        if self.output_key in _POOLED:
            embeddings = embeddings.unsqueeze(1)
            attention_mask = attention_mask.new_ones(embeddings.shape[:2])
        return embeddings, attention_mask

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `encode`, so that module hooks run."""
        return self.encode(input_ids, attention_mask)


def check_vocabulary(text_encoder: nn.Module, tokenizer_size: int, *, tokenizer: str = "tokenizer") -> None:
    """Refuse a tokenizer with ids that a text encoder has no embedding for.

    Args:
        text_encoder: one that was built, or a `nn.ModuleList` of them. Those whose embeddings cannot be found
            (a plugin's own) are passed over.
        tokenizer_size: number of ids, `len()` of a `PromptTokenizer`.
        tokenizer: the section that names the tokenizer, for the message.

    Raises:
        UserError: an encoder has fewer embeddings.
    """
    several = isinstance(text_encoder, nn.ModuleList)
    for number, encoder in enumerate(
        text_encoder if isinstance(text_encoder, nn.ModuleList) else [text_encoder]
    ):
        model = getattr(encoder, "model", None)
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
        size = getattr(table, "num_embeddings", None)
        if isinstance(size, int) and size < tokenizer_size:
            section = f"text_encoder.{number}" if several else "text_encoder"
            raise UserError(
                f"{section}: its vocabulary has {size} entries (config.vocab_size of the section or of its "
                f"from_pretrained), but the tokenizer of {tokenizer}.from_pretrained has {tokenizer_size} ids; "
                "give the tokenizer that belongs to the text encoder, or a vocab_size of at least "
                f"{tokenizer_size}"
            )


class T5(TransformersTextEncoder):
    """The encoder of T5 (Raffel et al., 2020)."""

    model_class = T5EncoderModel
    config_class = T5ModelConfig


class MT5(TransformersTextEncoder):
    """The encoder of mT5 (Xue et al., 2021)."""

    model_class = MT5EncoderModel
    config_class = MT5Config


class UMT5(TransformersTextEncoder):
    """The encoder of UMT5 (Chung et al., 2023), which Wan reads."""

    model_class = UMT5EncoderModel
    config_class = UMT5Config


class CLIP(TransformersTextEncoder):
    """The text tower of CLIP (Radford et al., 2021)."""

    model_class = CLIPTextModel
    config_class = CLIPTextConfig
    outputs = ("last_hidden_state", "hidden_states", "pooler_output")


class CLIPWithProjection(TransformersTextEncoder):
    """The text tower of CLIP with the projection into the space shared with images."""

    model_class = CLIPTextModelWithProjection
    config_class = CLIPTextConfig
    outputs = ("last_hidden_state", "hidden_states", "text_embeds")
