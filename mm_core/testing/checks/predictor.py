"""What a predictor computes: shapes, dtypes, conditions, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

PREDICTOR = ("predictor",)


@check("forward returns latents of the shape that it was given, as a tensor", stage="build", roles=PREDICTOR)
def predicts_the_latents_shape(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        output = builds.run(case, module, given)
    if output.shape != given["latents"].shape:
        raise CheckFailed(f"latents {list(given['latents'].shape)} become {list(output.shape)}")


@check("other numbers of frames, rows and samples work", stage="build", roles=PREDICTOR)
def other_sizes_work(case: Case) -> None:
    from mm_registry.errors import UserError

    module = builds.lively(case)
    _, *sizes = builds.latent_size(case)
    for axis, batch in ((0, 1), (1, 3), (2, 1)):
        given = builds.inputs(case, batch)
        repeats = [1, 1, *(2 if i == axis else 1 for i in range(len(sizes)))]
        given["latents"] = given["latents"].repeat(repeats)
        shape = list(given["latents"].shape)
        try:
            with torch.no_grad():
                output = builds.run(case, module, given)
        except UserError:
            continue  # it says what it cannot do
        except Exception as error:
            raise CheckFailed(
                f"latents {shape} raise {type(error).__name__}: {str(error)[:160]}; "
                "a size that it cannot take is a mm_registry.errors.UserError"
            ) from error
        if list(output.shape) != shape:
            raise CheckFailed(f"latents {shape} become {list(output.shape)}")


@check("fp32 parameters and inputs give fp32", stage="build", roles=PREDICTOR)
def fp32_stays_fp32(case: Case) -> None:
    with torch.no_grad():
        output = builds.run(case, builds.lively(case), builds.inputs(case))
    if output.dtype is not torch.float32:
        raise CheckFailed(f"the output is {output.dtype}")


@check(
    "bf16 parameters work, with latents in bf16 and in fp32, and stay near fp32",
    stage="build",
    roles=PREDICTOR,
)
def bf16_parameters_work(case: Case) -> None:
    from mm_core.models.precision import cast_parameters

    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        exact = builds.run(case, module, builds.copied(given))
        cast_parameters(module, torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32):
            changes = {name: given[name].to(dtype) for name in ("latents", "prompt")}
            try:
                output = builds.run(case, module, builds.copied(given, **changes))
            except RuntimeError as error:
                raise CheckFailed(
                    f"with bf16 parameters, latents and prompt in {dtype} raise: {str(error)[:200]}; samplers keep "
                    "latents in fp32, so cast them to the parameters' dtype"
                ) from error
            if not output.is_floating_point() or not bool(output.isfinite().all()):
                raise CheckFailed(f"with bf16 parameters and {dtype} latents the output is not finite")
            error_norm = float((output.float() - exact).norm() / exact.norm().clamp_min(1e-12))
            if error_norm > 0.1:
                raise CheckFailed(
                    f"with bf16 parameters and {dtype} latents the output is {error_norm:.0%} away from fp32's"
                )


@check("each sample's own timestep changes its prediction, and only its own", stage="build", roles=PREDICTOR)
def timesteps_are_per_sample(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    other = given["timestep"].clone()
    other[1] = 1000 - other[1]
    _only_the_second_changes(case, module, given, "timestep", other)


@check("each sample's own prompt changes its prediction, and only its own", stage="build", roles=PREDICTOR)
def prompt_matters(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    other = given["prompt"].clone()
    other[1] = other[1].flip(-1)
    _only_the_second_changes(case, module, given, "prompt", other)


@check("each sample's own latents change its prediction, and only its own", stage="build", roles=PREDICTOR)
def latents_matter(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    other = given["latents"].clone()
    other[1] = -other[1]
    _only_the_second_changes(case, module, given, "latents", other)


def _only_the_second_changes(
    case: Case, module: torch.nn.Module, given: builds.Inputs, name: str, other: torch.Tensor
) -> None:
    with torch.no_grad():
        before = builds.run(case, module, builds.copied(given))
        after = builds.run(case, module, builds.copied(given, **{name: other}))
    builds.must_be_close(
        after[:1], before[:1], 1e-5, f"another {name} of the second sample changes the first one's prediction"
    )
    builds.must_differ(after[1:], before[1:], f"the prediction does not depend on the {name}")


@check("what stands behind the prompt's mask does not matter", stage="build", roles=PREDICTOR)
def prompt_mask_is_respected(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    mask = given.get("prompt_mask")
    if mask is None:
        raise CheckSkipped("forward declares no prompt_mask")
    other = torch.where(mask.unsqueeze(-1) > 0, given["prompt"], 100 + 10 * given["prompt"])
    shorter = mask.clone()
    shorter[1, 1:] = 0
    with torch.no_grad():
        before = builds.run(case, module, builds.copied(given))
        after = builds.run(case, module, builds.copied(given, prompt=other))
        masked = builds.run(case, module, builds.copied(given, prompt_mask=shorter))
    builds.must_be_close(after, before, 1e-5, "prompt embeddings behind the mask change the prediction")
    builds.must_differ(masked[1:], before[1:], "a shorter mask changes nothing: prompt_mask is not used")


@check("a prompt in a list of one (one text encoder) is the same prompt", stage="build", roles=PREDICTOR)
def prompt_list_of_one_works(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    listed = {name: [value] if name.startswith("prompt") else value for name, value in given.items()}
    with torch.no_grad():
        expected = builds.run(case, module, builds.copied(given))
        try:
            found = builds.run(case, module, listed)
        except Exception as error:
            raise CheckFailed(
                f"prompt=[tensor] raises {type(error).__name__}: {str(error)[:160]}; it is a list with one tensor a "
                "text encoder where a model has several"
            ) from error
    builds.must_be_close(found, expected, 0.0, "prompt=[tensor] gives another result than prompt=tensor")


@check("an unknown condition is refused, not swallowed", stage="build", roles=PREDICTOR)
def unknown_condition_is_refused(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    try:
        with torch.no_grad():
            builds.run(case, module, {**given, "no_such_condition": given["latents"].clone()})
    except Exception as error:
        if "no_such_condition" not in str(error):
            raise CheckFailed(
                f"the error does not name the condition: {type(error).__name__}: {error}"
            ) from error
        return
    raise CheckFailed(
        "forward(…, no_such_condition=…) is accepted; whoever passes a condition that the network does not have would "
        "train without it: raise TypeError"
    )


@check("gradients reach every trainable parameter and are finite", stage="build", roles=PREDICTOR)
def gradients_reach_every_parameter(case: Case) -> None:
    module = builds.lively(case).train()
    builds.forward_loss(case, module, builds.inputs(case)).backward()
    trained = [(name, p.grad) for name, p in module.named_parameters() if p.requires_grad]
    if not trained:
        raise CheckFailed("no parameter is trainable")
    _none_of([name for name, grad in trained if grad is None], "get no gradient")
    _none_of([name for name, grad in trained if grad is not None and not bool(grad.isfinite().all())],
             "get a gradient that is not finite")  # fmt: skip
    _none_of([name for name, grad in trained if grad is not None and not bool(grad.any())],
             "get a gradient of zeros")  # fmt: skip


def _none_of(names: list[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise CheckFailed(f"{len(names)} parameters {what}: {', '.join(names[:4])}{more}")


@check("gradients equal finite differences along a random direction", stage="build", roles=PREDICTOR)
def gradients_are_right(case: Case) -> None:
    module = builds.lively(case).double()
    given = builds.inputs(case)
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    try:
        loss = _double_loss(case, module, given)
    except (RuntimeError, TypeError) as error:
        raise CheckSkipped(f"it does not compute in float64: {str(error)[:120]}") from error
    loss.backward()
    parameters = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    directions = [builds.samples(1, p.shape, 3, f"direction {name}")[0].double() for name, p in parameters]
    slope = sum(float((p.grad * d).sum()) for (_, p), d in zip(parameters, directions, strict=True))
    step, values = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):  # ahead, then behind
            for (_, p), d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(_double_loss(case, module, given)))
    found = (values[0] - values[1]) / (2 * step)
    # Networks compute parts in fp32 on purpose, so the loss has some seven digits.
    if abs(found - slope) > 0.02 * max(abs(found), abs(slope)) + 2e-3:
        raise CheckFailed(
            f"the loss changes by {found:.6g} along a direction for which its gradient says {slope:.6g}"
        )


def _double_loss(case: Case, module: torch.nn.Module, given: builds.Inputs) -> torch.Tensor:
    output = builds.run(case, module, given).double()
    target = builds.samples(len(output), output.shape[1:], 1, "target").double()
    return (output - target).square().mean()


@check("the loss goes down in a few AdamW steps on one batch", stage="build", roles=PREDICTOR)
def learns(case: Case) -> None:
    module, given = builds.trainable(case).train(), builds.inputs(case)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        loss = builds.forward_loss(case, module, builds.copied(given))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not losses[-1] < 0.999 * losses[0]:
        raise CheckFailed(f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses)} steps")
