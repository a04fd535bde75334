"""Video data: annotations, decoding, transforms, captions, and the one global order of samples."""

from mm_core._lazy import lazy_exports

_EXPORTS = {
    "DataError": "mm_core.data.errors",
    "T2VDataset": "mm_core.data.t2v",
    "UnreadableSampleError": "mm_core.data.errors",
    "build_dataset": "mm_core.data.build",
    "build_loader": "mm_core.data.loader",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
