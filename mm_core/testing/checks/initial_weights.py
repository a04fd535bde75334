"""A predictor's first values: built on meta, filled afterwards, stored and read again."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

PREDICTOR = ("predictor",)
TRAINED = ("predictor", "transformers_model")


@check("on the meta device no parameter is allocated", stage="build", roles=TRAINED)
def builds_on_meta(case: Case) -> None:
    module = builds.as_module(builds.build(case, "meta"))
    real = [name for name, parameter in module.named_parameters() if not parameter.is_meta]
    if real:
        raise CheckFailed(
            f"built under torch.device('meta'), parameters are real all the same: {', '.join(real[:4])}; give no device= "
            "to constructors"
        )


@check("the constructor opens no file of weights and no connection", stage="build", roles=TRAINED)
def build_reads_no_weights(case: Case) -> None:
    from mm_core.testing.watch import watch_files

    builds.component_class(case)
    with watch_files() as opened:
        builds.build(case, "meta")
    if opened:
        raise CheckFailed(f"building it {opened[0]}; weights are loaded after sharding, by the core")


@check("names, shapes and dtypes are the same on meta and on the CPU", stage="build", roles=TRAINED)
def meta_and_cpu_have_the_same_tensors(case: Case) -> None:
    described = []
    for device in ("meta", "cpu"):
        module = builds.as_module(builds.build(case, device))
        tensors = [*module.named_parameters(), *module.named_buffers()]
        described.append({name: f"{list(t.shape)} {t.dtype}" for name, t in tensors})
    for name in sorted(described[0].keys() | described[1].keys()):
        on_meta, on_cpu = (d.get(name, "absent") for d in described)
        if on_meta != on_cpu:
            raise CheckFailed(f"{name} is {on_meta} on meta and {on_cpu} on the CPU")


@check("after a build on meta every value is filled and finite", stage="build", roles=TRAINED)
def first_values_are_complete(case: Case) -> None:
    module = builds.trainable(case)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise CheckFailed(f"{name} is still on the meta device")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckFailed(f"{name} has values that are not finite")


@check("its state is in parameters, buffers and submodules, not in plain attributes",
       stage="build", roles=TRAINED)  # fmt: skip
def state_is_registered(case: Case) -> None:
    """What is not registered is neither sharded nor filled nor stored, and stays on the meta device."""
    module = builds.trainable(case)
    registered = {id(part) for part in module.modules()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            held = value.values() if isinstance(value, dict) else value
            where = f"{path}.{name}".lstrip(".")
            for item in held if isinstance(held, list | tuple | type({}.values())) else [held]:
                if isinstance(item, torch.nn.Module) and id(item) not in registered:
                    raise CheckFailed(
                        f"{where} holds a {type(item).__name__} in a {type(value).__name__}, where torch does not see it; "
                        "use nn.ModuleList or nn.ModuleDict"
                    )
                if isinstance(item, torch.Tensor) and item.is_meta:
                    raise CheckFailed(
                        f"{where} is a plain tensor and stays on the meta device; make it an nn.Parameter, or a buffer "
                        "that reset_buffers(device) computes"
                    )


@check("first values depend on the seed alone, and take nothing from the global generator",
       stage="build", roles=TRAINED)  # fmt: skip
def first_values_are_keyed(case: Case) -> None:
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(global_seed)
        states.append(builds.trainable(case, seed).state_dict())
    for name, value in states[0].items():
        if not torch.equal(value, states[1][name]):
            raise CheckFailed(f"{name} has other first values although the run's seed is the same")
    if states[0] and all(torch.equal(value, states[2][name]) for name, value in states[0].items()):
        raise CheckFailed("another seed gives the same first values")


@check("first values after meta have the constructor's distribution", stage="build", roles=TRAINED)
def first_values_are_the_constructors(case: Case) -> None:
    module, direct = builds.trainable(case), builds.as_module(builds.build(case))
    expected = dict(direct.named_parameters())
    for name, parameter in module.named_parameters():
        ours, theirs = parameter.detach().float(), expected[name].detach().float()
        if bool((theirs == theirs.flatten()[0]).all()):
            if not torch.equal(ours, theirs):
                raise CheckFailed(
                    f"the constructor fills {name} with {float(theirs.flatten()[0]):g}, the values after a meta build "
                    "are others; see init_module"
                )
        elif ours.numel() >= 64:
            ratio = float(ours.std() / theirs.std())
            if not 0.5 < ratio < 2:
                raise CheckFailed(
                    f"{name} has a standard deviation of {float(ours.std()):.3g} after a meta build and of "
                    f"{float(theirs.std()):.3g} from the constructor; see init_module"
                )


@check("buffers after a build on meta are those of a build on the CPU", stage="build", roles=TRAINED)
def buffers_survive_meta(case: Case) -> None:
    found = dict(builds.trainable(case).named_buffers())
    for name, buffer in builds.as_module(builds.build(case)).named_buffers():
        if name not in found:
            raise CheckFailed(f"the buffer {name} is missing after a build on meta")
        if not torch.equal(found[name], buffer):
            raise CheckFailed(
                f"the buffer {name} has other values after a build on meta than on the CPU; give the component "
                "reset_buffers(device)"
            )


@check("a Hugging Face folder written by the core is read back, and computes the same",
       stage="build", roles=TRAINED)  # fmt: skip
def weights_folder_round_trip(case: Case) -> None:
    from mm_core.weights import load_hf_folder, save_hf_folder

    module, given, adapter = builds.lively(case), builds.inputs(case), builds.weights_adapter(case)
    config = None if adapter is None else adapter.config_to_folder(builds.section(case).fields)
    other = builds.lively(case, 1)
    with TemporaryDirectory(prefix="mm-kit-") as temporary:
        folder = Path(temporary) / "weights"
        save_hf_folder(module, folder, adapter, config)
        load_hf_folder(other, folder, adapter)
    for name, value in module.state_dict().items():
        if not torch.equal(value, other.state_dict()[name]):
            raise CheckFailed(f"{name} comes back from the folder with other values")
    with torch.no_grad():
        expected = builds.run(case, module, builds.copied(given))
        found = builds.run(case, other, builds.copied(given))
    builds.must_be_close(found, expected, 1e-6, "with the folder's weights it computes something else")


@check("the weights adapter renames one to one, and back", stage="build", roles=PREDICTOR)
def adapter_is_one_to_one(case: Case) -> None:
    from mm_core.weights.adapter import renamed

    adapter = builds.weights_adapter(case)
    if adapter is None:
        raise CheckSkipped("the component registers no weights adapter")
    keys = builds.as_module(builds.build(case, "meta")).state_dict()
    there = renamed(adapter, keys, to_folder=True)
    back = renamed(adapter, dict.fromkeys(there.values()))
    wrong = [f"{key} → {name} → {back[name]}" for key, name in there.items() if back[name] != key]
    if wrong:
        raise CheckFailed(f"to_module is not the inverse of to_folder: {wrong[0]}")


@check("the weights adapter's config.json describes the section, and another one is noticed",
       stage="build", roles=PREDICTOR)  # fmt: skip
def adapter_knows_its_config(case: Case) -> None:
    import json

    adapter = builds.weights_adapter(case)
    if adapter is None:
        raise CheckSkipped("the component registers no weights adapter")
    fields = builds.section(case).fields
    written: Any = json.loads(json.dumps(dict(adapter.config_to_folder(fields))))
    if problems := adapter.config_problems(written, fields):
        raise CheckFailed(f"config_problems objects to what config_to_folder wrote: {problems[0]}")
    numbers = [
        name for name, value in written.items() if isinstance(value, int) and not isinstance(value, bool)
    ]
    noticed = [
        name for name in numbers if adapter.config_problems({**written, name: written[name] + 1}, fields)
    ]
    if numbers and not noticed:
        raise CheckFailed(
            f"config_problems finds nothing when {', '.join(numbers[:4])} of config.json are others than the section's; "
            "the same shapes can compute something else"
        )
