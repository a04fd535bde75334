"""Grouping of samples against the dataset whose samples are grouped."""

from __future__ import annotations

from collections.abc import Iterator

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding
from mm_core.config.origin import KeyPath

_LOADER: KeyPath = ("dataloader_param",)
_GROUPS = ("group_data", "group_frame", "group_resolution")


def check_groups(dataset: ComponentConfig | None, document: Document) -> Iterator[Finding]:
    """Samples can be grouped by size only where the dataset knows the sizes of its samples.

    Args:
        dataset: its config class says with `has_buckets` whether it does; one without that attribute may.
        document: the data file.
    """
    if dataset is None or getattr(dataset.config, "has_buckets", None) is not False:
        return
    keys: list[tuple[str, object, str]] = [(name, True, "Set it to false") for name in _GROUPS]
    keys.append(("sampler_type", "LengthGroupedSampler", "Use stateful_distributed_sampler"))
    for name, value, mend in keys:
        path = (*_LOADER, name)
        if document.has(path) and document.value(path) == value:
            text = f'samples of dataset_type "{dataset.model_id}" cannot be grouped by size'
            yield Finding.at(document.origin(path), "error", "no-buckets", text, path=path, suggestion=mend)
