"""What is asked of a network of transformers beside what is asked of every trained module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_core.config.transformers_model import TransformersFamilyConfig
from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds, networks
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")
    networks = LazyModule("mm_core.testing.networks")

NETWORK = ("transformers_model",)


def _family(case: Case) -> TransformersFamilyConfig:
    family = builds.section(case).config
    if not isinstance(family, TransformersFamilyConfig):
        raise CheckSkipped("it registers no config class that derives from TransformersFamilyConfig")
    return family


def _task(module: Any) -> Any:
    from mm_core.models.transformers_model import TransformersModel
    from mm_core.training.tasks.language import LanguageTask

    return LanguageTask(TransformersModel(module), seed=0, device=torch.device("cpu"))


def _loss(module: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """The mean over learnt tokens, as a run has it."""
    task = _task(module)
    batch = {
        **given,
        "labels": networks.labels_of(dict(given)),
        "sample_index": torch.arange(len(given["input_ids"])),
    }
    (inputs,) = task.prepare([batch])
    losses, weights, _ = task.loss(task.forward(task.model, inputs), inputs)
    found: torch.Tensor = losses.sum() / weights.sum()
    return found


@check("forward returns logits of each token, with an image where its config class describes one",
       stage="build", roles=NETWORK)  # fmt: skip
def reads_tokens_and_images(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        logits = builds.run(case, module, given)
        if "pixel_values" not in given:
            return
        other = {**builds.copied(given), "pixel_values": -given["pixel_values"]}
        if torch.equal(logits, builds.run(case, module, other)):
            raise CheckFailed(
                "another image gives the same logits: example_image describes what the network does not read"
            )


@check("the language task's loss is the network's own", stage="build", roles=NETWORK)
def loss_is_the_networks_own(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case)
    with torch.no_grad():
        ours = _loss(module, given)
        theirs = module(**given, labels=networks.labels_of(given), use_cache=False).loss
    builds.must_be_close(
        ours, theirs.float(), 1e-5, "LanguageTask and the network's forward with labels disagree"
    )


@check("a token is predicted from those before it alone", stage="build", roles=NETWORK)
def text_is_causal(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case, 1)
    other = builds.copied(given)
    other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 1) % 2
    with torch.no_grad():
        first, second = (builds.run(case, module, one)[:, :-1] for one in (given, other))
    builds.must_be_close(second, first, 1e-5, "another last token changes the logits of those before it")


@check("what is padded at the end of a row changes nothing", stage="build", roles=NETWORK)
def padding_at_the_end_changes_nothing(case: Case) -> None:
    module, given = builds.lively(case), builds.inputs(case, 2)
    other = builds.copied(given)
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 1)
    with torch.no_grad():
        first, second = (builds.run(case, module, one) for one in (given, other))
    builds.must_be_close(second, first, 1e-5, "other ids where a row is padded change the logits")


@check("each parameter that is not frozen gets a gradient, and the loss falls", stage="build", roles=NETWORK)
def network_learns(case: Case) -> None:
    module, given = builds.trainable(case), builds.inputs(case)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.02)
    losses = []
    for _ in range(3):
        loss = _loss(module, given)
        loss.backward()
        losses.append(loss.item())
        idle = [name for name, p in trained.items() if p.grad is None]
        if idle:
            raise CheckFailed(f"no gradient reaches {', '.join(idle[:3])}; freeze it, or use it")
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if not losses[2] < losses[0]:
        raise CheckFailed(
            f"three small steps on one batch lead from a loss of {losses[0]:.4f} to {losses[2]:.4f}"
        )


@check("what its config class says is frozen is, and nothing else", stage="build", roles=NETWORK)
def frozen_modules_are_the_ones(case: Case) -> None:
    paths = _family(case).frozen_modules()
    module = builds.as_module(builds.build(case, "meta"))
    own = getattr(builds.component_class(case), "freeze", None)
    for name, parameter in module.named_parameters():
        inside = any(name == path or name.startswith(f"{path}.") for path in paths)
        if parameter.requires_grad == inside and not (callable(own) and not inside):
            raise CheckFailed(
                f"{name} is {'trained' if inside else 'frozen'}, and frozen_modules says otherwise"
            )


@check("attention is asked for by parts that config.json has", stage="build", roles=NETWORK)
def attention_is_of_known_parts(case: Case) -> None:
    config, asked = networks.hf_config(case), _family(case).attention_implementations()
    if unknown := [part for part in asked if part and part not in config]:
        raise CheckFailed(
            f"attention_implementations names {', '.join(unknown)}, which config.json does not have"
        )


@check("numbers that its files repeat have their places in config.json", stage="build", roles=NETWORK)
def repeated_numbers_have_places(case: Case) -> None:
    family, config = _family(case), networks.hf_config(case)
    for key, place in type(family).hf_config_keys.items():
        value: Any = config
        for name in place:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            raise CheckFailed(
                f"hf_config_keys compares {'.'.join(map(str, key))} with {'.'.join(map(str, place))}, which config.json "
                "does not have"
            )
    wanted, found = type(family).hf_model_type, config.get("model_type")
    if wanted and wanted != found:
        raise CheckFailed(f"hf_model_type is {wanted}, but the example's config.json is of a {found}")
