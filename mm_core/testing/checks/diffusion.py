"""What a diffusion promises: noise, loss and sampling."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds, noising
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")
    noising = LazyModule("mm_core.testing.noising")

DIFFUSION = ("diffusion",)


@check("the factory builds it, and building changes no global setting", stage="build", roles=DIFFUSION)
def diffusion_builds(case: Case) -> None:
    from mm_core.models.protocols import Diffusion

    builds.component_class(case)
    before = builds.global_state()
    built = builds.build(case)
    if found := builds.changed(before, builds.global_state()):
        raise CheckFailed(f"building it changed {', '.join(found)}")
    wanted = [name for name in ("q_sample", "training_losses", "sample", "sigmas", "timesteps", "num_train_timesteps",
                                "guidance_scale") if not hasattr(built, name)]  # fmt: skip
    if wanted or not isinstance(built, Diffusion):
        raise CheckFailed(f"it lacks {', '.join(wanted)} of the Diffusion protocol")


@check("sigmas and timesteps are finite and descend", stage="build", roles=DIFFUSION)
def sigmas_and_timesteps_descend(case: Case) -> None:
    built = builds.build(case)
    for name in ("sigmas", "timesteps"):
        values = getattr(built, name)
        if not isinstance(values, torch.Tensor) or values.ndim != 1 or len(values) < 1:
            raise CheckFailed(f"{name} is no tensor of one axis")
        values = values.double()
        if not bool(values.isfinite().all()):
            raise CheckFailed(f"{name} has values that are not finite")
        if bool((values.diff() > 0).any()):
            raise CheckFailed(f"{name} ascends somewhere; both run from noise to data")


@check("q_sample returns noised latents, noise and one timestep a sample", stage="build", roles=DIFFUSION)
def q_sample_shapes(case: Case) -> None:
    built, latents = noising.trained(case), noising.latents(case, 3)
    result = built.q_sample(latents.clone(), generator=builds.generators(3))
    if not isinstance(result, tuple) or len(result) != 3:
        raise CheckFailed("q_sample does not return (noised latents, noise, timesteps)")
    noised, noise, t = result
    for name, value in (("noised latents", noised), ("noise", noise)):
        if value.shape != latents.shape or not value.is_floating_point():
            raise CheckFailed(
                f"{name} are {list(value.shape)} {value.dtype} for latents {list(latents.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise CheckFailed(f"{name} have values that are not finite")
    if t.shape != (3,):
        raise CheckFailed(f"timesteps have the shape {list(t.shape)} for 3 samples; each sample has its own")


@check("timesteps that are drawn lie on the scheduler's range, and samples get different ones",
       stage="build", roles=DIFFUSION)  # fmt: skip
def drawn_timesteps_are_valid(case: Case) -> None:
    built = noising.trained(case)
    _, _, t = built.q_sample(noising.latents(case, 16), generator=builds.generators(16))
    lowest, highest = sorted((float(built.timesteps.min()), float(built.timesteps.max())))
    if not (lowest - 1e-3 <= float(t.min()) and float(t.max()) <= highest + 1e-3):
        raise CheckFailed(
            f"timesteps {float(t.min()):g} to {float(t.max()):g} are drawn, outside {lowest:g} to {highest:g}"
        )
    if len(set(t.tolist())) == 1 and len(set(built.timesteps.tolist())) > 1:
        raise CheckFailed("16 samples all get the same timestep; each sample has its own")


@check("noise and timesteps that are given are used", stage="build", roles=DIFFUSION)
def given_noise_and_timesteps_are_used(case: Case) -> None:
    built, latents = noising.trained(case), noising.latents(case, 2)
    noise, t = builds.samples(2, latents.shape[1:], 5, "noise"), noising.middle(built, 2)
    noised, returned, times = built.q_sample(latents.clone(), noise=noise.clone(), t=t.clone())
    if not torch.equal(returned.to(noise.dtype), noise):
        raise CheckFailed("q_sample was given noise, and returns other noise")
    if not torch.allclose(times.double(), t.double()):
        raise CheckFailed(f"q_sample was given timesteps {t.tolist()}, and returns {times.tolist()}")
    again, _, _ = built.q_sample(latents.clone(), noise=noise.clone(), t=t.clone())
    if not torch.equal(noised, again):
        raise CheckFailed("the same latents, noise and timesteps give other noised latents the second time")
    other, _, _ = built.q_sample(latents.clone(), noise=-noise, t=t.clone())
    builds.must_differ(other, noised, "the noise that is given does not change the noised latents")


@check("a higher timestep has more noise", stage="build", roles=DIFFUSION)
def noise_grows_with_the_timestep(case: Case) -> None:
    built, latents = noising.trained(case), noising.latents(case, 2)
    noise = builds.samples(2, latents.shape[1:], 5, "noise")
    grid = built.timesteps
    shares = []
    for index in (0, len(grid) // 2, len(grid) - 1):
        noised, _, _ = built.q_sample(latents.clone(), noise=noise.clone(), t=grid[index].expand(2).clone())
        shares.append(float((noised.double() * noise.double()).sum() / noise.double().square().sum()))
    if not shares[0] > shares[1] > shares[2]:
        shown = ", ".join(f"{share:.3f}" for share in shares)
        raise CheckFailed(
            f"the share of noise at the first, middle and last timestep is {shown}; it must go down"
        )


@check("noise and timestep of a sample come from its own generator", stage="build", roles=DIFFUSION)
def noising_is_keyed_per_sample(case: Case) -> None:
    built, latents = noising.trained(case), noising.latents(case, 3)
    before = builds.global_state()
    _, noise, t = built.q_sample(latents.clone(), generator=builds.generators(3))
    if found := builds.changed(before, builds.global_state()):
        raise CheckFailed(f"with generators given, q_sample draws from {', '.join(found)} all the same")
    _, own_noise, own_t = built.q_sample(latents[2:].clone(), generator=builds.generators(1, first=2))
    if not torch.equal(own_t, t[2:]):
        raise CheckFailed(
            f"the third sample's timestep is {t[2]:g} in a batch and {own_t[0]:g} alone, with the same generator; micro "
            "batch and rank would change it"
        )
    if not torch.equal(own_noise, noise[2:]):
        raise CheckFailed(
            "the third sample's noise is another one alone than in a batch, with the same generator"
        )


@check("q_sample leaves its inputs as they were", stage="build", roles=DIFFUSION)
def noising_modifies_no_input(case: Case) -> None:
    built, latents = noising.trained(case), noising.latents(case, 2)
    noise, t = builds.samples(2, latents.shape[1:], 5, "noise"), noising.middle(built, 2)
    given = (latents, noise, t)
    before = [value.clone() for value in given]
    noised, noise, t = built.q_sample(latents, noise=noise, t=t)
    built.training_losses(torch.zeros_like(noised), latents, noised, noise, t)
    if not all(torch.equal(a, b) for a, b in zip(before, given, strict=True)):
        raise CheckFailed("q_sample or training_losses changes latents, noise or timesteps in place")


@check(
    "training_losses is one finite fp32 loss a sample, and the sample's own", stage="build", roles=DIFFUSION
)
def losses_are_per_sample(case: Case) -> None:
    built = noising.trained(case)
    x, noised, noise, t = noising.noised(case, built, 3)
    output = builds.samples(3, x.shape[1:], 6, "output")
    losses = built.training_losses(output, x, noised, noise, t)
    if losses.shape != (3,) or losses.dtype is not torch.float32:
        raise CheckFailed(f"losses of 3 samples are {list(losses.shape)} {losses.dtype}, not [3] float32")
    if not bool(losses.isfinite().all()) or bool((losses < 0).any()):
        raise CheckFailed(f"losses are {losses.tolist()}")
    half = built.training_losses(output.bfloat16(), x, noised, noise, t)
    if half.dtype is not torch.float32:
        raise CheckFailed(f"a bf16 prediction has losses in {half.dtype}; the loss is computed in fp32")
    other = output.clone()
    other[2] = -other[2]
    changed = built.training_losses(other, x, noised, noise, t)
    builds.must_be_close(
        changed[:2], losses[:2], 1e-6, "another output of the third sample changes the others' losses"
    )
    builds.must_differ(changed[2:], losses[2:], "the loss does not depend on the output")


@check("there is an output with loss zero, and the gradient leads there", stage="build", roles=DIFFUSION)
def loss_is_zero_at_its_target(case: Case) -> None:
    built = noising.trained(case)
    x, noised, noise, t = noising.noised(case, built, 2)
    zero = torch.zeros_like(x)
    at_zero = built.training_losses(zero, x, noised, noise, t)
    best = noising.best_output(built, x, noised, noise, t)
    losses = built.training_losses(best, x, noised, noise, t)
    if bool((losses > 1e-4 * at_zero.clamp_min(1e-6)).any()):
        raise CheckFailed(
            f"the least loss that the kit finds is {losses.max():.3g} (an output of zeros has {at_zero.max():.3g}); a "
            "perfect prediction has loss 0"
        )


@check("sample() keeps the shape, is finite and calls the denoiser with one descending timestep a sample",
       stage="build", roles=DIFFUSION)  # fmt: skip
def samples_with_a_toy_denoiser(case: Case) -> None:
    built, latents = builds.build(case), noising.latents(case, 2)
    denoiser = noising.ToyDenoiser()
    progress: list[tuple[int, int]] = []
    result = built.sample(
        denoiser,
        latents.clone(),
        {},
        steps=4,
        generator=builds.generators(2),
        progress=lambda *at: progress.append(at),
    )
    if result.shape != latents.shape or not bool(result.isfinite().all()):
        raise CheckFailed(
            f"noise {list(latents.shape)} becomes {list(result.shape)}, or values that are not finite"
        )
    if result.dtype is not torch.float32:
        raise CheckFailed(f"samples are {result.dtype}; they are integrated in fp32")
    wrong = next((list(t.shape) for t in denoiser.timesteps if t.shape != (2,)), None)
    if wrong is not None:
        raise CheckFailed(
            f"the predictor is called with timesteps of the shape {wrong} for 2 samples, not [2]"
        )
    values = [float(t[0]) for t in denoiser.timesteps]
    if not values or values != sorted(values, reverse=True):
        raise CheckFailed(
            f"the predictor is called at timesteps {[round(v, 1) for v in values]}; they must descend"
        )
    if not progress or progress[-1][0] != progress[-1][1]:
        raise CheckFailed(
            f"progress ends with {progress[-1] if progress else 'no call'}, not with all steps done"
        )


@check("sample() gives the same bits again, and a sample does not depend on its batch",
       stage="build", roles=DIFFUSION)  # fmt: skip
def sampling_is_reproducible(case: Case) -> None:
    built, latents = builds.build(case), noising.latents(case, 2)
    before = builds.global_state()

    def draw(rows: slice) -> Any:
        generators = builds.generators(2)[rows]
        return built.sample(noising.ToyDenoiser(), latents[rows].clone(), {}, steps=4, generator=generators)

    both, again, alone = draw(slice(0, 2)), draw(slice(0, 2)), draw(slice(1, 2))
    if found := builds.changed(before, builds.global_state()):
        raise CheckFailed(f"with generators given, sample draws from {', '.join(found)} all the same")
    if not torch.equal(both, again):
        raise CheckFailed("the same noise and generators give another result the second time")
    builds.must_be_close(both[1:], alone, 1e-5, "the second sample is another one when it is drawn alone")


@check("guidance moves away from the unconditional prediction", stage="build", roles=DIFFUSION)
def guidance_is_applied(case: Case) -> None:
    built, latents = builds.build(case), noising.latents(case, 2)

    def draw(**arguments: Any) -> Any:
        return built.sample(
            noising.ToyDenoiser(),
            latents.clone(),
            {"scale": 0.5},
            steps=3,
            generator=builds.generators(2),
            **arguments,
        )

    unconditional = {"scale": 0.1}
    plain, strong = draw(), draw(uncond_kwargs=unconditional, guidance=4.0)
    varying = draw(uncond_kwargs=unconditional, guidance=lambda t: 4.0)
    builds.must_differ(strong, plain, "guidance 4 gives the same as no guidance")
    builds.must_be_close(
        varying, strong, 1e-6, "a guidance function that returns 4 gives another result than guidance 4"
    )


@check("it can be pickled, and the copy noises alike", stage="build", roles=DIFFUSION)
def diffusion_pickles(case: Case) -> None:
    built, latents = builds.build(case), noising.latents(case, 2)
    try:
        other = pickle.loads(pickle.dumps(built))
    except Exception as error:
        raise CheckFailed(f"pickle raises {type(error).__name__}: {str(error)[:200]}") from error
    for name in ("sigmas", "timesteps"):
        if not torch.equal(getattr(built, name), getattr(other, name)):
            raise CheckFailed(f"the copy has other {name}")
    drawn = [
        one.sample(noising.ToyDenoiser(), latents.clone(), {}, steps=2, generator=builds.generators(2))
        for one in (built, other)
    ]
    if not torch.equal(*drawn):
        raise CheckFailed("the copy samples otherwise")


@check(
    "sampling without a number of steps is refused where there is no default", stage="build", roles=DIFFUSION
)
def missing_steps_are_a_user_error(case: Case) -> None:
    from mm_registry.errors import UserError

    built = builds.build(case)
    try:
        result = built.sample(noising.ToyDenoiser(), noising.latents(case, 1), {})
    except UserError:
        return
    except Exception as error:
        raise CheckFailed(
            f"sample() without steps raises {type(error).__name__} instead of mm_registry.errors.UserError: {error}"
        ) from error
    if not isinstance(result, torch.Tensor):
        raise CheckSkipped("sample() returned no tensor; another check says so")
