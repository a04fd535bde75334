"""The entry-point groups that a plugin can declare: what each holds, and which key of a configuration chooses
from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

PREFIX = "mm_core."
HOOKS = "mm_core.hooks"
ALIASES = "mm_core.aliases"
FAREWELLS = "mm_core.farewells"
PROVIDERS = "mm_core.providers"
EXAMPLES = "mm_core.examples"


class Group(NamedTuple):
    """One entry-point group.

    Attributes:
        name: as written in a plugin's pyproject.toml, `"mm_core.predictor_models"`.
        role: short name of what an entry is; the part before the slash in the names of companions,
            `"predictor"`.
        noun: the same for messages.
        mapping: name of the registry in `mm_core`; None if there is none.
        chosen_by: the key of a configuration whose value is the id, or a list of ids.
        has_targets: whether values name something to import; the values of the others are facts about ids.
        contested: whether two distributions with the same entry get into each other's way.
    """

    name: str
    role: str
    noun: str
    mapping: str | None
    chosen_by: str
    has_targets: bool = True
    contested: bool = True

    @property
    def is_component(self) -> bool:
        """Whether entries are named by an id of their own, rather than `role/id` (companions, facts about
        ids) or anything (hooks).
        """
        return self.role in ROLES

    @property
    def by_role(self) -> bool:
        """Whether entries are named `role/id`."""
        return self.name in BY_ROLE


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
    Group(
        "mm_core.chat_templates",
        "chat_template",
        "chat template",
        "CHAT_TEMPLATE_MAPPINGS",
        "dataset_param.basic_parameters.template",
    ),
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
    Group(EXAMPLES, "example", "example", None, "the conformance kit"),
)

# What a distribution says about ids, named `role/id` as well; nothing is imported for it.
_FACTS = (
    Group(ALIASES, "alias", "alias", None, "use of the old id", has_targets=False),
    Group(FAREWELLS, "farewell", "farewell", None, "use of a dropped id", has_targets=False, contested=False),
    Group(
        PROVIDERS,
        "provider",
        "known provider",
        None,
        "use of an unknown id",
        has_targets=False,
        contested=False,
    ),
)

_HOOKS = Group(
    HOOKS,
    "hooks",
    "hooks module",
    None,
    "use of any id of the same distribution, or plugins",
    contested=False,
)

ROLES: Mapping[str, Group] = MappingProxyType({group.role: group for group in _COMPONENTS})
GROUPS: Mapping[str, Group] = MappingProxyType(
    {group.name: group for group in (*_COMPONENTS, *_COMPANIONS, *_FACTS, _HOOKS)}
)
COMPANION_GROUPS = frozenset(group.name for group in _COMPANIONS)
BY_ROLE = frozenset(group.name for group in (*_COMPANIONS, *_FACTS))


def id_key(group: str, id: str) -> str:
    """Return the name of an id across groups, `"predictor/wandit"`: what companions are named by, and what
    `prefer` settles. That of a companion has its own role in front, `"config/predictor/wandit"`; that of an
    alias is the old id's, which it contests.
    """
    return id if group == ALIASES else f"{GROUPS[group].role}/{id}"
