"""`model.json` of a model of the transformers library, such as a vision-language model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mm_core.config.keys import NoEffect
from mm_core.config.origin import KeyPath
from mm_core.config.patch import PatchConfig
from mm_core.config.plugins import Name, PluginsConfig
from mm_core.config.section import SectionModel


class LossConfig(SectionModel):
    """`loss_cfg`: the loss over the tokens of a text."""

    compute_mode: Annotated[
        Literal["default", "chunk", "dynamic_chunk"],
        Field(
            description="Logits of all tokens at once, of `chunk_size` tokens of each sample at a time, or of "
            "`chunk_size` tokens of the whole batch at a time: the same loss in less memory."
        ),
    ] = "default"
    chunk_size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        NoEffect(
            "all logits are computed at once, unless compute_mode is chunk or dynamic_chunk",
            when=("compute_mode", "default"),
        ),
        Field(description="Tokens of a chunk; default: 1024 for `chunk`, 4096 for `dynamic_chunk`."),
    ] = None
    loss_type: Annotated[
        Literal["default", "per_sample_loss", "per_token_loss", "token_loss", "square_loss"],
        Field(
            description="How much each learnt token counts in the mean over the global batch: the same for all; with "
            "`per_sample_loss` 1/n in a sample of n, with `square_loss` 1/√n."
        ),
    ] = "default"
    router_aux_loss_coef: Annotated[
        float, Field(ge=0.0, description="Weight of the loss that balances experts; 0: none.")
    ] = 0.0


class TransformersModelConfig(SectionModel):
    """The top level of a transformers model's file: the keys that every such model has.

    Its other keys are the family's, and checked by the config class `transformers_model/<model_id>`. The network itself
    is described by `config.json` of `init_from_hf_path`.
    """

    model_id: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Id of the model, `mm list` shows all; default: what `architectures` or `model_type` of "
            "config.json names.",
        ),
    ] = None
    init_from_hf_path: Annotated[
        str, Field(min_length=1, description="Folder in Hugging Face layout: config.json and weights.")
    ]
    init: Annotated[
        Literal["pretrained", "random"],
        Field(
            description="`random` is needed to start from random weights; of the folder only config.json is read then."
        ),
    ] = "pretrained"
    loss_cfg: Annotated[LossConfig, Field(description="The loss over the tokens of a text.")] = Field(
        default_factory=LossConfig
    )
    task_id: Annotated[
        str | None, Field(min_length=1, description="Id of the task; null: `language`, language modelling.")
    ] = None
    callbacks: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(description="Ids of callbacks, which watch the run beside the core's own."),
    ] = Field(default_factory=list)
    plugins: Annotated[
        PluginsConfig | list[Name],
        Field(
            description="Distributions whose hooks take part though nothing of theirs is used; or an object "
            "that says as well which distributions take part in this job."
        ),
    ] = Field(default_factory=list)
    patch: Annotated[PatchConfig, Field(description="MindSpeed-MM's switches for replaced functions.")] = (
        Field(default_factory=PatchConfig)
    )
    lora_apply_modules: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(description='Parts whose layers get LoRA; `["all"]` means every one.'),
    ] = None
    lora_mixed_training: Annotated[
        bool | None,
        Field(description="Train the weights of parts without LoRA beside those of LoRA."),
    ] = None
    lora_save_full_weight: Annotated[
        bool | None,
        Field(description="Save merged weights beside those of LoRA."),
    ] = None


#: Task of a transformers model whose file names none.
DEFAULT_TASK = "language"


@dataclass(frozen=True, slots=True)
class ExampleImage:
    """One image as a network reads it.

    Attributes:
        grid: frames, rows and columns of patches, before any are merged.
        values: numbers of a patch.
        tokens: places in the sequence that the image takes.
        token_id: what stands there.
    """

    grid: tuple[int, int, int]
    values: int
    tokens: int
    token_id: int

    @property
    def patches(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns


class TransformersFamilyConfig(SectionModel):
    """Base class of the config class of a family, for the keys that `TransformersModelConfig` does not have.

    A family whose files repeat numbers of the folder's config.json names them, so that a difference is told. It also says
    what its keys ask of the network, as data: which parts are frozen, and which attention they use.
    """

    #: `model_type` in the folder's config.json; empty if it is not to be compared.
    hf_model_type: ClassVar[str] = ""
    #: Id of the chat template of conversations with the model, where nothing else names one.
    chat_template: ClassVar[str] = "tokenizer"
    #: Key of the file -> the same number's key in config.json.
    hf_config_keys: ClassVar[Mapping[KeyPath, KeyPath]] = {}

    def frozen_modules(self) -> tuple[str, ...]:
        """Return the paths of the network's modules whose weights stay as they are; a module inside them too."""
        return ()

    def attention_implementations(self) -> Mapping[str, str]:
        """Return the part of config.json (`text_config`; the empty text is the rest) -> transformers' name of the
        attention that the file asks for. For parts that are left out it is chosen by the device.
        """
        return {}

    def experts_implementation(self) -> str | None:
        """Return transformers' name of the way in which experts are computed, if the file asks for one; else it is chosen
        by the device.
        """
        return None

    def example_image(self, config: Mapping[str, Any], area: int, room: int) -> ExampleImage | None:
        """Return the sizes of one image as the network reads it; None if it takes none, or the sequence has no room for
        the smallest.

        Args:
            config: the folder's config.json.
            area: of the image, at most, in pixels.
            room: tokens that the image may take.
        """
        return None
