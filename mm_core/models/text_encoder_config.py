"""What a configuration may say about text encoders. Torch-free."""

from typing import Annotated, Any, Literal, Self

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

    vocab_size: Annotated[Vocabulary | None, Field(description="Tokens of the vocabulary.")] = None
    d_model: Annotated[Width | None, Field(description="Width, and that of the embeddings.")] = None
    d_kv: Annotated[Width | None, Field(description="Width of one attention head.")] = None
    d_ff: Annotated[Width | None, Field(description="Width inside the feed-forward layers.")] = None
    num_layers: Annotated[Layers | None, Field(description="Layers.")] = None
    num_heads: Annotated[Heads | None, Field(description="Attention heads.")] = None
    relative_attention_num_buckets: Annotated[
        Width | None, Field(description="Buckets of relative positions.")
    ] = None
    relative_attention_max_distance: Annotated[
        Tokens | None, Field(description="Distance in tokens from which positions share the last bucket.")
    ] = None
    dropout_rate: Annotated[Rate | None, Field(description="Dropout; a frozen encoder applies none.")] = None
    layer_norm_epsilon: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="Added inside the norms.")
    ] = None
    initializer_factor: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="Factor of the random weights' spread.")
    ] = None
    feed_forward_proj: Annotated[
        Literal["relu", "gated-gelu", "gated-silu"] | None,
        Field(description="Activation of the feed-forward layers."),
    ] = None
    pad_token_id: Annotated[TokenId | None, Field(description="Id of the padding token.")] = None
    eos_token_id: Annotated[TokenId | None, Field(description="Id of the token that ends a text.")] = None


class CLIPTextNetworkConfig(SectionModel):
    """`text_encoder.config` of CLIP and CLIPWithProjection: fields of transformers' CLIPTextConfig."""

    vocab_size: Annotated[Vocabulary | None, Field(description="Tokens of the vocabulary.")] = None
    hidden_size: Annotated[Width | None, Field(description="Width.")] = None
    intermediate_size: Annotated[Width | None, Field(description="Width inside the feed-forward layers.")] = (
        None
    )
    projection_dim: Annotated[Width | None, Field(description="Width of the projected embedding.")] = None
    num_hidden_layers: Annotated[Layers | None, Field(description="Layers.")] = None
    num_attention_heads: Annotated[Heads | None, Field(description="Attention heads.")] = None
    max_position_embeddings: Annotated[Tokens | None, Field(description="Tokens of the longest text.")] = None
    hidden_act: Annotated[str | None, Field(description="Activation, by transformers' name.")] = None
    layer_norm_eps: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="Added inside the norms.")
    ] = None
    attention_dropout: Annotated[
        Rate | None, Field(description="Dropout; a frozen encoder applies none.")
    ] = None
    initializer_range: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="Spread of the random weights.")
    ] = None
    initializer_factor: Annotated[
        Annotated[float, Field(gt=0.0)] | None, Field(description="Factor of the random weights' spread.")
    ] = None
    pad_token_id: Annotated[TokenId | None, Field(description="Id of the padding token.")] = None
    bos_token_id: Annotated[TokenId | None, Field(description="Id of the token that begins a text.")] = None
    eos_token_id: Annotated[TokenId | None, Field(description="Id of the token that ends a text.")] = None


class TextEncoderConfig(SectionModel):
    """Keys that every text encoder has."""

    use_attention_mask: Annotated[bool, Field(description="Give the encoder the prompt's mask.")] = True
    hidden_state_skip_layer: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Field(description="For output_key hidden_states: which state, counted from the end; 0 is the last."),
    ] = None
    ucg_rate: Annotated[
        float | None,
        Only(None, 0.0, reason="captions are dropped where they are read, by the dataset's cfg"),
        Field(description="Probability of leaving out a caption."),
    ] = None
    using_kwargs: Annotated[
        list[str] | dict[str, Any] | None,
        Only(None, reason="the encoder is given ids and mask, which every one of these models reads"),
        Field(description="What else the encoder is given."),
    ] = None
    load_in_8bit: Annotated[
        bool,
        NoEffect("the encoder runs in the section's dtype", quiet_for=(False,)),
        Field(description="Hold the weights in eight bits."),
    ] = False

    @model_validator(mode="after")
    def _check_skip_layer(self) -> Self:
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

    output_key: Annotated[
        Literal["last_hidden_state", "hidden_states"], Field(description="Which output is the embedding.")
    ] = "last_hidden_state"
    config: Annotated[
        T5NetworkConfig | None,
        Field(description="The network, for init: random; a pretrained folder brings its own."),
    ] = None


class CLIPConfig(TextEncoderConfig):
    """`text_encoder` with `model_id: CLIP`."""

    output_key: Annotated[
        Literal["last_hidden_state", "hidden_states", "pooler_output"],
        Field(description="Which output is the embedding."),
    ] = "last_hidden_state"
    config: Annotated[
        CLIPTextNetworkConfig | None,
        Field(description="The network, for init: random; a pretrained folder brings its own."),
    ] = None


class CLIPWithProjectionConfig(TextEncoderConfig):
    """`text_encoder` with `model_id: CLIPWithProjection`."""

    output_key: Annotated[
        Literal["last_hidden_state", "hidden_states", "text_embeds"],
        Field(description="Which output is the embedding."),
    ] = "last_hidden_state"
    config: Annotated[
        CLIPTextNetworkConfig | None,
        Field(description="The network, for init: random; a pretrained folder brings its own."),
    ] = None
