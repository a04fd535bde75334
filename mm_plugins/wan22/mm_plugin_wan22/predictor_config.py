"""What a configuration may say about Wan's predictor. Torch-free; field names are MindSpeed-MM's."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.conditions import GivenFrames
from mm_core.config.keys import NoEffect, Only
from mm_core.config.recompute import Granularity, Method, recompute_problem
from mm_core.config.section import SectionModel, invalid
from mm_plugin_wan22.autoencoder_config import Channels, Layers, PositiveInt, Width
from mm_plugin_wan22.variants import (
    CLIP_TOKENS,
    CONCATENATED,
    FIRST_FRAME,
    IMAGE_EMBEDDED,
    MASK_CHANNELS,
    MODEL_TYPES,
    TEXT_TOKENS_BESIDE_IMAGE,
    taken,
)

AttentionBackend = Literal[
    "native", "flash", "_flash_3", "flex", "sage", "xformers",
    "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "_native_npu",
]  # fmt: skip
"""Those of diffusers that fetch nothing from the hub."""
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=4096)]

_KERNELS = "the attention backend chooses its own layout and kernels"
_FPDT = "sequence chunking for long contexts is not applied"
ONE_TIMESTEP = (
    "only a given first frame (ti2v) has a timestep of its own; all other tokens share their sample's, so one "
    "timestep a sample computes the same"
)
_NO_CLIP = "only Wan2.1's image-conditioned models (i2v, flf2v) embed CLIP image features"
_ONE_IMAGE = "only first-last-frame models (flf2v) have a table of positions in CLIP's features"


def _but(types: AbstractSet[str]) -> tuple[str, ...]:
    return tuple(name for name in MODEL_TYPES if name not in types)


class WanDiTConfig(SectionModel):
    """`predictor` with `model_id: wandit`: the Wan diffusion transformer (Wan et al., 2025)."""

    model_type: Annotated[
        Literal["t2v", "i2v", "flf2v", "ti2v", "wan2.2-t2v", "wan2.2-i2v"],
        Field(
            description="What the network is given beside the noised latents; `wan2.2-t2v` is the network of `t2v`, "
            "with two experts."
        ),
    ] = "t2v"
    patch_size: Annotated[
        tuple[PositiveInt, PositiveInt, PositiveInt],
        Field(description="Latent frames, rows and columns of one token."),
    ] = (1, 2, 2)
    text_len: Annotated[Tokens, Field(description="Tokens of a prompt.")] = 512
    in_dim: Annotated[
        Channels,
        Field(
            description="Channels of the input: the latents', or for `i2v`, `flf2v` and `wan2.2-i2v` twice as many "
            "and a mask's four."
        ),
    ] = 16
    hidden_size: Annotated[Width, Field(description="Width of a token, a multiple of `num_heads`.")] = 2048
    ffn_dim: Annotated[Width, Field(description="Width inside the feed-forward layers.")] = 8192
    freq_dim: Annotated[
        int, Field(ge=2, le=2**18, multiple_of=2, description="Width of the timestep's sinusoidal embedding.")
    ] = 256
    text_dim: Annotated[Width, Field(description="Width of the text encoder's output.")] = 4096
    out_dim: Annotated[Channels, Field(description="Channels of the output: those of the latents.")] = 16
    num_heads: Annotated[Heads, Field(description="Attention heads.")] = 16
    num_layers: Annotated[Layers, Field(description="Transformer blocks.")] = 32
    qk_norm: Annotated[
        bool,
        Only(True, reason="the model always normalises queries and keys"),
        Field(description="Normalise queries and keys."),
    ] = True
    qk_norm_type: Annotated[
        str,
        Only("rmsnorm", reason="the model's query and key norm is an RMSNorm over all heads"),
        Field(description="Kind of that norm."),
    ] = "rmsnorm"
    cross_attn_norm: Annotated[
        bool,
        Field(
            description="Normalise the input of cross attention. MindSpeed-MM always does, whatever is written."
        ),
    ] = True
    eps: Annotated[float, Field(gt=0.0, description="Added to variances in norms.")] = 1e-6
    max_seq_len: Annotated[
        Tokens, Field(description="Positions of rotary embedding along each axis, in tokens.")
    ] = 1024

    img_dim: Annotated[
        int,
        NoEffect(_NO_CLIP, when=("model_type", _but(IMAGE_EMBEDDED))),
        Field(ge=1, description="Width of CLIP's image features."),
    ] = 1280
    clip_token_len: Annotated[
        int,
        NoEffect(_ONE_IMAGE, when=("model_type", _but({"flf2v"}))),
        Field(ge=1, description="Tokens of CLIP's features of one image."),
    ] = CLIP_TOKENS
    seperated_timestep: Annotated[
        bool | None,
        NoEffect(ONE_TIMESTEP, quiet_for=(False, None), when=("model_type", _but(FIRST_FRAME))),
        Field(
            description="A timestep for each token, 0 for those of a given first frame: true for `ti2v`, whether written or "
            "not (the spelling is MindSpeed-MM's)."
        ),
    ] = None
    pipeline_num_layers: Annotated[
        list[int] | list[list[int]] | None,
        Field(
            description="Blocks of each pipeline stage, or of each part of the stages for interleaved ones; without "
            "--pipeline-model-parallel-size it does nothing. None: dealt out evenly."
        ),
    ] = None
    fa_layout: Annotated[
        str, NoEffect(_KERNELS), Field(description="Order of axes in Ascend's fused attention.")
    ] = "bnsd"
    attention_backend: Annotated[
        AttentionBackend | None,
        Field(
            description="Attention kernels, by diffusers' names; each is tried out against `native` first. None: in half "
            "precision the device's own (cuDNN's from Hopper on, an NPU's fused one), else `native`, which is torch's."
        ),
    ] = None
    use_fused_rmsnorm: Annotated[
        bool,
        NoEffect("torch's own RMSNorm is used", quiet_for=(False,)),
        Field(description="Use Ascend's fused RMSNorm."),
    ] = False
    attention_async_offload: Annotated[
        bool,
        Field(
            description="Keep what the attentions of a block save for backward in host memory until then; of a block that is "
            "recomputed, its inputs. offload_activations in fsdp2.yaml decides if it is written."
        ),
    ] = False
    fp32_calculate: Annotated[
        bool,
        NoEffect("norms and modulation always compute in fp32", quiet_for=(True,)),
        Field(description="Compute norms and modulation in fp32."),
    ] = True
    recompute_granularity: Annotated[
        Granularity | None,
        Field(
            description="Compute blocks again in backward: `full` keeps only their inputs, `selective` also results of "
            "matrix products and attention. Each key of fsdp2.yaml about it decides if it is written."
        ),
    ] = None
    recompute_method: Annotated[
        Method | None,
        Field(
            description="Which blocks, with `full`: `uniform` is all of them, `block` the first `recompute_num_layers`."
        ),
    ] = None
    recompute_num_layers: Annotated[
        PositiveInt | None,
        NoEffect("every block is a checkpoint of its own", when=("recompute_method", "uniform")),
        Field(description="How many, for `block`."),
    ] = None
    distribute_saved_activations: Annotated[
        bool,
        NoEffect("activations stay on the rank that made them", quiet_for=(False,)),
        Field(description="Share saved activations among tensor-parallel ranks."),
    ] = False
    FPDT: Annotated[
        bool, NoEffect(_FPDT, quiet_for=(False,)), Field(description="Attend to long sequences in chunks.")
    ] = False
    FPDT_chunk_number: Annotated[
        int | None, NoEffect(_FPDT), Field(description="Number of those chunks.")
    ] = None
    FPDT_with_offload: Annotated[
        bool, NoEffect(_FPDT, quiet_for=(False,)), Field(description="Keep idle chunks in host memory.")
    ] = False
    vae_scale_factor: Annotated[
        list[int] | None,
        NoEffect("the factors are those of the autoencoder itself"),
        Field(description="Compression of the autoencoder in time, height and width."),
    ] = None

    @property
    def given_frames(self) -> GivenFrames:
        """Which frames a video of this type begins and ends with. Wan2.2's image models were published for a first frame
        and take a last one too, as upstream's pipeline does.
        """
        return {
            "ti2v": GivenFrames("may", "never"),
            "flf2v": GivenFrames("must", "must"),
            "i2v": GivenFrames("must", "may"),
            "wan2.2-i2v": GivenFrames("must", "may"),
        }.get(self.model_type, GivenFrames())

    @property
    def conditions(self) -> Mapping[str, bool]:
        """Names of the conditions that the network takes -> whether it needs them."""
        return taken(self.model_type)

    def condition_shapes(self, latents: tuple[int, int, int, int]) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the conditions of one sample, by name.

        Args:
            latents: `(C, T, H, W)`.
        """
        channels, *sizes = latents
        images = 2 if self.model_type == "flf2v" else 1
        return {
            "i2v_vae_feature": (self.in_dim - self.out_dim, *sizes),
            "first_frame_latents": (channels, 1, *sizes[1:]),
            "clip_feature": (images * self.clip_token_len, self.img_dim),
        }

    @property
    def condition_channels(self) -> int:
        """Channels that it reads beside those of the noised latents."""
        return self.in_dim - self.out_dim

    @property
    def latent_strides(self) -> tuple[int, int, int] | None:
        """What the autoencoders of the published models leave of frames, rows and columns: 48 channels are Wan2.2 5B's."""
        return {16: (4, 8, 8), 48: (4, 16, 16)}.get(self.out_dim)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = recompute_problem(
            self.recompute_granularity, self.recompute_method, self.recompute_num_layers
        )
        if problem is not None:
            raise invalid(problem[0], ". ".join(problem[1:]))
        if self.hidden_size % self.num_heads:
            raise invalid(
                "hidden_size",
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: each "
                "head takes an equal share",
            )
        head_dim = self.hidden_size // self.num_heads
        if head_dim % 2 or head_dim < 6:
            raise invalid(
                "num_heads",
                f"hidden_size / num_heads is {head_dim}: rotary embedding of three axes needs an even "
                "number of at least 6",
            )
        self._check_type()
        return self

    def _check_type(self) -> None:
        kind = self.model_type
        if kind in CONCATENATED:
            wanted = 2 * self.out_dim + MASK_CHANNELS
            if self.in_dim != wanted:
                raise invalid(
                    "in_dim",
                    f"in_dim {self.in_dim} does not fit model_type {kind}, which reads the noised latents, "
                    f"as many of the given frames and a mask of {MASK_CHANNELS} channels: {wanted} for out_dim "
                    f"{self.out_dim}",
                )
        elif self.in_dim != self.out_dim:
            raise invalid(
                "out_dim",
                f"in_dim {self.in_dim} and out_dim {self.out_dim} differ, but a model of type {kind} reads "
                "and predicts the same latent channels",
            )
        if kind in IMAGE_EMBEDDED and self.text_len != TEXT_TOKENS_BESIDE_IMAGE:
            raise invalid(
                "text_len",
                f"text_len {self.text_len} does not fit model_type {kind}: beside an image the text always has "
                f"{TEXT_TOKENS_BESIDE_IMAGE} tokens",
            )
        if kind in FIRST_FRAME and self.seperated_timestep is False:
            raise invalid(
                "seperated_timestep",
                f"seperated_timestep false does not fit model_type {kind}: a given first frame is clean, and the network "
                "knows it by its timestep 0; write true",
            )
        if kind in FIRST_FRAME and self.patch_size[0] != 1:
            raise invalid(
                "patch_size",
                f"patch_size[0] {self.patch_size[0]} does not fit model_type {kind}: tokens of the given first frame have "
                "a timestep of their own, so a token spans one latent frame; write 1",
            )
