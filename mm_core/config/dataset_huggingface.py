"""`dataset_param` with `dataset_type: huggingface`: conversations with images and videos, for vision-language models."""

from typing import Annotated, Any, Self, TypeAlias

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.section import SectionModel, invalid

Count: TypeAlias = Annotated[int, Field(ge=1)]
Pixels: TypeAlias = Annotated[int, Field(ge=0, le=2**31)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]

_WHOLE = "samples are prepared one by one while they are read, nothing is written beforehand"
_PACKING = "samples are not packed into one sequence yet"
_VALIDATION = "validation during training is not available yet"


class ConversationParameters(SectionModel):
    """`basic_parameters`: which conversations, and how they become tokens."""

    template: Annotated[Name, Field(description="Name of the chat template, such as `qwen3_vl_nothink`.")]
    enable_thinking: Annotated[
        bool | None, Field(description="Whether replies begin with thoughts, where the template has them.")
    ] = True
    dataset_dir: Annotated[Name, Field(description="Folder that names in `dataset` are looked up in.")] = (
        "data"
    )
    dataset: Annotated[Name, Field(description="File of conversations, or several, separated by commas.")]
    cutoff_len: Annotated[
        Any,
        Only(None, reason="the command line decides how long a sequence is: --seq-length"),
        Field(description="Longest sequence, in tokens."),
    ] = None
    train_on_prompt: Annotated[bool, Field(description="Whether the loss counts what the user says.")] = False
    mask_history: Annotated[bool, Field(description="Whether the loss counts the last reply only.")] = False
    tool_format: Annotated[
        Name | None, Field(description="How calls of tools are written; null: as the template does.")
    ] = None
    max_samples: Annotated[Count | None, Field(description="Conversations that are used; null: all.")] = None
    cache_dir: Annotated[Name | None, NoEffect(_WHOLE), Field(description="Folder of prepared samples.")] = (
        None
    )
    overwrite_cache: Annotated[
        bool, NoEffect(_WHOLE, quiet_for=(False,)), Field(description="Prepare samples again.")
    ] = False
    preprocessing_batch_size: Annotated[
        Count, NoEffect(_WHOLE, quiet_for=(1000,)), Field(description="Samples that are prepared at once.")
    ] = 1000
    preprocessing_num_workers: Annotated[
        Count | None, NoEffect(_WHOLE), Field(description="Processes that prepare samples.")
    ] = None
    preprocess_on_fly: Annotated[
        bool,
        NoEffect(_WHOLE, quiet_for=(False, True)),
        Field(description="Prepare samples while they are read."),
    ] = False
    async_preprocess: Annotated[
        bool,
        NoEffect("workers always prepare samples ahead (--num-workers)", quiet_for=(False,)),
        Field(description="Prepare samples ahead of training."),
    ] = False
    async_preprocess_buffer_size: Annotated[
        Count | None,
        NoEffect("prefetch_factor says how far ahead workers are"),
        Field(description="Samples that are prepared ahead."),
    ] = None
    streaming: Annotated[
        bool,
        NotYet(False, reason="datasets are read whole, not as a stream yet"),
        Field(description="Read the dataset as a stream."),
    ] = False
    val_dataset: Annotated[
        Name | None,
        NotYet(None, reason=_VALIDATION),
        Field(description="File of conversations to validate with, or several, separated by commas."),
    ] = None
    val_max_samples: Annotated[
        Count | None, NotYet(None, reason=_VALIDATION), Field(description="Conversations of it; null: all.")
    ] = None
    val_rate: Annotated[
        Annotated[float, Field(ge=0.0, le=1.0)] | None,
        NotYet(None, 0.0, reason=_VALIDATION),
        Field(description="Share of `dataset` that is kept for validation."),
    ] = None
    packing: Annotated[
        bool | None,
        NotYet(None, False, reason=_PACKING),
        Field(description="Put several samples into one sequence."),
    ] = None
    neat_packing: Annotated[
        bool,
        NotYet(False, reason=_PACKING),
        Field(description="Put several samples into one sequence, none of which sees the others."),
    ] = False
    use_pmcc_data: Annotated[
        bool,
        NotYet(False, reason="PMCC's data layout cannot be read yet"),
        Field(description="Read data in PMCC's layout."),
    ] = False

    @model_validator(mode="after")
    def _validation(self) -> Self:
        if self.val_dataset is not None and self.val_rate:
            raise invalid("val_rate", "val_dataset is given too; validate with one of them")
        return self


class ProcessorParameters(SectionModel):
    """`preprocess_parameters`: how images and videos become patches. Sizes are areas in pixels."""

    model_name_or_path: Annotated[Name, Field(description="Folder of the tokenizer and the processor.")]
    use_fast_tokenizer: Annotated[bool, Field(description="Use the tokenizer written in Rust.")] = True
    split_special_tokens: Annotated[bool, Field(description="Split special tokens in texts like words.")] = (
        False
    )
    image_max_pixels: Annotated[
        Pixels, Field(description="Largest area of an image; larger ones are shrunk.")
    ] = 768 * 768
    image_min_pixels: Annotated[
        Pixels, Field(description="Smallest area of an image; smaller ones are enlarged.")
    ] = 32 * 32
    video_max_pixels: Annotated[
        Pixels, Field(description="Largest area of a video's frame; larger ones are shrunk.")
    ] = 256 * 256
    video_min_pixels: Annotated[
        Pixels, Field(description="Smallest area of a video's frame; smaller ones are enlarged.")
    ] = 16 * 16
    video_fps: Annotated[float, Field(gt=0.0, le=1000.0, description="Frames a second that are taken.")] = 2.0
    video_maxlen: Annotated[Count, Field(description="Most frames that are taken of a video.")] = 128

    @model_validator(mode="after")
    def _areas(self) -> Self:
        for what in ("image", "video"):
            least, most = (getattr(self, f"{what}_{end}_pixels") for end in ("min", "max"))
            if least > most:
                raise invalid(f"{what}_min_pixels", f"must be at most {what}_max_pixels ({most})")
        return self


def _tag(what: str) -> Any:
    return Field(min_length=1, description=f"{what}; null: none.")


class ConversationKeys(SectionModel):
    """`attr`: what the keys and the roles of a conversation are called in the file."""

    system: Annotated[str | None, _tag("Key of the system prompt")] = None
    images: Annotated[str | None, _tag("Key of the images")] = None
    videos: Annotated[str | None, _tag("Key of the videos")] = None
    messages: Annotated[str | None, _tag("Key of the messages")] = None
    role_tag: Annotated[str | None, _tag("Key of a message's role")] = None
    content_tag: Annotated[str | None, _tag("Key of a message's text")] = None
    user_tag: Annotated[str | None, _tag("Role of the user")] = None
    assistant_tag: Annotated[str | None, _tag("Role of the model")] = None
    observation_tag: Annotated[str | None, _tag("Role of what a tool returns")] = None
    function_tag: Annotated[str | None, _tag("Role of a call of a tool")] = None
    system_tag: Annotated[str | None, _tag("Role of the system prompt")] = None


class HuggingFaceDatasetConfig(SectionModel):
    """Conversations with images and videos, a JSON list of them."""

    dataset_type: Annotated[str, Field(description="Id of the dataset.")] = "huggingface"
    basic_parameters: Annotated[
        ConversationParameters, Field(description="Which conversations, and how they become tokens.")
    ]
    preprocess_parameters: Annotated[
        ProcessorParameters, Field(description="How images and videos become patches.")
    ]
    attr: Annotated[
        ConversationKeys, Field(description="What keys and roles of a conversation are called.")
    ] = Field(default_factory=ConversationKeys)
