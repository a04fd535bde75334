"""From checked sections to components, and from components to a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.accelerator import Accelerator, parse_dtype
from mm_core.config.transformers_model import LossConfig
from mm_core.models.attention_backends import KEY, set_attention_backend
from mm_core.models.kernels import Computation
from mm_core.models.lora import add_lora
from mm_core.models.sora import EXPERTS, SoRAModel
from mm_core.models.transformers_model import NETWORK, TransformersModel, build_network
from mm_core.random import keyed_seed
from mm_core.sharding.policy import ShardingPolicy, policy_problem
from mm_registry.errors import UserError
from mm_registry.hooks import run_post_build
from mm_registry.manager import default_manager
from mm_registry.words import described

if TYPE_CHECKING:
    import pluggy

    from mm_core.config.component import ComponentConfig

logger = logging.getLogger(__name__)

TRAINED = (*EXPERTS, NETWORK)
"""Names of the components that may be trained."""
_FROZEN = ("ae", "text_encoder")
_ENCODER_SEED = 0
"""Random encoders do not depend on the run's seed: training and generation with different seeds must meet
the same ones.
"""


def build_component(
    component: ComponentConfig,
    device: torch.device | str = "cpu",
    *,
    hooks: pluggy.PluginManager | None = None,
    attention: str | None = None,
    where: Computation | None = None,
) -> Any:
    """Build one component from its section.

    Autoencoders and text encoders come out on `device`, in their dtype (fp32 if none is said), frozen, in
    eval mode and with their weights: from `from_pretrained`, or random ones that are the same in every process
    with `init: random`. A predictor or a network of transformers comes out on `device` without meaningful
    weights if that is `meta`. A diffusion is a plain object.

    Args:
        hooks: activated plugins; their `post_build` sees each module.
        attention: transformers' name of the attention, for its networks, whatever their sections say.
        where: a predictor or such a network is going to compute, for the choice of its kernels.

    Raises:
        UserError: weights are missing or do not fit, the dtype has no kernels on the device, or the class
            refuses the fields.
        BrokenPluginError: the class cannot be imported.
    """
    cls: Any = default_manager().load(component.spec)
    if component.role in _FROZEN:
        built = _build_encoder(cls, component, torch.device(device))
    elif component.role == "i2v_processor":
        # It loads what it needs by itself; its encoders are frozen like those of their own sections.
        built = _construct(cls, component)
        if isinstance(built, nn.Module):
            built = built.to(device).eval().requires_grad_(False)
    elif component.role == "transformers_model":
        built = build_network(cls, component, device, attention=attention, where=where)
    else:
        with torch.device(device):
            built = _construct(cls, component)
        if component.role == "predictor" and where is not None:
            set_attention_backend(built, component.fields.get(KEY), where, component.label)
    if hooks is not None and isinstance(built, nn.Module):
        run_post_build(hooks, component.role, component.spec.id, built)
    if component.lora is not None:
        add_lora(
            built,
            component.lora,
            name=NETWORK if component.role == "transformers_model" else EXPERTS[0],
            aliases=policy.aliases if (policy := sharding_policy(component)) is not None else {},
            what=component.label,
        )
    return built


def build_model(
    components: Mapping[str, ComponentConfig],
    *,
    device: torch.device | str,
    hooks: pluggy.PluginManager | None = None,
    attention: str | None = None,
    where: Computation | None = None,
) -> SoRAModel | TransformersModel:
    """Compose the model that a training job's sections describe, what is trained on the meta device.

    Args:
        components: with `model`, a network of transformers; else the parts of a diffusion model.
        device: of frozen encoders.
        attention, where: see `build_component`.

    Raises:
        UserError, BrokenPluginError: see `build_component`.
    """
    if NETWORK not in components:
        return build_sora_model(components, device=device, hooks=hooks, where=where)
    component = components[NETWORK]
    loss = LossConfig(**component.fields.get("loss_cfg", {}))
    return TransformersModel(
        build_component(component, "meta", hooks=hooks, attention=attention, where=where),
        sharding_policy=sharding_policy(component),
        router_aux_loss_coef=loss.router_aux_loss_coef,
        loss=loss,
    )


def build_sora_model(
    components: Mapping[str, ComponentConfig],
    *,
    device: torch.device | str,
    predictor_device: torch.device | str = "meta",
    with_predictor: bool = True,
    hooks: pluggy.PluginManager | None = None,
    where: Computation | None = None,
) -> SoRAModel:
    """Compose a model from the sections of a job.

    Args:
        components: `diffusion`, `predictor`, `low_noise_predictor`, `ae`, `ae.i2v_processor`, `text_encoder` or
            `text_encoder.0`, … ; others are not looked at, absent ones are left out.
        device: of the encoders.
        predictor_device: `meta` for a predictor that is sharded and filled later.
        with_predictor: whether predictors are built at all.
        where: they are going to compute, for the choice of their kernels.

    Raises:
        UserError, BrokenPluginError: see `build_component`.
    """

    def build(name: str, made_on: torch.device | str) -> Any:
        if name not in components:
            return None
        return build_component(components[name], made_on, hooks=hooks, where=where)

    experts = EXPERTS if with_predictor else ()
    text_encoders = sorted(
        (name for name in components if name.split(".")[0] == "text_encoder"), key=_position
    )
    return SoRAModel(
        **{name: build(name, predictor_device) for name in experts},
        ae=build("ae", device),
        i2v_processor=build("ae.i2v_processor", device),
        text_encoder=[build(name, device) for name in text_encoders] or None,
        diffusion=build("diffusion", "cpu"),
        sharding_policies={
            name: policy
            for name in experts
            if name in components and (policy := sharding_policy(components[name])) is not None
        },
    )


def sharding_policy(component: ComponentConfig) -> ShardingPolicy | None:
    """Return the policy that is registered for a component, or None.

    Raises:
        UserError: what is registered is no policy.
    """
    manager = default_manager()
    name = f"{component.role}/{component.spec.id}"
    spec = manager.find("mm_core.sharding_policies", name, component.spec.distribution)
    if spec is None:
        return None
    policy = manager.load(spec)
    if callable(policy) and not isinstance(policy, type):
        try:
            policy = policy(component.fields)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # what exits would end the job, and with its code
            raise UserError(
                f"sharding policy {name} of {spec.distribution} failed with {described(error)}; it is called with the "
                "section and returns a ShardingPolicy"
            ) from error
    if not isinstance(policy, ShardingPolicy):
        raise UserError(
            f"sharding policy {name} of {spec.distribution} is a {type(policy).__name__}, not a "
            "ShardingPolicy"
        )
    problem = policy_problem(policy)
    if problem is not None:
        raise UserError(f"sharding policy {name} of {spec.distribution}, {problem}")
    return policy


def _position(name: str) -> int:
    _, _, number = name.partition(".")
    return int(number or 0)


def _build_encoder(cls: Any, component: ComponentConfig, device: torch.device) -> nn.Module:
    label = f"{'.'.join(map(str, component.path)) or component.role} {component.model_id}"
    dtype = parse_dtype(component.dtype) if component.dtype else torch.float32
    if device.type != "meta" and not Accelerator(device.type).supports(dtype):
        raise UserError(f"{label}: dtype {component.dtype} has no kernels on {device.type}; use fp32")
    can_load = hasattr(cls, "from_pretrained")
    if component.init == "pretrained" and component.from_pretrained:
        if not can_load:
            raise UserError(
                f"{label}: from_pretrained is given, but {cls.__name__} has no weights; remove the key"
            )
        fields = _accepted(cls.from_pretrained, component, component.from_pretrained, dtype=dtype)
        # Libraries keep single modules in fp32 beside a half-precision rest, so there is no .to(dtype)
        # afterwards.
        module = cls.from_pretrained(component.from_pretrained, dtype=dtype, **fields)
    elif component.init == "random" or not can_load:
        with (
            torch.device("meta" if device.type == "meta" else "cpu"),
            _fixed_generator(_encoder_seed(component)),
        ):
            module = _construct(cls, component).to(dtype)
        if component.init == "random" and any(True for _ in module.parameters()):
            logger.info("%s has random weights, as its section asks", label)
    else:
        raise UserError(
            f'{label}: no weights; give from_pretrained, or "init": "random" if random weights are wanted'
        )
    return module.to(device).eval().requires_grad_(False)


def _encoder_seed(component: ComponentConfig) -> int:
    """By what the component is, not by the file it stands in."""
    last = component.path[-1] if component.path else 0
    index = last if isinstance(last, int) else 0
    return keyed_seed(_ENCODER_SEED, f"random weights of {component.role}/{component.spec.id}", index)


def _construct(cls: Any, component: ComponentConfig) -> Any:
    return cls(**_accepted(cls, component))


def _accepted(function: Any, component: ComponentConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The component's fields, after a look at whether the callable takes them: a TypeError from within
    would blame the wrong one.
    """
    fields = dict(component.fields)
    try:
        inspect.signature(function).bind(*args, **kwargs, **fields)
    except TypeError as error:
        raise UserError(
            f"{component.role} {component.model_id}: {component.spec.target} of "
            f"{component.spec.distribution} "
            f"does not fit its section ({error})"
        ) from error
    return fields


@contextmanager
def _fixed_generator(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator, which initialisers draw from, for a moment; devices' generators
    are left alone.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
