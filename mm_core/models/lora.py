"""LoRA (Hu et al., arXiv:2106.09685) through PEFT: adapters in a network that is not sharded yet, and its weights around
them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_core.accelerator import parse_dtype
from mm_core.config.lora import LoraConfig
from mm_core.models.lora_targets import find_targets, shortest
from mm_core.random import keyed_seed
from mm_core.sharding.plan import is_inside
from mm_core.weights.peft_names import adapter_tensors, base_name
from mm_core.weights.tensors import local_part
from mm_registry.errors import UserError
from mm_registry.words import described

log = logging.getLogger(__name__)

#: PEFT's own name of a single adapter, which folders do not tell.
ADAPTER = "default"


def add_lora(
    network: nn.Module,
    config: LoraConfig,
    *,
    name: str = "",
    aliases: Mapping[str, str] | None = None,
    what: str = "the network",
) -> nn.Module:
    """Put LoRA layers around layers of a network, in place, and freeze everything else.

    The adapters are fp32, whatever the network is. On the meta device they have no values, which `initialise_adapters`
    gives them; elsewhere they are PEFT's: what they add is zero.

    Args:
        network: not sharded; what has `requires_grad` False gets no adapters.
        name: of its component.
        aliases: names of modules that users bring from elsewhere, see `ShardingPolicy`.
        what: messages call it so.

    Returns:
        The same network, of the same class and with the same paths of modules.

    Raises:
        UserError: a target means nothing or only what is frozen; peft refuses; the weights are quantised.
    """
    if getattr(getattr(network, "config", None), "quantization_config", None):
        raise UserError(
            f"{what}: config.json says that its weights are quantised, which no package that is kept here trains under "
            "LoRA; name the folder of the same model in bf16"
        )
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{what}: LoRA is made by peft, which is not installed; pip install peft") from error
    targets = find_targets(network, config, name=name, aliases=aliases)
    before = {path: p.requires_grad for path, p in network.named_parameters()}
    layers = [path for path, _ in network.named_modules() if path]
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
    options: Any = {
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        # PEFT would take those that it knows of the architecture for none at all.
        "target_modules": shortest(config.target_modules, targets.modules, layers),
        "target_parameters": shortest(config.target_parameters, targets.parameters, before) or None,
    }
    device = next(network.parameters()).device
    try:
        with torch.device(device):
            peft.inject_adapter_in_model(peft.LoraConfig(**options), network, ADAPTER)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UserError(f"{what}: peft cannot add LoRA: {described(error)}") from error
    _set_trained(network, config, targets.parts, before)
    count = len(targets.modules) + len(targets.parameters)
    numel = sum(tensor.numel() for tensor in adapter_tensors(network).values())
    log.info(
        "%s: LoRA of rank %d, alpha %g, on %d layers: %d parameters%s",
        what, config.rank, config.alpha, count, numel,
        f"; the weights under it are {config.frozen_dtype}" if config.frozen_dtype else "",
    )  # fmt: skip
    return network


def initialise_adapters(network: nn.Module, seed: int) -> None:
    """Give adapters their first values, in place, as PEFT does: A as a linear layer's (Kaiming, a = √5), B zero, so that
    nothing is added. They are the same on any number of ranks, each of which fills its part.

    Args:
        network: materialised, sharded or not.
        seed: of the run.
    """
    with torch.no_grad():
        for name, tensor in adapter_tensors(network).items():
            whole = torch.zeros(tensor.shape)
            generator = torch.Generator().manual_seed(keyed_seed(seed, f"init {name}"))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            elif ".lora_embedding_B." in name:
                nn.init.normal_(whole, generator=generator)
            storage, slices = local_part(tensor)
            storage.copy_(whole[slices])


def merge_adapters(network: nn.Module) -> nn.Module:
    """Add what the adapters add to the network's own weights and take them out, in place: it is as if there never were any.

    Args:
        network: materialised, not sharded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    while layers := [(path, m) for path, m in network.named_modules() if isinstance(m, BaseTunerLayer)]:
        path, layer = layers[0]  # of layers around each other the outermost first
        layer.merge()
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, network.get_submodule(f"{path}.base_layer"))
    holder: Any = network
    del holder.peft_config
    return network.requires_grad_(False)


def _set_trained(
    network: nn.Module, config: LoraConfig, parts: tuple[str, ...], before: Mapping[str, bool]
) -> None:
    """Train the adapters and, if it is asked for, the parts without them; the rest is frozen, in the dtype in which it is
    computed.
    """
    dtype = parse_dtype(config.frozen_dtype) if config.frozen_dtype else None
    for path, parameter in network.named_parameters():
        own = base_name(path)
        if own is None:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
            continue
        outside = config.mixed_training and not any(is_inside(own, part) for part in parts)
        parameter.requires_grad_(outside and before[own])
        if dtype is not None and not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
