"""The torch side of the kit: builds a component at its example's size, makes inputs for it, and runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.models.factory import build_component
from mm_core.random import keyed_generator
from mm_core.sharding import ShardingPolicy
from mm_core.testing import networks
from mm_core.testing.check import CheckFailed, CheckSkipped
from mm_core.testing.compare import changed as changed
from mm_core.testing.compare import distance as distance
from mm_core.testing.compare import global_state as global_state
from mm_core.testing.compare import global_switches as global_switches
from mm_core.testing.compare import must_be_close as must_be_close
from mm_core.testing.compare import must_differ as must_differ
from mm_core.weights import find_adapter, materialize
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.testing.case import Case
    from mm_core.weights import StateDictAdapter
    from mm_registry.hooks import ActiveHooks

Inputs = dict[str, Any]
MAX_PARAMETERS = 20_000_000
"""A tiny component has fewer; more would take minutes on a CPU."""
_CHANNELS = ("in_channels", "in_dim", "latent_channels", "channels")
_TEXT_WIDTHS = (
    "text_dim",
    "caption_channels",
    "cross_attention_dim",
    "joint_attention_dim",
    "text_embed_dim",
)
_TEXT_LENGTHS = ("text_len", "max_text_len", "max_sequence_length")
_VOCABULARY = 32
_NO_EXAMPLE = "it declares no example, and its defaults do not do"
_EXCITEMENT = 0.05
CALLED = "it was called with"
"""How the note begins that `run` adds to what a predictor raises."""


def component_class(case: Case) -> Any:
    """The class (or function) that the entry names; imported."""
    return case.manager.load(case.spec)


def section(case: Case) -> ComponentConfig:
    """The component's section, read once.

    Raises:
        CheckSkipped: there is no example, and a section of defaults has errors.
    """
    try:
        found: ComponentConfig = case.plugin.once(f"component {case.subject}", lambda: case.component)
    except CheckFailed as error:
        if case.example is None:
            raise CheckSkipped(f"{_NO_EXAMPLE}: {error}") from error
        raise
    return found


def hooks(case: Case) -> ActiveHooks:
    """The distribution's own hooks, activated."""
    return case.manager.activate([case.spec.distribution])


def build(case: Case, device: torch.device | str = "cpu", *, dtype: str | None = None) -> Any:
    """Build the component as a job does, by the core's factory and with the distribution's `post_build` hooks.

    A predictor on the CPU has the values of its constructor; see `trainable` for those of a training run.

    Args:
        dtype: of a frozen component, instead of its section's.

    Raises:
        CheckSkipped: there is no example, and with its defaults it is large or refuses to be built.
    """
    component = section(case) if dtype is None else replace(section(case), dtype=dtype)
    _refuse_large(case)
    try:
        return build_component(component, device, hooks=hooks(case))
    except UserError as error:
        if case.example is None:
            raise CheckSkipped(f"{_NO_EXAMPLE}: {error}") from error
        raise


def trainable(case: Case, seed: int = 0) -> nn.Module:
    """Build a predictor as training does: on meta, then filled with values keyed by `seed`."""
    module = as_module(build(case, "meta"))
    materialize(module, "cpu", seed)
    return module


def lively(case: Case, seed: int = 0) -> nn.Module:
    """A component in eval mode with a little noise on each parameter, so that layers which start at zero (a last
    projection, a gate) hide nothing.
    """
    trained = case.role in ("predictor", "transformers_model")
    module = trainable(case, seed) if trained else as_module(build(case))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point():
                generator = keyed_generator(seed, f"excite {name}")
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=_EXCITEMENT)
    return module.eval()


def as_module(built: Any) -> nn.Module:
    """`built`, if it is a module.

    Raises:
        CheckFailed: it is something else.
    """
    if not isinstance(built, nn.Module):
        raise CheckFailed(f"the component is a {type(built).__name__}, not a torch.nn.Module")
    return built


def sharding_policy(case: Case) -> ShardingPolicy | None:
    """The registered policy, made for this section, or None."""
    name = f"{case.role}/{case.id}"
    spec = case.manager.find("mm_core.sharding_policies", name, case.spec.distribution)
    if spec is None:
        return None
    policy: Any = case.manager.load(spec)
    if callable(policy):
        policy = policy(section(case).fields)
    if not isinstance(policy, ShardingPolicy):
        raise CheckFailed(f"the sharding policy {name} is a {type(policy).__name__}, not a ShardingPolicy")
    return policy


def weights_adapter(case: Case) -> StateDictAdapter | None:
    """The registered weights adapter, made for this section, or None."""
    return find_adapter(section(case), manager=case.manager)


# Inputs


def inputs(case: Case, batch: int = 2, seed: int = 0) -> Inputs:
    """Arguments for `run`: tensors `[batch, …]`, sample k the same in every batch.

    Raises:
        CheckSkipped: no example says the sizes, and they cannot be derived from the section.
    """
    if case.role == "predictor":
        return _predictor_inputs(case, batch, seed)
    if case.role == "ae":
        frames, height, width = video_size(case)
        return {"video": samples(batch, (3, frames, height, width), seed, "video").tanh()}
    if case.role == "text_encoder":
        return _token_inputs(case, batch, seed)
    if case.role == "transformers_model":
        return networks.network_inputs(case, batch, seed)
    raise CheckSkipped(f"the kit knows no inputs of a {case.role}")


def _predictor_inputs(case: Case, batch: int, seed: int) -> Inputs:
    length, width = prompt_size(case)
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(batch):
        mask[i, length - (i + 1) % length :] = 0
    given: Inputs = {
        "latents": samples(batch, latent_size(case), seed, "latents"),
        "timestep": torch.tensor([(237.5 + 411.25 * i) % 1000 for i in range(batch)]),
        "prompt": samples(batch, (length, width), seed, "prompt"),
    }
    if takes(component_class(case), "prompt_mask"):
        given["prompt_mask"] = mask
    return given


def _token_inputs(case: Case, batch: int, seed: int) -> Inputs:
    length = (case.example.tokens if case.example else None) or 8
    rows = []
    for i in range(batch):
        generator = keyed_generator(seed, "tokens", i)
        rows.append(torch.randint(3, vocabulary(case), (length,), generator=generator))
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(batch):
        mask[i, length - (i + 1) % length :] = 0
    return {"input_ids": torch.stack(rows), "attention_mask": mask}


def values(case: Case) -> Mapping[str, Any]:
    """The section's fields; without a config class, which has the defaults, with those of the constructor."""
    fields = section(case).fields
    if case.config_spec is not None:
        return fields
    try:
        parameters = inspect.signature(component_class(case)).parameters
    except (TypeError, ValueError):
        return fields
    return {**{name: parameter.default for name, parameter in parameters.items()}, **fields}


def vocabulary(case: Case) -> int:
    """Number of ids that are safe to use."""
    fields = values(case)
    inner = fields.get("config")
    for source in (fields, inner if isinstance(inner, Mapping) else {}):
        size = source.get("vocab_size")
        if isinstance(size, int):
            return size
    return _VOCABULARY


def latent_size(case: Case) -> tuple[int, int, int, int]:
    """C, T, H, W of the predictor's latents: the example's, or derived from the section.

    Raises:
        CheckSkipped: neither is possible.
    """
    if case.example is not None and case.example.latents is not None:
        return case.example.latents
    fields = values(case)
    channels = _first(fields, _CHANNELS)
    if channels is None:
        raise CheckSkipped(
            f"no example says the latents' size, and the section has none of {', '.join(_CHANNELS)}"
        )
    patch = fields.get("patch_size", 1)
    steps = patch if isinstance(patch, Sequence) and len(patch) == 3 else (1, patch, patch)
    return (channels, 2 * int(steps[0]), 2 * int(steps[1]), 2 * int(steps[2]))


def prompt_size(case: Case) -> tuple[int, int]:
    """L, D of the prompt: the example's, or derived from the section.

    Raises:
        CheckSkipped: neither is possible.
    """
    if case.example is not None and case.example.prompt is not None:
        return case.example.prompt
    width = _first(values(case), _TEXT_WIDTHS)
    if width is None:
        raise CheckSkipped(
            f"no example says the prompt's size, and the section has none of {', '.join(_TEXT_WIDTHS)}"
        )
    return min(8, _first(values(case), _TEXT_LENGTHS) or 8), width


def video_size(case: Case) -> tuple[int, int, int]:
    """T, H, W in pixels: the example's, or the smallest of a few that the autoencoder can encode.

    Raises:
        CheckSkipped: none of them is one.
    """
    if case.example is not None and case.example.video is not None:
        return case.example.video
    ask = getattr(section(case).config, "size_problem", None)
    if not callable(ask):
        ask = case.plugin.once(f"size problem {case.subject}", lambda: _refusal(build(case)))
    for frames in (5, 8, 9, 1):
        for side in (16, 32, 64):
            if ask(frames, side, side) is None:
                return frames, side, side
    raise CheckSkipped("no example says a video's size, and it refuses all that the kit has tried")


def _refusal(module: Any) -> Callable[[int, int, int], str | None]:
    """What an autoencoder without `size_problem` says of a size."""

    def ask(frames: int, height: int, width: int) -> str | None:
        try:
            module.latent_shape(frames, height, width)
        except UserError as error:
            return str(error)
        return None

    return ask


def samples(batch: int, shape: Sequence[int], seed: int, purpose: str) -> torch.Tensor:
    """Normal noise `[batch, *shape]`; row k depends on seed, purpose and k alone."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=keyed_generator(seed, purpose, i)) for i in range(batch)]
    )


def generators(batch: int, seed: int = 0, first: int = 0) -> list[torch.Generator]:
    """One generator a sample."""
    return [keyed_generator(seed, "sample", i) for i in range(first, first + batch)]


# Running


def run(case: Case, module: nn.Module, given: Inputs) -> torch.Tensor:
    """Call the component with arguments of `inputs`, and return the tensor `[B, …]` that it is about.

    A predictor's prediction, an autoencoder's latents (drawn, where it draws, with a generator a sample), a text
    encoder's embeddings.
    """
    method: Any = module
    arguments = dict(given)
    if case.role == "transformers_model":
        return networks.run_network(module, arguments)
    if case.role == "ae":
        method = module.encode
        if getattr(module, "do_sample", False) and "generator" not in arguments:
            arguments["generator"] = generators(len(arguments["video"]))
        video = arguments.pop("video")
        result = method(video, **arguments)
    elif case.role == "text_encoder":
        method = module.encode
        result = method(arguments["input_ids"], arguments["attention_mask"])[0]
    else:
        latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
        try:
            result = method(latents, timestep, **arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            shown = ", ".join(f"{k} {list(v.shape)}" for k, v in given.items() if isinstance(v, torch.Tensor))
            whose = "its example" if case.example is not None else "its section"
            error.add_note(f"{CALLED} {shown}; sizes are those of {whose}")
            raise
    if not isinstance(result, torch.Tensor):
        raise CheckFailed(f"it returns a {type(result).__name__} instead of a tensor")
    return result


def forward_loss(case: Case, module: nn.Module, given: Inputs, seed: int = 1) -> torch.Tensor:
    """Mean squared distance of a predictor's output from a fixed target; `[]` in fp32."""
    output = run(case, module, given)
    target = samples(len(output), output.shape[1:], seed, "target")
    return (output.float() - target).square().mean()


def part(given: Inputs, rows: slice) -> Inputs:
    """Some samples of a batch."""
    if "pixel_values" in given:
        return networks.network_part(given, rows)
    return {name: value[rows] for name, value in given.items()}


def copied(given: Inputs, **changes: Any) -> Inputs:
    """The same inputs in tensors of their own, some replaced."""
    return {**{name: value.clone() for name, value in given.items()}, **changes}


def takes(function: Any, name: str) -> bool:
    """Whether a function (for a class, its `forward`) declares a parameter of this name."""
    if isinstance(function, type):
        function = getattr(function, "forward", function)
    return name in inspect.signature(function).parameters


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _refuse_large(case: Case) -> None:
    """Without an example the defaults count, and those are often the published size."""
    if case.example is not None:
        return
    try:
        with torch.device("meta"):
            built = component_class(case)(**section(case).fields)
    except Exception:  # noqa: BLE001 - the factory builds it again, and says what is wrong
        return
    if isinstance(built, nn.Module):
        count = sum(p.numel() for p in built.parameters())
        if count > MAX_PARAMETERS:
            raise CheckSkipped(
                f"its defaults describe {count / 1e6:.0f} million parameters; declare a tiny example "
                "(group mm_core.examples)"
            )
