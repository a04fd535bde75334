"""Weights: first values, Hugging Face folders in, distributed checkpoints in and out."""

from mm_core._lazy import lazy_exports

__all__ = [
    "CheckpointError",
    "LoadedFolder",
    "StateDictAdapter",
    "WeightsError",
    "complete_checkpoints",
    "find_adapter",
    "is_hf_folder",
    "latest_checkpoint",
    "load_checkpoint",
    "load_hf_folder",
    "load_module_weights",
    "materialize",
    "remove_temporaries",
    "resolve_load",
    "save_checkpoint",
    "save_hf_folder",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CheckpointError": "mm_core.weights.errors",
        "LoadedFolder": "mm_core.weights.hf_folder",
        "StateDictAdapter": "mm_core.weights.adapter",
        "WeightsError": "mm_core.weights.errors",
        "complete_checkpoints": "mm_core.weights.layout",
        "find_adapter": "mm_core.weights.adapter",
        "is_hf_folder": "mm_core.weights.hf_folder",
        "latest_checkpoint": "mm_core.weights.layout",
        "load_checkpoint": "mm_core.weights.checkpoint",
        "load_hf_folder": "mm_core.weights.hf_folder",
        "load_module_weights": "mm_core.weights.checkpoint",
        "materialize": "mm_core.weights.init",
        "remove_temporaries": "mm_core.weights.layout",
        "resolve_load": "mm_core.weights.layout",
        "save_checkpoint": "mm_core.weights.checkpoint",
        "save_hf_folder": "mm_core.weights.hf_save",
    },
)
