"""Components and how a model is composed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_core._lazy import lazy_exports

if TYPE_CHECKING:
    from mm_core.models.factory import build_component, build_sora_model
    from mm_core.models.sora import SoRAModel

__all__ = ["SoRAModel", "build_component", "build_sora_model"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "SoRAModel": "mm_core.models.sora",
        "build_component": "mm_core.models.factory",
        "build_sora_model": "mm_core.models.factory",
    },
)
