"""`model.json` of a training job."""

from typing import Annotated, Any

from pydantic import Field

from mm_core.config.keys import NoEffect, Only
from mm_core.config.patch import PatchConfig
from mm_core.config.plugins import Name, PluginsConfig
from mm_core.config.section import SectionModel

_LORA = "LoRA is not available yet"


class ModelConfig(SectionModel):
    """The top level of a diffusion model's training file.

    The component sections stay plain data here: each is checked by the config class that the component's
    distribution registers.
    """

    load_video_features: Annotated[
        bool, Only(False, reason="features cannot be loaded yet; videos are encoded during training")
    ] = False
    load_text_features: Annotated[
        bool, Only(False, reason="features cannot be loaded yet; captions are encoded during training")
    ] = False
    task: Annotated[
        str,
        Only("t2v", reason="text-to-video is the only kind of training yet"),
        Field(description="Kind of training: what conditions the model sees."),
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
    ae: Annotated[dict[str, Any], Field(description="Autoencoder between pixels and latents, frozen.")]
    text_encoder: Annotated[
        dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)],
        Field(description="Text encoder or several of them, frozen."),
    ]
    low_noise_predictor: Annotated[
        Any, Only(None, reason="one expert is trained at a time; the other belongs in the inference file")
    ] = None
    encoder_offload_interval: Annotated[
        int,
        Field(ge=1),
        NoEffect("the encoders stay on the device and encode each micro batch", quiet_for=(1,)),
    ] = 1
    enable_encoder_dp: Annotated[bool, NoEffect("each rank encodes its own samples", quiet_for=(False,))] = (
        False
    )
    interleaved: Annotated[
        bool, NoEffect("batches are moved to the device when they are needed", quiet_for=(False,))
    ] = False
    patch: PatchConfig = Field(default_factory=PatchConfig)
    dpo: Annotated[Any, Only(None, reason="preference training (DPO) is not available yet")] = None
    lora_apply_modules: Annotated[Any, Only(None, reason=_LORA)] = None
    lora_mixed_training: Annotated[bool | None, Only(None, False, reason=_LORA)] = None
    lora_save_full_weight: Annotated[bool | None, Only(None, False, reason=_LORA)] = None


#: Sections of a model file that name a component, in the order in which they are built.
COMPONENT_SECTIONS = ("diffusion", "predictor", "ae", "text_encoder")
