"""What config classes say of a model's image conditions. Torch-free.

A predictor's class may have the properties `conditions`, names of the conditions that it takes -> whether it needs them,
and `given_frames`. A class of role i2v_processor may have `conditions`, names of what it makes; `given_frames`, which
frames it gives in training; and `switches`, what else it can make or give -> the key of its section that asks for it.
Without these nothing is checked. `condition_shapes(latents)` of a predictor's class, with `(C, T, H, W)` of the latents,
tells the shapes of the conditions of one sample, which `mm plan` needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig

Given = Literal["never", "may", "must"]


@dataclass(frozen=True, slots=True)
class GivenFrames:
    """Which frames of a video a network is given beside the text."""

    first: Given = "never"
    last: Given = "never"


def example_shapes(
    components: Mapping[str, ComponentConfig], latents: tuple[int, int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the conditions that the predictor of a job is given with one sample, by name.

    Args:
        components: of the job.
        latents: `(C, T, H, W)` of the sample.

    Raises:
        UserError: the predictor's config class has no `condition_shapes`, or leaves one out.
    """
    predictor, processor = components["predictor"], components.get("ae.i2v_processor")
    takes: Mapping[str, bool] = getattr(predictor.config, "conditions", None) or {}
    made = set() if processor is None else set(getattr(processor.config, "conditions", ()))
    names = [name for name, needed in takes.items() if needed or name in made]
    if not names:
        return {}
    told = getattr(predictor.config, "condition_shapes", None)
    shapes: Mapping[str, tuple[int, ...]] = told(latents) if callable(told) else {}
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise UserError(
            f"{predictor.label}: its config class does not tell the shape of {', '.join(unknown)}, which an example needs; "
            "give it a method condition_shapes"
        )
    return {name: shapes[name] for name in names}
