"""The entry-point groups that a plugin can declare: what each holds, and which key of a configuration chooses
from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PREFIX = "mm_core."
HOOKS = "mm_core.hooks"


@dataclass(frozen=True, slots=True)
class Group:
    """One entry-point group.

    Attributes:
        name: as written in a plugin's pyproject.toml, `"mm_core.predictor_models"`.
        role: short name of what an entry is; the part before the slash in the names of companions,
            `"predictor"`.
        noun: the same for messages.
        mapping: name of the registry in `mm_core`; None if there is none.
        chosen_by: the key of a configuration whose value is the id, or a list of ids.
    """

    name: str
    role: str
    noun: str
    mapping: str | None
    chosen_by: str

    @property
    def is_component(self) -> bool:
        """Whether entries are named by an id of their own, rather than `role/id` (companions) or anything
        (hooks).
        """
        return self.role in ROLES


_COMPONENTS = (
    Group(
        "mm_core.diffusion_models",
        "diffusion",
        "diffusion model",
        "DIFFUSION_MODEL_MAPPINGS",
        "diffusion.model_id",
    ),
    Group(
        "mm_core.predictor_models", "predictor", "predictor", "PREDICTOR_MODEL_MAPPINGS", "predictor.model_id"
    ),
    Group("mm_core.ae_models", "ae", "ae", "AE_MODEL_MAPPINGS", "ae.model_id"),
    Group(
        "mm_core.text_encoders",
        "text_encoder",
        "text encoder",
        "TEXT_ENCODER_MAPPINGS",
        "text_encoder.model_id",
    ),
    Group(
        "mm_core.transformers_models",
        "transformers_model",
        "transformers model",
        "TRANSFORMERS_MODEL_MAPPINGS",
        "model_id",
    ),
    Group(
        "mm_core.i2v_processors",
        "i2v_processor",
        "i2v processor",
        "I2V_PROCESSOR_MAPPINGS",
        "ae.i2v_processor.processor_id",
    ),
    Group("mm_core.datasets", "dataset", "dataset", "DATASET_MAPPINGS", "dataset_param.dataset_type"),
    Group("mm_core.pipelines", "pipeline", "pipeline", "PIPELINE_MAPPINGS", "pipeline_class"),
    Group("mm_core.tasks", "task", "task", "TASK_MAPPINGS", "task_id"),
    Group("mm_core.callbacks", "callback", "callback", "CALLBACK_MAPPINGS", "callbacks"),
)

# Companions of a component: their entries are named `role/id`, as in `predictor/wandit`.
_BY_COMPONENT = "the component's role and id"
_COMPANIONS = (
    Group("mm_core.configs", "config", "config class", None, _BY_COMPONENT),
    Group(
        "mm_core.sharding_policies",
        "sharding_policy",
        "sharding policy",
        "SHARDING_POLICY_MAPPINGS",
        _BY_COMPONENT,
    ),
    Group("mm_core.weights", "weights", "weights adapter", None, _BY_COMPONENT),
)

_HOOKS = Group(HOOKS, "hooks", "hooks module", None, "use of any id of the same distribution, or plugins")

ROLES: Mapping[str, Group] = MappingProxyType({group.role: group for group in _COMPONENTS})
GROUPS: Mapping[str, Group] = MappingProxyType(
    {group.name: group for group in (*_COMPONENTS, *_COMPANIONS, _HOOKS)}
)
COMPANION_GROUPS = frozenset(group.name for group in _COMPANIONS)
