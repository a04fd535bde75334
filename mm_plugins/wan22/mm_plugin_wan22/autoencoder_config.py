"""What a configuration may say about Wan's autoencoder and what makes its image conditions. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.conditions import GivenFrames
from mm_core.config.keys import Only
from mm_core.config.section import SectionModel, invalid

PositiveInt = Annotated[int, Field(ge=1)]
# Far above every model there is: a slip of the keyboard is an error here rather than a build without end.
Width = Annotated[int, Field(ge=1, le=2**18)]
Channels = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]

TileSides = PositiveInt | tuple[PositiveInt, PositiveInt]


class WanVideoVAETiling(SectionModel):
    """`ae.tiling_param`, in pixels of the video."""

    tile_sample_min_height: Annotated[PositiveInt, Field(description="Height of a tile, in pixels.")] = 256
    tile_sample_min_width: Annotated[PositiveInt, Field(description="Width of a tile, in pixels.")] = 256
    tile_sample_stride_height: Annotated[
        PositiveInt, Field(description="Pixels from one tile to the next one below; the rest overlaps.")
    ] = 192
    tile_sample_stride_width: Annotated[
        PositiveInt, Field(description="Pixels from one tile to the next one beside; the rest overlaps.")
    ] = 192
    tile_size: Annotated[
        TileSides | None,
        Field(
            description="Sides of a tile as MindSpeed-MM's own tiling has them, one number or [height, width]."
        ),
    ] = None
    tile_stride: Annotated[
        TileSides | None,
        Field(description="Pixels from one tile to the next, one number or [down, right], beside tile_size."),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        own = [name for name in ("tile_size", "tile_stride") if getattr(self, name) is not None]
        others = sorted(name for name in self.model_fields_set if name.startswith("tile_sample_"))
        if own and others:
            raise invalid(
                own[0], f"{own[0]} and {others[0]} both say what tiles there are; remove one of them"
            )
        if len(own) == 1:
            raise invalid(own[0], "tile_size and tile_stride belong together; give both")
        for side in ("height", "width"):
            size, stride = self.sides(side)
            if stride > size:
                raise invalid(
                    "tile_stride" if own else f"tile_sample_stride_{side}",
                    f"tile_stride {stride} is larger than tile_size {size}: tiles would leave gaps"
                    if own
                    else f"tile_sample_stride_{side} {stride} is larger than tile_sample_min_{side} {size}: "
                    "tiles would leave gaps",
                )
        return self

    def sides(self, side: Literal["height", "width"]) -> tuple[int, int]:
        """Size of a tile and distance to the next, along one side."""
        sides = []
        for whole, name in ((self.tile_size, "min"), (self.tile_stride, "stride")):
            if whole is None:
                sides.append(int(getattr(self, f"tile_sample_{name}_{side}")))
            else:
                sides.append(whole if isinstance(whole, int) else whole[side == "width"])
        return sides[0], sides[1]


class WanVideoVAEConfig(SectionModel):
    """`ae` with `model_id: wan_video_vae`: diffusers' AutoencoderKLWan with normalised latents.

    The fields from `base_dim` on describe the network. They are for `init: random`; a pretrained folder brings
    its own, and one given beside it must agree.
    """

    do_sample: Annotated[
        bool, Field(description="Draw latents from the encoder's distribution; false takes its mode.")
    ] = True
    norm_latents: Annotated[bool, Field(description="Normalise latents.")] = True
    norm_mode: Annotated[
        Literal["channel_specified_shift_scale", "value_shift_scale"],
        Field(
            description="By the mean and deviation of each channel, or by one shift_factor and one scaling_factor. "
            "MindSpeed-MM's default is the second, with which its Wan autoencoder stops."
        ),
    ] = "channel_specified_shift_scale"
    shift_factor: Annotated[
        float | None, Field(description="Subtracted from latents, with value_shift_scale.")
    ] = None
    scaling_factor: Annotated[
        Annotated[float, Field(gt=0.0)] | None,
        Field(description="Multiplies latents, with value_shift_scale; None: the folder's own."),
    ] = None
    enable_tiling: Annotated[
        bool, Field(description="Encode and decode in overlapping tiles, which needs less memory.")
    ] = False
    tiling_param: Annotated[
        WanVideoVAETiling | None, Field(description="Tiles, if enable_tiling is true; None: diffusers' own.")
    ] = None
    i2v_processor: Annotated[
        dict[str, Any] | None,
        Field(
            description="What makes the image condition; `processor_id` is its id, and its own config class checks "
            "the section."
        ),
    ] = None

    base_dim: Annotated[Channels | None, Field(description="Channels of the encoder's first stage.")] = None
    decoder_base_dim: Annotated[
        Channels | None, Field(description="Channels of the decoder's last stage; None: base_dim.")
    ] = None
    z_dim: Annotated[Channels | None, Field(description="Channels of the latents.")] = None
    dim_mult: Annotated[
        list[PositiveInt] | None, Field(description="Factor of the channels of each stage.")
    ] = None
    num_res_blocks: Annotated[Layers | None, Field(description="Residual blocks of a stage.")] = None
    attn_scales: Annotated[list[float] | None, Field(description="Scales at which the network attends.")] = (
        None
    )
    temperal_downsample: Annotated[
        list[bool] | None,
        Field(description="Whether each stage but the last halves time (the spelling is diffusers')."),
    ] = None
    dropout: Annotated[UnitInterval | None, Field(description="Probability of dropping an activation.")] = (
        None
    )
    latents_mean: Annotated[list[float] | None, Field(description="Mean of each channel of the latents.")] = (
        None
    )
    latents_std: Annotated[
        list[Annotated[float, Field(gt=0.0)]] | None,
        Field(description="Standard deviation of each channel of the latents."),
    ] = None
    is_residual: Annotated[
        bool | None, Field(description="Whether stages have residual shortcuts, as Wan2.2 5B's.")
    ] = None
    in_channels: Annotated[
        Channels | None, Field(description="Channels of the (patchified) video that goes in.")
    ] = None
    out_channels: Annotated[Channels | None, Field(description="Channels of the video that comes out.")] = (
        None
    )
    patch_size: Annotated[
        PositiveInt | None, Field(description="Pixels of a side that are folded into channels first.")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (
            self.dim_mult is not None
            and self.temperal_downsample is not None
            and len(self.temperal_downsample) != len(self.dim_mult) - 1
        ):
            raise invalid(
                "temperal_downsample",
                f"temperal_downsample has {len(self.temperal_downsample)} entries, but dim_mult of "
                f"{len(self.dim_mult)} stages "
                f"needs {len(self.dim_mult) - 1}",
            )
        if self.temperal_downsample is not None and sum(self.temperal_downsample) > 2:
            raise invalid(
                "temperal_downsample",
                "temperal_downsample may be true at most twice: the encoder reads frames in groups of four",
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and self.z_dim is not None and len(values) != self.z_dim:
                raise invalid(name, f"{name} has {len(values)} entries for z_dim {self.z_dim}")
        return self

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; left out they are upstream's, Wan2.1's."""
        return 16 if self.z_dim is None else self.z_dim

    @property
    def latent_strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns that one of the latents stands for."""
        stages = 4 if self.dim_mult is None else len(self.dim_mult)
        frames = 2 ** (2 if self.temperal_downsample is None else sum(self.temperal_downsample))
        side = 2 ** (stages - 1) * (self.patch_size or 1)
        return frames, side, side

    def size_problem(self, frames: int, height: int, width: int) -> str | None:
        """Return why a video of these sizes cannot be encoded, or None."""
        if (frames - 1) % 4:
            near = 1 + (frames - 1) // 4 * 4
            return f"frames must be 4k + 1; nearest are {near} and {near + 4}"
        _, factor, _ = self.latent_strides
        for side, size in (("height", height), ("width", width)):
            if size % factor:
                near = size // factor * factor
                choices = f"nearest are {near} and {near + factor}" if near else f"at least {factor}"
                return f"{side} must be a multiple of {factor}; {choices}"
        return None


_Tiling = Annotated[
    Literal["auto"] | bool,
    Field(description="Encode the given frames in tiles; `auto` leaves it to the processor."),
]


class WanI2VProcessorConfig(SectionModel):
    """`ae.i2v_processor` with `processor_id: wan_i2v_processor`: the first frame (and the last) as latents and a
    mask, beside the noised ones.
    """

    has_weights = False

    last_frame: Annotated[
        bool,
        Field(description="Give the last frame beside the first, which models of type `flf2v` need."),
    ] = False
    image_encoder: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Folder of the CLIP image encoder, for Wan2.1's models; Wan2.2's have none.",
        ),
    ] = None
    i2v_vae_encode_tiling: _Tiling = "auto"

    @property
    def conditions(self) -> frozenset[str]:
        """Names of what it makes."""
        return frozenset({"i2v_vae_feature"} | ({"clip_feature"} if self.image_encoder else set()))

    @property
    def given_frames(self) -> GivenFrames:
        """Which frames of a video it gives in training."""
        return GivenFrames("must", "must" if self.last_frame else "never")

    @property
    def switches(self) -> Mapping[str, str]:
        """What else it can make or give -> the key that asks for it."""
        return {"clip_feature": "image_encoder", "last": "last_frame"}


class WanTI2VProcessorConfig(SectionModel):
    """`ae.i2v_processor` with `processor_id: wan_ti2v_processor`: the first frame's latents in place of the noised
    ones, as Wan2.2 5B takes them.
    """

    has_weights = False

    image_encoder: Annotated[
        str | None,
        Only(None, reason="models of type ti2v embed no CLIP features"),
        Field(description="Folder of a CLIP image encoder."),
    ] = None
    i2v_vae_encode_tiling: _Tiling = "auto"

    @property
    def conditions(self) -> frozenset[str]:
        """Names of what it makes."""
        return frozenset({"first_frame_latents"})

    @property
    def given_frames(self) -> GivenFrames:
        """Which frames of a video it gives in training."""
        return GivenFrames("must")
