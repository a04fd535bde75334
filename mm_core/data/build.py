"""Building the dataset that a job names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mm_registry.manager import default_manager

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig


def build_dataset(component: ComponentConfig, seed: int) -> Any:
    """Build the dataset of a checked job: its class is called with the section's fields.

    A class that declares a `seed` parameter gets the run's seed. (For a section in hand,
    `DATASET_MAPPINGS["t2v"](**fields)` does the same.)

    Raises:
        DataError: what the dataset says about its data.
        RegistryError: the class cannot be imported.
    """
    dataset_class: Any = default_manager().load(component.spec)
    declared = inspect.signature(dataset_class).parameters
    keyed = {"seed": seed} if "seed" in declared and "seed" not in component.fields else {}
    return dataset_class(**component.fields, **keyed)
