"""What a configuration may say about text encoders. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel, invalid

# Far above every model there is: a slip of the keyboard is an error here rather than a build without end.
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Width = Annotated[int, Field(ge=1, le=2**18)]
Heads = Annotated[int, Field(ge=1, le=4096)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class T5NetworkConfig(SectionModel):
    """`text_encoder.config` of T5, MT5 and UMT5: fields of transformers' config class; None takes its
    value.
    """

    vocab_size: Vocabulary | None = None
    d_model: Width | None = None
    d_kv: Width | None = None
    d_ff: Width | None = None
    num_layers: Layers | None = None
    num_heads: Heads | None = None
    relative_attention_num_buckets: Width | None = None
    relative_attention_max_distance: Tokens | None = None
    dropout_rate: Rate | None = None
    layer_norm_epsilon: Annotated[float, Field(gt=0.0)] | None = None
    initializer_factor: Annotated[float, Field(gt=0.0)] | None = None
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] | None = None
    pad_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None


class CLIPTextNetworkConfig(SectionModel):
    """`text_encoder.config` of CLIP and CLIPWithProjection: fields of transformers' CLIPTextConfig."""

    vocab_size: Vocabulary | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    projection_dim: Width | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    max_position_embeddings: Tokens | None = None
    hidden_act: str | None = None
    layer_norm_eps: Annotated[float, Field(gt=0.0)] | None = None
    attention_dropout: Rate | None = None
    initializer_range: Annotated[float, Field(gt=0.0)] | None = None
    initializer_factor: Annotated[float, Field(gt=0.0)] | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None


class TextEncoderConfig(SectionModel):
    """Keys that every text encoder has."""

    use_attention_mask: bool = True
    hidden_state_skip_layer: Annotated[int, Field(ge=0)] | None = None
    """Which hidden state from the end, 0 the last; for `output_key: hidden_states` and for nothing else."""
    ucg_rate: Annotated[
        float | None,
        Only(None, 0.0, reason="captions are dropped where they are read, by the dataset's cfg"),
    ] = None
    using_kwargs: Annotated[
        list[str] | dict[str, Any] | None,
        Only(None, reason="the encoder is given ids and mask, which every one of these models reads"),
    ] = None
    load_in_8bit: Annotated[bool, NoEffect("the encoder runs in the section's dtype", quiet_for=(False,))] = (
        False
    )

    @model_validator(mode="after")
    def _check_skip_layer(self) -> TextEncoderConfig:
        key = getattr(self, "output_key", None)
        if (key == "hidden_states") != (self.hidden_state_skip_layer is not None):
            raise invalid(
                "output_key" if self.hidden_state_skip_layer is None else "hidden_state_skip_layer",
                "output_key hidden_states and hidden_state_skip_layer (which of the states, 0 the last) "
                "belong together",
            )
        return self


class T5Config(TextEncoderConfig):
    """`text_encoder` with `model_id` T5, MT5 or UMT5."""

    output_key: Literal["last_hidden_state", "hidden_states"] = "last_hidden_state"
    config: T5NetworkConfig | None = None
    """The network, for `init: random`; a pretrained folder brings its own."""


class CLIPConfig(TextEncoderConfig):
    """`text_encoder` with `model_id: CLIP`."""

    output_key: Literal["last_hidden_state", "hidden_states", "pooler_output"] = "last_hidden_state"
    config: CLIPTextNetworkConfig | None = None


class CLIPWithProjectionConfig(TextEncoderConfig):
    """`text_encoder` with `model_id: CLIPWithProjection`."""

    output_key: Literal["last_hidden_state", "hidden_states", "text_embeds"] = "last_hidden_state"
    config: CLIPTextNetworkConfig | None = None
