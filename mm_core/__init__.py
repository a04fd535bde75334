"""MM Zoo's engine: it trains and runs models that come as pip packages, and knows no model family itself.

The mappings below are entry-point registries (`mm_registry.Registry`): `"wandit" in PREDICTOR_MODEL_MAPPINGS`
reads metadata only, `PREDICTOR_MODEL_MAPPINGS["wandit"]` imports that one class. `get_args()` returns the
arguments of the running job. Importing `mm_core` imports
neither torch nor any plugin.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's, which costs half of what `mm list` may take
if TYPE_CHECKING:
    from typing import Any

    from mm_core.config.args import get_args as get_args
    from mm_registry import Registry

    DIFFUSION_MODEL_MAPPINGS: Registry[Any]
    PREDICTOR_MODEL_MAPPINGS: Registry[Any]
    AE_MODEL_MAPPINGS: Registry[Any]
    TEXT_ENCODER_MAPPINGS: Registry[Any]
    TRANSFORMERS_MODEL_MAPPINGS: Registry[Any]
    I2V_PROCESSOR_MAPPINGS: Registry[Any]
    DATASET_MAPPINGS: Registry[Any]
    CHAT_TEMPLATE_MAPPINGS: Registry[Any]
    PIPELINE_MAPPINGS: Registry[Any]
    TASK_MAPPINGS: Registry[Any]
    CALLBACK_MAPPINGS: Registry[Any]
    SHARDING_POLICY_MAPPINGS: Registry[Any]

__version__ = "0.1.0"

_MAPPINGS = {
    "DIFFUSION_MODEL_MAPPINGS": "mm_core.diffusion_models",
    "PREDICTOR_MODEL_MAPPINGS": "mm_core.predictor_models",
    "AE_MODEL_MAPPINGS": "mm_core.ae_models",
    "TEXT_ENCODER_MAPPINGS": "mm_core.text_encoders",
    "TRANSFORMERS_MODEL_MAPPINGS": "mm_core.transformers_models",
    "I2V_PROCESSOR_MAPPINGS": "mm_core.i2v_processors",
    "DATASET_MAPPINGS": "mm_core.datasets",
    "CHAT_TEMPLATE_MAPPINGS": "mm_core.chat_templates",
    "PIPELINE_MAPPINGS": "mm_core.pipelines",
    "TASK_MAPPINGS": "mm_core.tasks",
    "CALLBACK_MAPPINGS": "mm_core.callbacks",
    "SHARDING_POLICY_MAPPINGS": "mm_core.sharding_policies",
}

__all__ = [  # built from the table above, so that the two cannot disagree
    *_MAPPINGS,
    "__version__",
    "get_args",
]


def __getattr__(name: str) -> Any:
    if name == "get_args":
        from mm_core.config.args import get_args

        globals()[name] = get_args
        return get_args
    group = _MAPPINGS.get(name)
    if group is None:
        raise AttributeError(f"module 'mm_core' has no attribute {name!r}")
    from mm_registry import Registry

    registry: Registry[Any] = Registry(group)
    globals()[name] = registry
    return registry


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
