"""`dataset_param` with `dataset_type: huggingface`: conversations with images and videos, for vision-language models."""

from typing import Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, NotYet, Only
from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel, invalid

Count: TypeAlias = Annotated[int, Field(ge=1)]
Pixels: TypeAlias = Annotated[int, Field(ge=0, le=2**31)]
LargestPixels: TypeAlias = Annotated[int, Field(ge=1, le=2**31)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]

_ON_FLY = "preprocess_on_fly: samples are prepared one by one while they are read"


class ConversationParameters(SectionModel):
    """`basic_parameters`: which conversations, and how they become tokens."""

    template: Annotated[
        Name,
        Field(
            description="Id of the chat template, such as `qwen3_vl_nothink`; `tokenizer`: the folder's own, of texts."
        ),
    ]
    enable_thinking: Annotated[
        bool | None,
        Field(
            description="Whether replies begin with thoughts, where the template has them; null: as the template does."
        ),
    ] = True
    dataset_dir: Annotated[
        Name, Field(description="Folder that names in `dataset`, images and videos are looked up in.")
    ] = "data"
    dataset: Annotated[
        Name,
        Field(
            description="File of conversations (a JSON list, or JSON Lines), a folder of such files, or several of them, "
            "separated by commas."
        ),
    ]
    cutoff_len: Annotated[
        Count | None,
        Field(description="Longest sequence, in tokens, where --seq-length does not say it; neither: 1024."),
    ] = None
    train_on_prompt: Annotated[bool, Field(description="Whether the loss counts what the user says too.")] = (
        False
    )
    mask_history: Annotated[bool, Field(description="Whether the loss counts the last reply only.")] = False
    tool_format: Annotated[
        Name | None,
        Only(None, reason="tools and their calls are written as the model's own chat template does"),
        Field(description="How calls of tools are written; null: as the template does."),
    ] = None
    max_samples: Annotated[
        Count | None, Field(description="Conversations that are used of each name in `dataset`; null: all.")
    ] = None
    cache_dir: Annotated[
        Name | None,
        NoEffect(_ON_FLY, when=("preprocess_on_fly", True)),
        Field(
            description="Folder of prepared samples: all are prepared and checked before training, once; null: while they "
            "are read."
        ),
    ] = None
    overwrite_cache: Annotated[
        bool,
        NoEffect("there is no cache_dir", quiet_for=(False,), when=("cache_dir", None)),
        Field(description="Prepare samples again, such as after images have changed."),
    ] = False
    preprocessing_batch_size: Annotated[
        Count, Field(description="Samples that a process prepares at once.")
    ] = 1000
    preprocessing_num_workers: Annotated[
        Count | None, Field(description="Processes that prepare samples, at most one a core; null: one.")
    ] = None
    preprocess_on_fly: Annotated[bool, Field(description="Prepare samples while they are read.")] = False
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
        Field(description="Read JSON Lines as a stream, in their order: for sets too large to be indexed."),
    ] = False
    val_dataset: Annotated[
        Name | None,
        Field(description="File of conversations to validate with, or several, separated by commas."),
    ] = None
    val_max_samples: Annotated[
        Count | None, Field(description="Conversations to validate with, at most; null: all.")
    ] = None
    val_rate: Annotated[
        Annotated[float, Field(ge=0.0, lt=1.0)] | None,
        Field(description="Share of `dataset` that is kept for validation, drawn by --seed."),
    ] = None
    packing: Annotated[
        bool | None,
        Field(
            description="Put several samples into one sequence; without `neat_packing` each sees those before it, and they "
            "are one sample of the loss."
        ),
    ] = None
    neat_packing: Annotated[
        bool,
        Field(description="Put several samples into one sequence, none of which sees the others."),
    ] = False
    use_pmcc_data: Annotated[
        bool,
        NotYet(False, reason="PMCC's data layout cannot be read yet"),
        Field(description="Read data in PMCC's layout."),
    ] = False

    @property
    def packs(self) -> bool:
        """Whether several samples share a sequence."""
        return bool(self.packing) or self.neat_packing

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.val_dataset is not None and self.val_rate:
            raise invalid("val_rate", "val_dataset is given too; validate with one of them")
        if self.val_max_samples is not None and self.val_dataset is None and not self.val_rate:
            raise invalid(
                "val_max_samples", "there is nothing to validate with; give val_dataset or val_rate"
            )
        if self.val_rate and self.streaming:
            raise invalid(
                "val_rate", "a stream has no number of samples to take a share of; give val_dataset"
            )
        if self.train_on_prompt and self.mask_history:
            raise invalid(
                "mask_history",
                "it learns the last reply only, and train_on_prompt everything; keep one of them",
            )
        if self.packing is False and self.neat_packing:
            raise invalid("neat_packing", "it is a way of packing, and packing is false; take packing out")
        if self.packs and self.preprocess_on_fly and not self.streaming:
            raise invalid(
                "preprocess_on_fly", "packing needs the lengths of all samples beforehand; write false"
            )
        return self


class ProcessorParameters(SectionModel):
    """`preprocess_parameters`: how images and videos become patches. Sizes are areas in pixels."""

    model_name_or_path: Annotated[Name, Field(description="Folder of the tokenizer and the processor.")]
    use_fast_tokenizer: Annotated[
        bool,
        NoEffect("the fast one is always used: it tells where in the text a token begins", quiet_for=(True,)),
        Field(description="Use the tokenizer written in Rust."),
    ] = True
    split_special_tokens: Annotated[
        bool,
        Only(False, reason="the tokens that the chat template itself writes would be split too"),
        Field(description="Split special tokens in texts like words."),
    ] = False
    image_max_pixels: Annotated[
        LargestPixels, Field(description="Largest area of an image; larger ones are shrunk.")
    ] = 768 * 768
    image_min_pixels: Annotated[
        Pixels, Field(description="Smallest area of an image; smaller ones are enlarged.")
    ] = 32 * 32
    video_max_pixels: Annotated[
        LargestPixels, Field(description="Largest area of a video's frame; larger ones are shrunk.")
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
    """`attr`: what the keys and the roles of a conversation are called in the file; by default as in ShareGPT's layout."""

    system: Annotated[str | None, _tag("Key of the system prompt")] = None
    images: Annotated[str | None, _tag("Key of the images")] = None
    videos: Annotated[str | None, _tag("Key of the videos")] = None
    tools: Annotated[str | None, _tag("Key of the tools that the model may call")] = None
    messages: Annotated[str | None, _tag("Key of the messages")] = "conversations"
    role_tag: Annotated[str | None, _tag("Key of a message's role")] = "from"
    content_tag: Annotated[str | None, _tag("Key of a message's text")] = "value"
    user_tag: Annotated[str | None, _tag("Role of the user")] = "human"
    assistant_tag: Annotated[str | None, _tag("Role of the model")] = "gpt"
    observation_tag: Annotated[str | None, _tag("Role of what a tool returns")] = "observation"
    function_tag: Annotated[str | None, _tag("Role of a call of a tool")] = "function_call"
    system_tag: Annotated[str | None, _tag("Role of the system prompt")] = "system"

    @model_validator(mode="after")
    def _needed(self) -> Self:
        for key in ("messages", "role_tag", "content_tag", "user_tag", "assistant_tag"):
            if getattr(self, key) is None:
                raise invalid(key, "a conversation cannot be read without it; name it")
        tags = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
        roles: dict[str, str] = {}
        for key in tags:
            role = getattr(self, key)
            if role is not None and role in roles:
                raise invalid(key, f'"{role}" is {roles[role]} too; give each role a name of its own')
            roles[role] = key
        return self


class HuggingFaceDatasetConfig(SectionModel):
    """Conversations with images and videos: JSON lists of them, or JSON Lines."""

    #: Where the section names its chat template, which is a component of its own.
    chat_template_key: ClassVar[KeyPath] = ("basic_parameters", "template")
    #: Where the section says how long a sequence is, which --seq-length says too.
    sequence_length_key: ClassVar[KeyPath] = ("basic_parameters", "cutoff_len")

    has_buckets: ClassVar[bool] = False
    """Whether samples know their sizes before they are read, for `group_data`."""

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
    max_bad_samples: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)],
        Field(
            description="How many conversations may be unusable, each reported and replaced, before the job stops: a "
            "number, or a share of the set (0.01: one in a hundred, at least one)."
        ),
    ] = 0.01

    @property
    def validates(self) -> bool:
        """Whether there is a validation set, for `--eval-interval`."""
        basic = self.basic_parameters
        return basic.val_dataset is not None or bool(basic.val_rate)
