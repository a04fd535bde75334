"""`TransformersModel`: a model of the transformers library, trained as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.config.document import expanded
from mm_core.config.resolved import leaves
from mm_core.config.transformers_model import LossConfig, TransformersFamilyConfig
from mm_core.models.kernels import Computation, chosen_attention, log_experts
from mm_core.models.patch_embedding import compute_patches_as_linear
from mm_core.models.pretrained import refuse_foreign_code
from mm_core.sharding.mixin import FSDP2Mixin
from mm_core.sharding.policy import ShardingPolicy
from mm_registry.errors import UserError
from mm_registry.words import described

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig

log = logging.getLogger(__name__)

NETWORK = "model"
"""What the network is called: in a job's components, as an attribute, and in patterns of fsdp2.yaml."""


class TransformersModel(nn.Module, FSDP2Mixin):
    """One network of the transformers library as an FSDP root, called `model`.

    Args:
        model: the network; frozen parts have `requires_grad` False already.
        sharding_policy: how it is sharded; its blocks are found by structure without.
        router_aux_loss_coef: weight of the loss that balances experts; 0 for none.
        loss: how the task weighs the losses of tokens, and how many logits it makes at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sharding_policy: ShardingPolicy | None = None,
        router_aux_loss_coef: float = 0.0,
        loss: LossConfig | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.loss = loss or LossConfig()
        self.router_aux_loss_coef = router_aux_loss_coef
        self._sharding_policy = sharding_policy or ShardingPolicy()
        self.train()

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Name of what is trained -> module."""
        return {NETWORK: self.model}

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        """The network is the root, so that paths in fsdp2.yaml begin with `model.`."""
        return {NETWORK: self._sharding_policy}

    def forward(self, **batch: Any) -> Any:
        """Run the network on the arguments of its own `forward`, such as `input_ids` `[B, S]`."""
        return self.model(**batch)


def build_network(
    cls: Any,
    component: ComponentConfig,
    device: torch.device | str,
    *,
    attention: str | None = None,
    where: Computation | None = None,
) -> nn.Module:
    """Build the network that config.json of the section's folder describes, without its weights, in fp32, in training
    mode, with the parts frozen that the section names.

    A class may have two static methods of its own, MindSpeed-MM's: `overwrite_transformer_config(config) -> config`,
    whose changes are logged, and `freeze(model)`.

    Patch embeddings that are convolutions in space and time are computed as the products of matrices that they are; names
    and shapes of parameters stay.

    Args:
        cls: a class of transformers, or derived from one.
        component: of the role `transformers_model`.
        device: `meta` for a network that is sharded and filled later.
        attention: transformers' name of the attention of all parts, whatever the section says.
        where: the network is going to compute, for the choice of its kernels.

    Raises:
        UserError: config.json cannot be used, a package for the attention is absent or has no kernels for the dtype, or no
            parameter is left to train.
    """
    what = f"model ({component.model_id})"
    config = _overwritten(cls, read_network_config(cls, component), what)
    asked = {} if attention else _attention(component)
    kernels: dict[str, Any] = {
        "attn_implementation": attention or chosen_attention(cls, config.sub_configs, asked, where, what)
    }
    experts = _experts(component)
    if experts is not None:
        kernels["experts_implementation"] = experts
    try:
        with torch.device(device):
            # fp32, whatever config.json says of the stored weights: they are the master weights.
            network: nn.Module = cls._from_config(config, dtype=torch.float32, **kernels)
    except Exception as error:  # a configuration that the library's class refuses in any way
        wanted = f" with {', '.join(sorted(set(asked.values())))} attention" if asked else ""
        wanted += f" and {experts} experts" if experts else ""
        raise UserError(
            f"{what}: {cls.__name__} cannot be built from {component.from_pretrained}/config.json{wanted}: "
            f"{described(error)}"
        ) from error
    log_experts(network, where, what)
    patches = compute_patches_as_linear(network)
    if patches and where is not None:
        log.info("%s: %s is computed as a product of matrices", what, ", ".join(patches))
    _freeze(cls, network, component, what)
    return network.train()


def read_network_config(cls: Any, component: ComponentConfig) -> Any:
    """Return the configuration object of config.json in the section's folder. No code of the folder is run.

    Raises:
        UserError: there is none, or the class cannot read it.
    """
    what = f"model ({component.model_id})"
    file = expanded(component.from_pretrained or "") / "config.json"
    if not file.is_file():
        raise UserError(
            f"{what}: init_from_hf_path {component.from_pretrained!r} has no config.json (looked for {file.absolute()}); "
            "name the folder that describes the network"
        )
    refuse_foreign_code(file, what)
    try:
        return cls.config_class.from_pretrained(str(file.parent), local_files_only=True)
    except Exception as error:
        raise UserError(f"{what}: {cls.__name__} cannot read {str(file)!r}: {described(error)}") from error


def _attention(component: ComponentConfig) -> Mapping[str, str]:
    family = component.config
    return family.attention_implementations() if isinstance(family, TransformersFamilyConfig) else {}


def _experts(component: ComponentConfig) -> str | None:
    family = component.config
    return family.experts_implementation() if isinstance(family, TransformersFamilyConfig) else None


def _overwritten(cls: Any, config: Any, what: str) -> Any:
    overwrite = getattr(cls, "overwrite_transformer_config", None)
    if not callable(overwrite):
        return config
    changed = overwrite(copy.deepcopy(config))
    for line in _differences(config.to_dict(), changed.to_dict()):
        log.info("%s: %s.overwrite_transformer_config: %s", what, cls.__name__, line)
    return changed


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = dict(leaves(old)), dict(leaves(new))
    for path in dict.fromkeys([*before, *after]):
        if before.get(path) != after.get(path):
            yield f"{'.'.join(map(str, path))}: {before.get(path)} → {after.get(path)}"


def _freeze(cls: Any, network: nn.Module, component: ComponentConfig, what: str) -> None:
    family = component.config
    for path in family.frozen_modules() if isinstance(family, TransformersFamilyConfig) else ():
        try:
            network.get_submodule(path).requires_grad_(False)
        except AttributeError:
            raise UserError(
                f"{what}: {cls.__name__} has no {path}, which {component.spec.provider} says is to be frozen"
            ) from None
    if callable(freeze := getattr(cls, "freeze", None)):
        freeze(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"{what}: every part is frozen, so there is nothing to train; set one `freeze` to false"
        )
