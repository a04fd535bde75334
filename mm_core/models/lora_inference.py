"""An adapter on disk, added to a network that is going to be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mm_core.config.component_file import stored_component
from mm_core.config.lora import LoraConfig
from mm_core.models.factory import build_component
from mm_core.models.lora import ADAPTER, add_lora, merge_adapters
from mm_core.models.lora_weights import AdapterSource, find_adapter_source, load_adapter
from mm_core.weights.errors import WeightsError
from mm_core.weights.state_file import read_state


def with_adapter(
    network: nn.Module, path: Path, name: str = "model", *, flag: str = "--lora-load"
) -> nn.Module:
    """Add an adapter to a network's weights, in place, and return it: frozen, of its own class, without PEFT layers.

    Args:
        network: materialised, not sharded, with the weights that the adapter was trained on.
        path: a folder of PEFT, or a run that was trained with LoRA (its newest checkpoint), or one of its checkpoints.
        name: of the component, in a run.
        flag: that names the path, for messages.

    Raises:
        UserError: there is no adapter, or it does not fit the network.
    """
    source = find_adapter_source(path, flag)
    config = source.config if source.is_folder else _of_run(source, name)
    add_lora(network.requires_grad_(True), config)
    load_adapter(network, replace(source, config=config), name, config)
    return merge_adapters(network)


def _of_run(source: AdapterSource, name: str) -> LoraConfig:
    """The layers that a run's adapter has, which parts that were frozen have not."""
    state = read_state(source.path)["state"]
    try:
        values = state["config"]["values"]["model"]
    except (KeyError, TypeError):
        raise WeightsError(
            f"{source.path} does not carry its configuration; name the adapter's folder that --save-hf wrote."
        ) from None
    lone = stored_component(values, name, str(source.path))
    network: Any = build_component(replace(lone.component, lora=source.config), "meta", hooks=lone.hooks)
    exact = network.peft_config[ADAPTER]
    return replace(
        source.config,
        target_modules=tuple(sorted(exact.target_modules or ())),
        target_parameters=tuple(sorted(exact.target_parameters or ())),
        apply_modules=(),
        mixed_training=False,
    )
