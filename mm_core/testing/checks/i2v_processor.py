"""What an image processor makes of given frames: conditions, each sample's its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

PROCESSOR = ("i2v_processor",)


@check(
    "it makes tensors of the names that its config class tells, a row for each sample",
    stage="build",
    roles=PROCESSOR,
)
def makes_the_promised_conditions(case: Case) -> None:
    """They become keyword arguments of the predictor, and `mm check` compares their names with what that takes."""
    made = _made(case, batch=2)
    promised = getattr(builds.section(case).config, "conditions", None)
    if promised is not None and made.keys() != set(promised):
        raise CheckFailed(
            f"it makes {', '.join(sorted(made)) or 'nothing'}, but its config class promises {', '.join(sorted(promised))}"
        )
    for name, value in made.items():
        if not value.is_floating_point() or value.shape[:1] != (2,) or not bool(value.isfinite().all()):
            raise CheckFailed(
                f"{name} of 2 videos is {list(value.shape)} of {value.dtype}; it must have a row for each, finite numbers"
            )
        if value.requires_grad:
            raise CheckFailed(f"{name} has a gradient; nothing before the predictor is trained")


@check(
    "a sample's conditions depend on its own video, not on its batch or on chance",
    stage="build",
    roles=PROCESSOR,
)
def conditions_are_per_sample(case: Case) -> None:
    """What is given is not drawn, so that stored conditions are those that training would make."""
    both, again = _made(case, batch=2), _made(case, batch=2)
    alone = _made(case, batch=1)
    for name, value in both.items():
        builds.must_be_close(value, again[name], 0.0, f"{name} is another one when it is made again")
        builds.must_be_close(
            value[:1], alone[name], 1e-4, f"{name} of a video depends on the other of its batch"
        )
        builds.must_differ(value[:1], value[1:], f"{name} is the same for two videos")


def _made(case: Case, batch: int) -> Mapping[str, Any]:
    """What it makes with the plugin's own autoencoder.

    Raises:
        CheckSkipped: the plugin has no example of one.
        CheckFailed: it makes no mapping of tensors, or changes what it is given.
    """
    from mm_core.testing.execute import make_case

    cases = [
        make_case(case.plugin, spec, case.folder, with_example=True)
        for spec in case.plugin.components
        if spec.group == "mm_core.ae_models"
    ]
    ae_case = next((other for other in cases if other.example is not None), None)
    if ae_case is None:
        raise CheckSkipped("its plugin has no ae with an example to try it with")
    ae: Any = builds.lively(ae_case)
    processor = builds.build(case)
    video = builds.inputs(ae_case, batch)["video"]
    with torch.no_grad():
        latents = ae.encode(video)
    before = [video.clone(), latents.clone()]
    made = processor(ae, video, latents, sample_index=torch.arange(batch))
    if not isinstance(made, Mapping) or not all(isinstance(value, torch.Tensor) for value in made.values()):
        raise CheckFailed(f"it makes a {type(made).__name__}, not a dict of tensors")
    if not all(torch.equal(*pair) for pair in zip(before, (video, latents), strict=True)):
        raise CheckFailed("it changes the video or the latents that it is given")
    return made
