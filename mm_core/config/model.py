"""`model.json` of a training job."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mm_core.config.keys import NoEffect, NotYet
from mm_core.config.patch import PatchConfig
from mm_core.config.plugins import Name, PluginsConfig
from mm_core.config.section import SectionModel


class ModelConfig(SectionModel):
    """The top level of a diffusion model's training file.

    The component sections stay plain data here: each is checked by the config class that the component's
    distribution registers. An autoencoder is needed unless `load_video_features` is true, and a text encoder unless
    `load_text_features` is.
    """

    load_video_features: Annotated[
        bool,
        Field(
            description="Whether the samples are latents that `mm extract-features` stored, so that no autoencoder is built."
        ),
    ] = False
    load_text_features: Annotated[
        bool,
        Field(
            description="Whether the captions are embeddings that `mm extract-features` stored, so that no text encoder is "
            "built."
        ),
    ] = False
    task: Annotated[
        Literal["t2v", "i2v"],
        Field(
            description="What conditions the model sees: a text (`t2v`), or a text and a first frame (`i2v`, also for "
            "models of type `ti2v` and `flf2v`)."
        ),
    ] = "t2v"
    task_id: Annotated[
        str, Field(min_length=1, description="Id of the task, which turns a batch into a loss.")
    ] = "diffusion"
    callbacks: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(description="Ids of callbacks, which watch the run beside the core's own."),
    ] = Field(default_factory=list)
    plugins: Annotated[
        PluginsConfig | list[Name],
        Field(
            description="Distributions whose hooks take part though no component of theirs is used; or an object "
            "that says as well which distributions take part in this job."
        ),
    ] = Field(default_factory=list)
    diffusion: Annotated[dict[str, Any], Field(description="Noise schedule and loss.")]
    predictor: Annotated[dict[str, Any], Field(description="The network that is trained.")]
    ae: Annotated[
        dict[str, Any] | None, Field(description="Autoencoder between pixels and latents, frozen.")
    ] = None
    text_encoder: Annotated[
        dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)] | None,
        Field(description="Text encoder or several of them, frozen."),
    ] = None
    low_noise_predictor: Annotated[
        str | dict[str, Any] | None,
        Field(
            description="Second expert, trained in the same job: its folder of weights, or a section like predictor's. It "
            "learns the noise levels below diffusion's `boundary`."
        ),
    ] = None
    encoder_offload_interval: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="Micro batches that are encoded at once; between, autoencoder and text encoder rest in host memory. "
            "1: they stay on the device.",
        ),
    ] = 1
    enable_encoder_dp: Annotated[
        bool,
        Field(
            description="Share the encoding among the ranks that train on the same micro batches (context and tensor "
            "parallelism)."
        ),
    ] = False
    interleaved: Annotated[
        bool,
        NoEffect("batches are moved to the device when they are needed", quiet_for=(False,)),
        Field(description="Keep batches in host memory until they are used."),
    ] = False
    patch: Annotated[PatchConfig, Field(description="MindSpeed-MM's switches for replaced functions.")] = (
        Field(default_factory=PatchConfig)
    )
    dpo: Annotated[
        dict[str, Any] | None,
        NotYet(None, reason="preference training (DPO) is not available yet"),
        Field(description="Settings of preference training."),
    ] = None
    lora_apply_modules: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(description='Components whose layers get LoRA; `["all"]` means every one.'),
    ] = None
    lora_mixed_training: Annotated[
        bool | None,
        Field(description="Train the weights of components without LoRA beside those of LoRA."),
    ] = None
    lora_save_full_weight: Annotated[
        bool | None,
        Field(description="Save merged weights beside those of LoRA."),
    ] = None

    @model_validator(mode="after")
    def _encoders(self) -> Self:
        for name, loaded in (("ae", self.load_video_features), ("text_encoder", self.load_text_features)):
            if getattr(self, name) is None and not loaded:
                # As if the field had no default.
                raise PydanticCustomError("missing", "Field required", {"key": name})
        return self


#: Sections of a model file that name a component, in the order in which they are built.
COMPONENT_SECTIONS = ("diffusion", "predictor", "ae", "text_encoder")
#: The section of a second expert, or the folder of its weights.
SECOND = "low_noise_predictor"
