"""What an autoencoder promises about its latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

AE = ("ae",)


@check("latents have latent_channels channels and the sizes of latent_shape", stage="build", roles=AE)
def encodes_to_its_latent_shape(case: Case) -> None:
    module: Any = builds.lively(case)
    with torch.no_grad():
        latents = builds.run(case, module, builds.inputs(case, batch=2))
    promised = [2, module.latent_channels, *module.latent_shape(*builds.video_size(case))]
    if list(latents.shape) != promised:
        raise CheckFailed(
            f"a video of {builds.video_size(case)} becomes latents {list(latents.shape)}, but latent_channels and "
            f"latent_shape promise {promised}"
        )


@check("latent_channels is a whole number, and latent_shape three of them", stage="build", roles=AE)
def latent_sizes_are_whole_numbers(case: Case) -> None:
    module: Any = builds.lively(case)
    found = [module.latent_channels, *module.latent_shape(*builds.video_size(case))]
    if len(found) != 4 or any(type(number) is not int or number < 1 for number in found):
        raise CheckFailed(f"latent_channels and latent_shape give {found}; they are four positive ints")


@check("decode brings latents back to a finite video of the size that was encoded", stage="build", roles=AE)
def decodes_to_the_video_shape(case: Case) -> None:
    module: Any = builds.lively(case)
    given = builds.inputs(case)
    with torch.no_grad():
        video = module.decode(builds.run(case, module, given))
    if not isinstance(video, torch.Tensor) or not video.is_floating_point():
        raise CheckFailed("decode does not return a tensor of floating-point numbers")
    if video.shape != given["video"].shape:
        raise CheckFailed(f"a video {list(given['video'].shape)} comes back as {list(video.shape)}")
    if not bool(video.isfinite().all()):
        raise CheckFailed("the decoded video has values that are not finite")


@check("decoding depends on the latents, sample by sample", stage="build", roles=AE)
def decoding_is_per_sample(case: Case) -> None:
    module: Any = builds.lively(case)
    frames, height, width = builds.video_size(case)
    shape = (module.latent_channels, *module.latent_shape(frames, height, width))
    latents = builds.samples(2, shape, 0, "latents")
    with torch.no_grad():
        both, alone = module.decode(latents.clone()), module.decode(latents[:1].clone())
    builds.must_be_close(both[:1], alone, 1e-4, "the first video is another one when a second is beside it")
    builds.must_differ(both[1:], both[:1], "different latents are decoded to the same video")


@check("a size is either encoded as latent_shape says, or refused with a UserError", stage="build", roles=AE)
def latent_shape_refuses_what_cannot_be_encoded(case: Case) -> None:
    from mm_registry.errors import UserError

    module: Any = builds.lively(case)
    sizes = _sizes_around(builds.video_size(case))
    refused = 0
    for size in sizes:
        try:
            promised = module.latent_shape(*size)
        except UserError:
            refused += 1
            continue
        except Exception as error:
            raise CheckFailed(
                f"latent_shape{size} raises {type(error).__name__} instead of mm_registry.errors.UserError: {error}"
            ) from error
        if min(size) < 1:
            raise CheckFailed(f"latent_shape{size} is {promised}, but there is no such video")
        video = builds.samples(1, (3, *size), 0, "video").tanh()
        try:
            with torch.no_grad():
                latents = builds.run(case, module, {"video": video})
                decoded = module.decode(latents)
        except Exception as error:
            raise CheckFailed(
                f"latent_shape{size} promises {promised}, but a video of that size raises {type(error).__name__}: "
                f"{str(error)[:160]}"
            ) from error
        if tuple(latents.shape[2:]) != tuple(promised):
            raise CheckFailed(
                f"latent_shape{size} promises {promised}, encode makes {tuple(latents.shape[2:])}"
            )
        if decoded.shape != video.shape:
            raise CheckFailed(
                f"latent_shape{size} accepts a video that is decoded to {tuple(decoded.shape[2:])}; refuse the size instead"
            )


@check("the config class knows latent_channels and the sizes as the module does", stage="build", roles=AE)
def config_agrees_with_the_module(case: Case) -> None:
    from mm_registry.errors import UserError

    config: Any = builds.section(case).config
    module: Any = builds.lively(case)
    channels = getattr(config, "latent_channels", None)
    ask = getattr(config, "size_problem", None)
    if channels is None and ask is None:
        raise CheckSkipped(
            "the config class has neither latent_channels nor size_problem (both are optional)"
        )
    if channels is not None and channels != module.latent_channels:
        raise CheckFailed(
            f"the config class says latent_channels {channels}, the module {module.latent_channels}"
        )
    if not callable(ask):
        return
    for size in _sizes_around(builds.video_size(case)):
        if min(size) < 1:
            continue  # the dataset's section refuses those
        problem, raised = ask(*size), None
        try:
            module.latent_shape(*size)
        except UserError as error:
            raised = error
        if (problem is None) != (raised is None):
            raise CheckFailed(
                f"for a video of {size} size_problem says {problem or 'nothing'}, latent_shape {raised or 'nothing'}"
            )


@check("latents are drawn with each sample's own generator", stage="build", roles=AE)
def sampling_is_keyed_per_sample(case: Case) -> None:
    module: Any = builds.lively(case)
    if not getattr(module, "do_sample", False):
        raise CheckSkipped("it draws nothing (no do_sample)")
    video = builds.inputs(case, batch=2)["video"]
    with torch.no_grad():
        both = module.encode(video.clone(), generator=builds.generators(2))
        alone = module.encode(video[1:].clone(), generator=builds.generators(1, first=1))
        other = module.encode(video.clone(), generator=builds.generators(2, seed=1))
        one = module.encode(video.clone(), generator=builds.generators(1)[0])
    builds.must_be_close(both[1:], alone, 1e-4, "a sample's latents depend on the generators of the others")
    builds.must_differ(other, both, "do_sample is true, but the generators change nothing")
    if one.shape != both.shape:
        raise CheckFailed("one generator for all samples gives latents of another shape than one a sample")


@check("in bf16 latents are finite and near those in fp32", stage="build", roles=AE)
def bf16_encoding_works(case: Case) -> None:
    module: Any = builds.as_module(builds.build(case))
    if not list(module.parameters()):
        raise CheckSkipped("it has no parameters")
    half: Any = builds.as_module(builds.build(case, dtype="bf16"))
    given = builds.inputs(case)
    with torch.no_grad():
        exact, rounded = builds.run(case, module, given), builds.run(case, half, given)
        video = half.decode(rounded)
    if not bool(rounded.isfinite().all()) or not bool(video.isfinite().all()):
        raise CheckFailed("in bf16 latents or video are not finite")
    error = float((rounded.float() - exact).norm() / exact.norm().clamp_min(1e-12))
    if error > 0.2:
        raise CheckFailed(f"in bf16 the latents are {error:.0%} away from those in fp32; normalise in fp32")


def _sizes_around(size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Sizes that may or may not fit: the example's, one more on each axis, a single frame, half, and nothing."""
    frames, height, width = size
    return [
        size,
        (frames + 1, height, width),
        (frames, height + 1, width),
        (frames, height, width + 1),
        (1, height, width),
        (frames, height // 2, width),
        (2 * frames - 1, height, 2 * width),
        (0, height, width),
        (frames, 0, width),
    ]
