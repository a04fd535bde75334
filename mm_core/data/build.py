"""Building the dataset that a job names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mm_registry.manager import default_manager

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig


def build_dataset(component: ComponentConfig, seed: int, sequence_length: int | None = None) -> Any:
    """Build the dataset of a checked job: its class is called with the section's fields.

    A class that declares a `seed` or a `sequence_length` parameter gets the run's. (For a section in hand,
    `DATASET_MAPPINGS["t2v"](**fields)` does the same.)

    Args:
        sequence_length: tokens of a sequence, `--seq-length`; None: not said.

    Raises:
        DataError: what the dataset says about its data.
        RegistryError: the class cannot be imported.
    """
    dataset_class: Any = default_manager().load(component.spec)
    declared = inspect.signature(dataset_class).parameters
    run = {"seed": seed, "sequence_length": sequence_length}
    given = {name: value for name, value in run.items() if name in declared and name not in component.fields}
    return dataset_class(**component.fields, **given)
