"""What is asked of every component that is a module: predictors, autoencoders, text encoders."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

MODULES = ("predictor", "ae", "text_encoder", "transformers_model")
FROZEN = ("ae", "text_encoder")


@check("the factory builds it at the example's size, as a torch.nn.Module", stage="build", roles=MODULES)
def builds_a_module(case: Case) -> None:
    builds.as_module(builds.build(case))


@check("building it changes none of torch's global settings", stage="build", roles=MODULES)
def build_changes_no_global_setting(case: Case) -> None:
    builds.component_class(case)  # its import is judged by another check
    before = builds.global_switches()
    builds.build(case)
    if found := builds.changed(before, builds.global_switches()):
        raise CheckFailed(f"building it changed {', '.join(found)} for the whole process")


@check("parameters are fp32 as built, so that they can be master weights", stage="build", roles=MODULES)
def parameters_are_fp32(case: Case) -> None:
    module = builds.as_module(builds.build(case))
    wrong = [
        f"{name} is {parameter.dtype}"
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype is not torch.float32
    ]
    if wrong and builds.section(case).dtype in (None, "fp32"):
        raise CheckFailed(f"{_listed(wrong)}; the core casts, the constructor leaves torch's default dtype")


@check("no two tensors share memory unless they are one tied parameter", stage="build", roles=MODULES)
def no_tensor_is_shared_by_accident(case: Case) -> None:
    module = builds.as_module(builds.build(case))
    owner: dict[int, tuple[str, Any]] = {}
    shared = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.numel() == 0:
            continue
        first = owner.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor))
        if first[1] is not tensor:
            shared.append(f"{name} with {first[0]}")
    if shared:
        raise CheckFailed(
            f"different tensors lie in one memory: {_listed(shared)}; they could not be sharded or stored apart"
        )


@check(
    "train() and eval() reach every part and return the module",
    stage="build",
    roles=("predictor", "transformers_model"),
)
def train_and_eval_reach_every_part(case: Case) -> None:
    module = builds.as_module(builds.build(case))
    for mode in (False, True):
        returned: Any = module.train(mode)
        if returned is not module:
            raise CheckFailed(f"train({mode}) returns {type(returned).__name__}, not the module itself")
        odd = [name or "itself" for name, part in module.named_modules() if part.training is not mode]
        if odd:
            raise CheckFailed(f"after train({mode}) these parts are in the other mode: {_listed(odd)}")


@check("the factory hands it out frozen and in eval mode", stage="build", roles=FROZEN)
def comes_frozen_and_in_eval_mode(case: Case) -> None:
    module = builds.as_module(builds.build(case))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if trained:
        raise CheckFailed(f"requires_grad_(False) leaves parameters trainable: {_listed(trained)}")
    training = [name or "itself" for name, part in module.named_modules() if part.training]
    if training:
        raise CheckFailed(f"eval() leaves parts in training mode: {_listed(training)}")


@check("random weights are the same in every build and take nothing from the global generator",
       stage="build", roles=FROZEN)  # fmt: skip
def random_weights_are_the_same_everywhere(case: Case) -> None:
    if builds.section(case).init != "random" or not list(builds.as_module(builds.build(case)).parameters()):
        raise CheckSkipped("it has no random weights")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = builds.global_state()
        states.append(builds.as_module(builds.build(case)).state_dict())
        if found := builds.changed(before, builds.global_state()):
            raise CheckFailed(f"building it changed {', '.join(found)}")
    for name, value in states[0].items():
        if not torch.equal(value, states[1][name]):
            raise CheckFailed(
                f"{name} has other values in a second build; training and generation would meet different encoders"
            )


@check("from_pretrained with a missing folder is an error that names the folder", stage="build", roles=FROZEN)
def missing_folder_is_a_user_error(case: Case) -> None:
    from dataclasses import replace

    from mm_core.models.factory import build_component
    from mm_registry.errors import UserError

    if not hasattr(builds.component_class(case), "from_pretrained"):
        raise CheckSkipped("it has no from_pretrained")
    # What describes a random network does not stand beside a folder.
    given = {name: value for name, value in builds.section(case).fields.items() if name != "config"}
    missing = str(case.folder / "no-such-weights")
    component = replace(builds.section(case), init="pretrained", from_pretrained=missing, fields=given)
    try:
        build_component(component)
    except UserError as error:
        if "no-such-weights" not in str(error):
            raise CheckFailed(f"the message does not name the folder: {error}") from error
    except Exception as error:
        raise CheckFailed(
            f"it raises {type(error).__name__} instead of mm_registry.errors.UserError: {str(error)[:200]}"
        ) from error
    else:
        raise CheckFailed("a folder that does not exist is accepted; it would run with random weights")


@check("in eval mode the same inputs give the same bits", stage="build", roles=MODULES)
def eval_is_deterministic(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        torch.manual_seed(0)
        first = builds.run(case, module, builds.copied(given))
        torch.manual_seed(1)
        second = builds.run(case, module, builds.copied(given))
    if not torch.equal(first, second):
        raise CheckFailed("two calls with the same inputs in eval mode give different values")


@check("in eval mode a call draws nothing from the global generators", stage="build", roles=MODULES)
def eval_leaves_generators_alone(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        builds.run(case, module, builds.copied(given))  # lazy imports of the first call may seed something
        before = builds.global_state()
        builds.run(case, module, builds.copied(given))
        found = builds.changed(before, builds.global_state())
    if found:
        raise CheckFailed(f"a call in eval mode changed {', '.join(found)}")


@check("a call prints nothing", stage="build", roles=MODULES)
def prints_nothing(case: Case) -> None:
    printed = io.StringIO()
    with torch.no_grad(), contextlib.redirect_stdout(printed):
        builds.run(case, builds.lively(case), builds.inputs(case))
    if printed.getvalue():
        raise CheckFailed(f"building and calling it prints {printed.getvalue()[:80]!r}; use logging")


@check("a call leaves its inputs as they were", stage="build", roles=MODULES)
def inputs_are_not_modified(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    before = builds.copied(given)
    with torch.no_grad():
        builds.run(case, module, given)
    changed = [name for name, value in before.items() if not torch.equal(value, given[name])]
    if changed:
        raise CheckFailed(f"the call changes its input in place: {', '.join(changed)}")


@check("strided inputs give the same result as contiguous ones", stage="build", roles=MODULES)
def strided_inputs_work(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    # Same values, another order in memory: the last two axes are swapped there.
    strided = {
        name: value.transpose(-1, -2).contiguous().transpose(-1, -2) if value.ndim > 1 else value
        for name, value in given.items()
    }
    with torch.no_grad():
        expected = builds.run(case, module, builds.copied(given))
        try:
            found = builds.run(case, module, strided)
        except RuntimeError as error:
            raise CheckFailed(f"it needs contiguous inputs: {str(error)[:200]} (use reshape)") from error
    builds.must_be_close(found, expected, 1e-4, "strided inputs give another result than contiguous ones")


@check("a sample's result does not depend on the other samples of the batch", stage="build", roles=MODULES)
def samples_are_independent(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case, batch=2)
    with torch.no_grad():
        both = builds.run(case, module, builds.copied(given))
        alone = builds.run(case, module, builds.copied(builds.part(given, slice(0, 1))))
    builds.must_be_close(
        both[:1], alone, 1e-4, "the first sample's result is another one when a second is beside it"
    )


@check("values are finite", stage="build", roles=MODULES)
def output_is_finite(case: Case) -> None:
    with torch.no_grad():
        result = builds.run(case, builds.lively(case), builds.inputs(case))
    if not result.is_floating_point():
        raise CheckFailed(f"the result is {result.dtype}, not a floating-point number")
    if not bool(result.isfinite().all()):
        raise CheckFailed(f"{int((~result.isfinite()).sum())} of {result.numel()} values are not finite")


@check("a state dict goes into another build and computes the same", stage="build", roles=MODULES)
def state_dict_round_trip(case: Case) -> None:
    module, given = builds.lively(case, 0), builds.inputs(case)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    other = builds.lively(case, 1)
    try:
        other.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckFailed(f"its own state dict does not fit it: {str(error)[:300]}") from error
    with torch.no_grad():
        expected = builds.run(case, module, builds.copied(given))
        found = builds.run(case, other, builds.copied(given))
    builds.must_be_close(
        found,
        expected,
        1e-6,
        "after load_state_dict it computes something else; a value is not in its state dict",
    )


@check("copy.deepcopy gives an independent module that computes the same", stage="build", roles=MODULES)
def deepcopy_works(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    try:
        other = copy.deepcopy(module)
    except Exception as error:
        raise CheckFailed(f"copy.deepcopy raises {type(error).__name__}: {str(error)[:200]}") from error
    ours = {t.data_ptr() for t in module.parameters()}
    if ours & {t.data_ptr() for t in other.parameters()}:
        raise CheckFailed(
            "the copy shares parameters with the original; an average of weights would be the weights"
        )
    with torch.no_grad():
        expected = builds.run(case, module, builds.copied(given))
        found = builds.run(case, other, builds.copied(given))
    builds.must_be_close(found, expected, 1e-6, "the copy computes something else")


@check("running the post_build hooks again changes nothing", stage="build", roles=MODULES)
def post_build_is_idempotent(case: Case) -> None:
    from mm_registry.hooks import run_post_build

    active = builds.hooks(case)
    if not active.hook.post_build.get_hookimpls():
        raise CheckSkipped("the distribution has no post_build hook")
    module = builds.as_module(builds.build(case))
    before = _description(module)
    run_post_build(active, case.role, case.id, module)
    if found := sorted(set(before.items()) ^ set(_description(module).items())):
        raise CheckFailed(f"a second post_build changes {_listed([name for name, _ in found])}")


def _description(module: torch.nn.Module) -> dict[str, str]:
    """Classes, hooks and values of a module, in a form that compares."""
    lines = {}
    for name, part in module.named_modules():
        hooks = len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
        lines[f"module {name or '(root)'}"] = f"{type(part).__name__} with {hooks} hooks"
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        lines[name] = (
            f"{value.dtype} {tuple(value.shape)} {value.requires_grad} {value.double().sum().item()!r}"
        )
    return lines


def _listed(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
