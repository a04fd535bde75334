"""Entries of `train_pipeline.video`: `{"trans_type": …, "param": {…}}`."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from mm_core.config.keys import Only
from mm_core.config.section import SectionModel

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
Interpolation: TypeAlias = Annotated[
    Literal["bilinear", "bicubic", "nearest"], Field(description="How pixels are interpolated.")
]


class TransformSize(SectionModel):
    """A size in pixels. `max_hxw` is the area for `mode: hxw`; by default the product of the two."""

    max_height: Annotated[PositiveInt, Field(description="Pixels.")]
    max_width: Annotated[PositiveInt, Field(description="Pixels.")]
    max_hxw: Annotated[
        PositiveInt | None, Field(description="Largest area in pixels; default: max_height × max_width.")
    ] = None


Size: TypeAlias = Annotated[
    Literal["auto"] | TransformSize | tuple[PositiveInt, PositiveInt],
    Field(
        description="`auto` is the dataset's own max_height × max_width; a list is height and width in pixels."
    ),
]
Antialias: TypeAlias = Annotated[bool, Field(description="Smooth before shrinking.")]
AlignCorners: TypeAlias = Annotated[
    bool, Field(description="Whether the corner pixels' centres keep their places.")
]


class ResizeVideoParam(SectionModel):
    """`resize` gives exactly the size. The others keep the aspect ratio: `shortside` covers the size,
    `longside` fits into it, `hxw` shrinks to its area.
    """

    transform_size: Size = "auto"
    mode: Annotated[
        Literal["resize", "shortside", "longside", "hxw"],
        Field(description="`resize` gives exactly the size; the others keep the aspect ratio."),
    ] = "resize"
    skip_low_resolution: Annotated[
        bool, Field(description="Leave frames that fit into the size (shortside, longside).")
    ] = False
    interpolation_mode: Interpolation = "bilinear"
    antialias: Antialias = False
    align_corners: AlignCorners = False


class ResizeVideoConfig(SectionModel):
    """Resize every frame."""

    trans_type: Annotated[Literal["ResizeVideo"], Field(description="Which transform.")]
    param: Annotated[ResizeVideoParam, Field(description="Its parameters.")] = Field(
        default_factory=ResizeVideoParam
    )


class ToTensorVideoConfig(SectionModel):
    """uint8 [0, 255] to float32 [0, 1]."""

    trans_type: Annotated[Literal["ToTensorVideo"], Field(description="Which transform.")]
    param: Annotated[
        dict[str, Any] | None,
        Only(None, {}, reason="it takes no parameters"),
        Field(description="Its parameters."),
    ] = None


class NormalizeParam(SectionModel):
    """`(x - mean) / std`, one number or one for each channel."""

    mean: Annotated[
        float | Annotated[list[float], Field(min_length=3, max_length=3)],
        Field(description="Subtracted from pixels in [0, 1]."),
    ] = 0.5
    std: Annotated[
        Annotated[float, Field(gt=0)]
        | Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)],
        Field(description="Divides them."),
    ] = 0.5


class NormalizeConfig(SectionModel):
    """Normalise; 0.5 and 0.5 bring [0, 1] to [-1, 1], which autoencoders expect."""

    trans_type: Annotated[Literal["norm_fun"], Field(description="Which transform.")]
    param: Annotated[NormalizeParam, Field(description="Its parameters.")] = Field(
        default_factory=NormalizeParam
    )


class CenterCropResizeVideoParam(SectionModel):
    """Crop the largest area of the size's aspect ratio from the centre, then resize it to the size."""

    transform_size: Size = "auto"
    use_short_edge: Annotated[bool, Field(description="Crop the largest square instead.")] = False
    top_crop: Annotated[bool, Field(description="Crop from the top rather than from the centre.")] = False
    interpolation_mode: Interpolation = "bilinear"
    antialias: Antialias = False
    align_corners: AlignCorners = False


class CenterCropResizeVideoConfig(SectionModel):
    """Crop to the aspect ratio and resize."""

    trans_type: Annotated[Literal["CenterCropResizeVideo"], Field(description="Which transform.")]
    param: Annotated[CenterCropResizeVideoParam, Field(description="Its parameters.")] = Field(
        default_factory=CenterCropResizeVideoParam
    )


TransformConfig: TypeAlias = Annotated[
    ResizeVideoConfig | ToTensorVideoConfig | NormalizeConfig | CenterCropResizeVideoConfig,
    Field(discriminator="trans_type"),
]
FrameTransformConfig: TypeAlias = Annotated[
    ResizeVideoConfig | CenterCropResizeVideoConfig, Field(discriminator="trans_type")
]
"""What can be done to a frame of a clip that is in [-1, 1] already."""
