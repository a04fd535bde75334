"""`inference_model.json`: what `mm generate` reads."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from mm_core.config.dtypes import DType
from mm_core.config.keys import NoEffect, Only
from mm_core.config.patch import PatchConfig
from mm_core.config.plugins import Name, PluginsConfig
from mm_core.config.section import SectionModel, invalid
from mm_core.config.sigmas import Boundary
from mm_core.config.text import TextMethods, method_names
from mm_core.config.tokenizer import TokenizerConfig

_SHORT_FORM = ("basic_clean", "whitespace_clean")
_OTHER_PIPELINES = Only(
    None,
    reason="it is of pipelines of other models; here a video is made from a text and, if the model takes them, its first "
    "and last frame (image, last_image)",
)
_Text: TypeAlias = Annotated[str, Field(min_length=1)]
_Files: TypeAlias = _Text | Annotated[list[_Text], Field(min_length=1)]


class InferenceConfig(SectionModel):
    """The top level of an inference file. Component sections are checked by their own config classes, as in
    training.
    """

    pipeline_class: Annotated[str, Field(min_length=1, description="Id of the sampling pipeline.")]
    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1)] | None,
        Field(description="A text, a list of texts, or the path of a .txt file with one prompt a line."),
    ] = None
    negative_prompt: Annotated[
        str | None, Field(description="What guidance moves away from; None: the pipeline's default.")
    ] = None
    save_path: Annotated[str, Field(min_length=1, description="Folder of the videos.")] = "generated"
    fps: Annotated[int, Field(ge=1, description="Frames a second of the video.")] = 16
    frame_interval: Annotated[
        int, Field(ge=1, description="Every n-th frame was trained on: fps is divided by it.")
    ] = 1
    num_inference_videos_per_sample: Annotated[
        int, Field(ge=1, le=10_000, description="Videos for each prompt.")
    ] = 1
    use_prompt_preprocess: Annotated[
        bool,
        Field(
            description="Clean prompts by basic_clean and whitespace_clean; the short form of "
            "text_preprocess_methods."
        ),
    ] = False
    text_preprocess_methods: Annotated[
        TextMethods,
        Field(
            description="How prompts are cleaned, in order: what the data file of the training run "
            "says about captions, so that a prompt means the same."
        ),
    ] = Field(default_factory=list)
    dtype: Annotated[
        DType | None, Field(description="Number format of components whose section says none.")
    ] = None
    device: Annotated[
        str,
        NoEffect("the accelerator at hand is used, and the CPU without one", quiet_for=("auto",)),
        Field(description="Where to compute."),
    ] = "auto"
    pipeline_config: Annotated[
        dict[str, Any], Field(description="Settings of the pipeline, checked by its own config class.")
    ] = Field(default_factory=dict)
    boundary_ratio: Annotated[
        Boundary | None, Field(description="Sigma at and above which the high-noise expert denoises.")
    ] = None
    load: Annotated[
        _Text | Annotated[list[_Text], Field(min_length=2, max_length=2)] | None,
        Field(
            description="Run, checkpoint or folder with the predictor's weights, and with those of both experts if it was "
            "trained with both; or two, of the high-noise and the low-noise expert."
        ),
    ] = None
    predictor: Annotated[dict[str, Any], Field(description="The network that denoises.")]
    low_noise_predictor: Annotated[
        str | dict[str, Any] | None,
        Field(description="Second expert: its folder of weights, or a section like predictor's."),
    ] = None
    ae: Annotated[dict[str, Any], Field(description="Autoencoder between latents and pixels.")]
    text_encoder: Annotated[
        dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)],
        Field(description="Text encoder or several of them."),
    ]
    tokenizer: Annotated[TokenizerConfig, Field(description="The tokenizer of the prompts.")]
    diffusion: Annotated[dict[str, Any], Field(description="Noise schedule and sampling steps.")]
    plugins: Annotated[
        PluginsConfig | list[Name],
        Field(
            description="Distributions whose hooks take part though no component of theirs is used; or an object "
            "that says as well which distributions take part in this job."
        ),
    ] = Field(default_factory=list)
    task: Annotated[
        Literal["t2v", "i2v"] | None,
        Field(
            description="What the model sees: a text, or a text and a first frame; checked against `image`. None: as "
            "`image` says."
        ),
    ] = None
    patch: Annotated[PatchConfig, Field(description="MindSpeed-MM's switches for replaced functions.")] = (
        Field(default_factory=PatchConfig)
    )

    image: Annotated[
        _Files | None,
        Field(
            description="First frame: a file, a list of files, or a .txt file with one of them a line; as many as prompts, "
            "or one for all."
        ),
    ] = None
    last_image: Annotated[
        _Files | None,
        Field(description="Last frame, as `image`; for models that are given both ends."),
    ] = None
    dual_image: Annotated[
        _Text
        | Annotated[list[_Text], Field(min_length=1)]
        | Annotated[list[list[_Text]], Field(min_length=1)]
        | None,
        Field(
            description="First and last frame in one key: a pair of files, a list of pairs, or a .txt file with "
            "`first,last` a line."
        ),
    ] = None
    crop_for_hw: Annotated[
        bool | None,
        Field(
            description="Cut the given frames to the video's aspect ratio before they are scaled; otherwise they are "
            "stretched."
        ),
    ] = None
    max_hxw: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="Let the first frame's aspect ratio decide height and width, with at most so many pixels; "
            "input_size then says the number of frames alone."
        ),
    ] = None
    num_frames: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Only(None, reason="the number of frames is the first of pipeline_config.input_size"),
        Field(description="Frames of the video."),
    ] = None
    video: Annotated[
        _Files | None,
        _OTHER_PIPELINES,
        Field(description="Video to begin with."),
    ] = None
    start_frame: Annotated[
        Annotated[int, Field(ge=0)] | None,
        _OTHER_PIPELINES,
        Field(description="Frame of the video to begin with."),
    ] = None
    strength: Annotated[
        Annotated[float, Field(ge=0.0, le=1.0)] | None,
        _OTHER_PIPELINES,
        Field(description="How much of the given video is replaced, from 0 to 1."),
    ] = None
    conditional_pixel_values_path: Annotated[
        Any, _OTHER_PIPELINES, Field(description="Files of the frames that a video is filled in between.")
    ] = None
    mask_type: Annotated[
        Any, _OTHER_PIPELINES, Field(description="Which frames are given and which are made.")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.use_prompt_preprocess and self.text_preprocess_methods:
            raise invalid(
                "use_prompt_preprocess",
                "text_preprocess_methods is given too, and says more; set it to false or leave it out",
            )
        if self.fps < self.frame_interval:
            raise invalid(
                "frame_interval",
                f"must be at most fps ({self.fps}): the video has fps / frame_interval frames a second",
            )
        if self.crop_for_hw and self.max_hxw is not None:
            raise invalid(
                "max_hxw",
                "the first frame decides the size, so there is nothing to cut; set crop_for_hw to false or leave max_hxw out",
            )
        return self

    @property
    def prompt_methods(self) -> tuple[str, ...]:
        """Names of the steps that clean prompts, in order."""
        return _SHORT_FORM if self.use_prompt_preprocess else method_names(self.text_preprocess_methods)

    @property
    def save_fps(self) -> int:
        """Frames a second of the written video."""
        return self.fps // self.frame_interval
