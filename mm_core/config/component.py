"""One component of a job: which entry it is, its checked section, and how it gets its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mm_core.config.dtypes import DType
from mm_core.config.keys import NoEffect
from mm_core.config.lora import LoraConfig
from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel
from mm_registry.spec import EntrySpec

#: Roles whose components have weights, and so the keys of `WeightKeys`.
WITH_WEIGHTS = frozenset({"predictor", "ae", "text_encoder"})

#: Roles that are chosen by an id alone, without a section of their own.
WITHOUT_SECTION = frozenset({"task", "chat_template"})

#: Keys that choose a component where it is not `model_id`.
ID_KEYS = {"dataset": "dataset_type", "i2v_processor": "processor_id"}


class IdKeys(SectionModel):
    """The key that every component's section has; the core consumes it."""

    model_id: Annotated[str, Field(min_length=1, description="Id of the component; `mm list` shows all.")]


class WeightKeys(IdKeys):
    """The keys that the core consumes in the section of a component with weights."""

    dtype: Annotated[
        DType | None, Field(description="Number format of a frozen component, and of all in generation.")
    ] = None
    from_pretrained: Annotated[
        str | None, Field(min_length=1, description="Folder of weights in Hugging Face layout.")
    ] = None
    hub_backend: Annotated[
        Literal["hf", "modelscope", "om"] | None,
        NoEffect("nothing is downloaded; from_pretrained names a local folder", quiet_for=("hf", None)),
        Field(description="Hub that a name would be looked up in."),
    ] = None
    init: Annotated[
        Literal["pretrained", "random"],
        Field(description="`random` is needed to start from random weights; nothing does so by accident."),
    ] = "pretrained"


@dataclass(frozen=True)
class ComponentConfig:
    """What a factory needs to build one component.

    Attributes:
        role: `predictor`, `ae`, `text_encoder`, `diffusion`, `i2v_processor`, `dataset`, `chat_template`, `task`,
            `pipeline`, `transformers_model`.
        model_id: as written.
        spec: the entry that it means.
        config: the section, validated by the config class of the entry; None if it registers none.
        fields: the effective fields for the constructor as plain data, defaults of the config class
            included; without a config class, the section as written. Without the keys that the core consumes.
        dtype: short name (`bf16`), or None if not said.
        from_pretrained: folder of weights, or None.
        init: where the weights come from.
        path: place of the section in its file, such as `("predictor",)`.
        lora: adapters of what is trained, if there are any.
    """

    role: str
    model_id: str
    spec: EntrySpec
    config: BaseModel | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    from_pretrained: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    path: KeyPath = ()
    lora: LoraConfig | None = None

    @property
    def id_key(self) -> str:
        """The key whose value is the component's id."""
        return ID_KEYS.get(self.role, "model_id")

    @property
    def weights_path(self) -> KeyPath:
        """The place in its file of the folder that `from_pretrained` holds."""
        key = "init_from_hf_path" if self.role == "transformers_model" else "from_pretrained"
        return (*self.path, key)

    @property
    def label(self) -> str:
        """What messages call it: `predictor (wandit)`; of two predictors by its section."""
        name = self.path[0] if self.role == "predictor" and self.path else self.role
        return f"{name} ({self.model_id})"
