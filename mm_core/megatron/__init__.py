"""The only package that knows Megatron-Core and MindSpeed. Both are optional; importing this imports neither, nor torch."""

from mm_core._lazy import lazy_exports

_EXPORTS = {
    "INSTALL": "mm_core.megatron.installed",
    "describe": "mm_core.megatron.installed",
    "destroy_parallel_state": "mm_core.megatron.parallel",
    "initialize_parallel_state": "mm_core.megatron.parallel",
    "megatron_available": "mm_core.megatron.installed",
    "megatron_module": "mm_core.megatron.installed",
    "megatron_training_available": "mm_core.megatron.installed",
    "mindspeed_available": "mm_core.megatron.installed",
    "transformer_config": "mm_core.megatron.transformer",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
