"""What a configuration may say about Qwen3-VL, beside the keys of every transformers model. Torch-free: `mm check` and
`mm list` import this file.

The network is described by config.json of `init_from_hf_path`. What files of MindSpeed-MM repeat of it is there for
Megatron's own checks, and builds nothing.
"""

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.keys import Legacy, NoEffect
from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel, invalid
from mm_core.config.transformers_model import ExampleImage, TransformersFamilyConfig

PositiveInt = Annotated[int, Field(ge=1)]

_MEGATRON = NoEffect("config.json of init_from_hf_path describes the network")
_LAYOUT = NoEffect("the attention backend chooses its own layout", quiet_for=("TND",))
_SYNCHRONIZE = NoEffect("memory is reused between streams without waiting for the device", quiet_for=(False,))
_RECOMPUTE = NoEffect("recomputation is chosen in fsdp2.yaml or by --recompute-granularity")

AttentionImplementation = Annotated[
    Literal["auto", "flash_attention_2", "flash_attention_3", "sdpa", "eager"] | None,
    Field(
        description="transformers' name of the attention to use. `auto`, and leaving it out: a package of FlashAttention "
        "where one is installed that the device and param_dtype can use, else `sdpa`, torch's own, which needs no package "
        "and has fused kernels too. The log says which."
    ),
]
AttentionLayout = Annotated[
    Literal["TND", "BNSD", "BSND", "BSH", "SBH"],
    _LAYOUT,
    Field(description="Order of axes in Ascend's fused attention."),
]
SynchronizePerLayer = Annotated[
    bool,
    _SYNCHRONIZE,
    Field(description="Wait for the device after each layer, so that streams may reuse memory."),
]
Synchronize = Annotated[
    bool | None,
    Legacy("synchronize_per_layer"),
    Field(description="What MindSpeed-MM's documentation calls synchronize_per_layer."),
]


class VisionEncoderConfig(SectionModel):
    """`image_encoder.vision_encoder`."""

    model_id: Annotated[
        str | None,
        NoEffect("config.json of init_from_hf_path describes the network", quiet_for=("qwen3vit",)),
        Field(description="MindSpeed-MM's name of the vision tower."),
    ] = None
    freeze: Annotated[
        bool, Field(description="Whether patch embedding, blocks and position embedding stay as they are.")
    ]
    num_layers: Annotated[PositiveInt | None, _MEGATRON, Field(description="Blocks.")] = None
    hidden_size: Annotated[PositiveInt | None, _MEGATRON, Field(description="Width of a token.")] = None
    num_attention_heads: Annotated[PositiveInt | None, _MEGATRON, Field(description="Attention heads.")] = (
        None
    )
    ffn_hidden_size: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Width inside the feed-forward layers.")
    ] = None
    attn_implementation: AttentionImplementation = None
    attn_layout: AttentionLayout = "TND"
    synchronize_per_layer: SynchronizePerLayer = False
    synchronize: Synchronize = None
    recompute_granularity: Annotated[
        str | None, _RECOMPUTE, Field(description="Megatron's choice of what is computed again.")
    ] = None
    recompute_method: Annotated[
        str | None, _RECOMPUTE, Field(description="Megatron's way of choosing those layers.")
    ] = None
    recompute_num_layers: Annotated[
        PositiveInt | None, _RECOMPUTE, Field(description="How many layers are computed again.")
    ] = None


class VisionProjectorConfig(SectionModel):
    """`image_encoder.vision_projector`."""

    model_id: Annotated[
        str | None,
        NoEffect("config.json of init_from_hf_path describes the network", quiet_for=("lnmlp",)),
        Field(description="MindSpeed-MM's name of the projector."),
    ] = None
    freeze: Annotated[
        bool,
        Field(
            description="Whether the mergers of the vision tower stay as they are, those of deepstack too (MindSpeed-MM "
            "freezes those by no key)."
        ),
    ]
    num_layers: Annotated[PositiveInt | None, _MEGATRON, Field(description="Layers.")] = None


class ImageEncoderConfig(SectionModel):
    """`image_encoder`: the vision tower and what brings its output to the text model's width."""

    vision_encoder: Annotated[VisionEncoderConfig, Field(description="The vision tower.")]
    vision_projector: Annotated[
        VisionProjectorConfig, Field(description="The merger, from the tower's width to the text model's.")
    ]


class TextDecoderConfig(SectionModel):
    """`text_decoder`: the language model."""

    model_id: Annotated[
        str | None,
        NoEffect("config.json of init_from_hf_path describes the network", quiet_for=("qwen3lm",)),
        Field(description="MindSpeed-MM's name of the language model."),
    ] = None
    freeze: Annotated[bool, Field(description="Whether the language model and its head stay as they are.")]
    num_layers: Annotated[PositiveInt | None, _MEGATRON, Field(description="Layers.")] = None
    hidden_size: Annotated[PositiveInt | None, _MEGATRON, Field(description="Width of a token.")] = None
    num_attention_heads: Annotated[PositiveInt | None, _MEGATRON, Field(description="Attention heads.")] = (
        None
    )
    num_query_groups: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Heads of keys and values.")
    ] = None
    ffn_hidden_size: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Width inside the feed-forward layers.")
    ] = None
    max_position_embeddings: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Longest sequence, in tokens.")
    ] = None
    attn_implementation: AttentionImplementation = None
    attn_layout: AttentionLayout = "TND"
    is_causal: Annotated[
        bool,
        NoEffect("text attention is always causal", quiet_for=(False,)),
        Field(description="Whether a mask of the whole sequence is made."),
    ] = False
    activation_offload: Annotated[
        bool,
        Field(
            description="Move each layer's activations to host memory until backward: what offload_activations in "
            "fsdp2.yaml does, which decides if it is written there."
        ),
    ] = False
    synchronize_per_layer: SynchronizePerLayer = False
    synchronize: Synchronize = None
    use_npu_fused_moe: Annotated[
        bool,
        NoEffect("a dense model has no experts", quiet_for=(False,)),
        Field(description="Use fused kernels for experts."),
    ] = False


class MoeTextDecoderConfig(TextDecoderConfig):
    """`text_decoder` of a mixture of experts."""

    use_npu_fused_moe: Annotated[
        bool,
        Field(
            description="true insists on the fused kernels of experts, `experts_implementation: grouped_mm`, on any device "
            "(MindSpeed-MM's code does by default, its examples do not); false leaves the choice to that key."
        ),
    ] = False
    experts_implementation: Annotated[
        Literal["auto", "grouped_mm", "batched_mm", "eager"] | None,
        Field(
            description="transformers' name of the way to compute experts: in one grouped product, each token with a copy of "
            "its experts' weights, or one after the other. `auto`, the default: `grouped_mm` where torch has it for the "
            "device, else `eager`."
        ),
    ] = None

    num_moe_experts: Annotated[PositiveInt | None, _MEGATRON, Field(description="Experts of a layer.")] = None
    moe_router_topk: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Experts that a token goes through.")
    ] = None
    moe_ffn_hidden_size: Annotated[
        PositiveInt | None, _MEGATRON, Field(description="Width inside an expert.")
    ] = None

    @model_validator(mode="after")
    def _one_way_of_experts(self) -> Self:
        way = self.experts_implementation
        if self.use_npu_fused_moe and way not in (None, "auto", "grouped_mm"):
            raise invalid("experts_implementation", f"is {way}, but use_npu_fused_moe insists on grouped_mm")
        return self


_VISION = ("image_encoder", "vision_encoder")
_TEXT = ("text_decoder",)
_SAME: Mapping[KeyPath, KeyPath] = {
    (*_VISION, "num_layers"): ("vision_config", "depth"),
    (*_VISION, "hidden_size"): ("vision_config", "hidden_size"),
    (*_VISION, "num_attention_heads"): ("vision_config", "num_heads"),
    (*_VISION, "ffn_hidden_size"): ("vision_config", "intermediate_size"),
    (*_TEXT, "num_layers"): ("text_config", "num_hidden_layers"),
    (*_TEXT, "hidden_size"): ("text_config", "hidden_size"),
    (*_TEXT, "num_attention_heads"): ("text_config", "num_attention_heads"),
    (*_TEXT, "num_query_groups"): ("text_config", "num_key_value_heads"),
    (*_TEXT, "ffn_hidden_size"): ("text_config", "intermediate_size"),
    (*_TEXT, "max_position_embeddings"): ("text_config", "max_position_embeddings"),
}


class _Qwen3VLConfig(TransformersFamilyConfig):
    """What both families say of the network."""

    chat_template: ClassVar[str] = "qwen3_vl"

    def frozen_modules(self) -> tuple[str, ...]:
        """Return the parts that the three `freeze` keys name."""
        vision, text = _section(self, *_VISION), _section(self, *_TEXT)
        frozen: list[str] = []
        if vision.freeze:
            frozen += [f"model.visual.{part}" for part in ("patch_embed", "pos_embed", "blocks")]
        if _section(self, "image_encoder", "vision_projector").freeze:
            frozen += ["model.visual.merger", "model.visual.deepstack_merger_list"]
        if text.freeze:
            frozen += ["model.language_model", "lm_head"]
        return tuple(frozen)

    def attention_implementations(self) -> Mapping[str, str]:
        """Return what the two `attn_implementation` keys ask for."""
        asked = {
            "vision_config": _section(self, *_VISION).attn_implementation,
            "text_config": _section(self, *_TEXT).attn_implementation,
        }
        return {part: name for part, name in asked.items() if name not in (None, "auto")}

    def example_image(self, config: Mapping[str, Any], area: int, room: int) -> ExampleImage | None:
        """Return the sizes of a square image: sides of whole merged patches, as the processor makes them."""
        vision = config.get("vision_config", {})
        try:
            patch, merge, frames = (
                vision[key] for key in ("patch_size", "spatial_merge_size", "temporal_patch_size")
            )
            channels, token_id = vision.get("in_channels", 3), config["image_token_id"]
        except KeyError:
            return None
        side = min(math.isqrt(area) // (patch * merge), math.isqrt(room))
        if side < 1:
            return None
        rows = side * merge
        return ExampleImage((1, rows, rows), channels * frames * patch**2, side**2, token_id)


def _section(config: Any, *path: str) -> Any:
    return functools.reduce(getattr, path, config)


class Qwen3VLConfig(_Qwen3VLConfig):
    """A transformers model with `model_id: qwen3_vl`: the dense Qwen3-VL models."""

    hf_model_type: ClassVar[str] = "qwen3_vl"
    hf_config_keys: ClassVar[Mapping[KeyPath, KeyPath]] = _SAME

    image_encoder: Annotated[ImageEncoderConfig, Field(description="The vision tower and its projector.")]
    text_decoder: Annotated[TextDecoderConfig, Field(description="The language model.")]


class Qwen3VLMoeConfig(_Qwen3VLConfig):
    """A transformers model with `model_id: qwen3_vl_moe`: the Qwen3-VL models with experts."""

    hf_model_type: ClassVar[str] = "qwen3_vl_moe"
    hf_config_keys: ClassVar[Mapping[KeyPath, KeyPath]] = {
        **_SAME,
        (*_TEXT, "num_moe_experts"): ("text_config", "num_experts"),
        (*_TEXT, "moe_router_topk"): ("text_config", "num_experts_per_tok"),
        (*_TEXT, "moe_ffn_hidden_size"): ("text_config", "moe_intermediate_size"),
    }

    image_encoder: Annotated[ImageEncoderConfig, Field(description="The vision tower and its projector.")]
    text_decoder: Annotated[MoeTextDecoderConfig, Field(description="The language model.")]

    def experts_implementation(self) -> str | None:
        """Return what `use_npu_fused_moe` or `experts_implementation` asks for."""
        text = self.text_decoder
        if text.use_npu_fused_moe:
            return "grouped_mm"
        return None if text.experts_implementation == "auto" else text.experts_implementation
