"""From a folder, a model file or a run to a chat model with weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mm_core.accelerator import Accelerator, parse_dtype
from mm_core.config.component import ComponentConfig
from mm_core.config.component_file import read_component, stored_component
from mm_core.config.document import expanded
from mm_core.config.latents import read_hf_config
from mm_core.config.parts import Part, config_class
from mm_core.config.transformers_model import TransformersFamilyConfig
from mm_core.data.chat.template import build_template
from mm_core.generation.chat import Chat
from mm_core.models.factory import build_component
from mm_core.models.lora_inference import with_adapter
from mm_core.models.lora_weights import find_adapter_source
from mm_core.models.precision import cast_parameters
from mm_core.models.pretrained import load_predictor_folder
from mm_core.models.transformers_model import NETWORK
from mm_core.weights import is_hf_folder, load_module_weights, materialize, resolve_load
from mm_core.weights.state_file import read_state
from mm_registry.errors import UserError
from mm_registry.groups import ROLES
from mm_registry.manager import default_manager

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatSources:
    """Where a chat model comes from.

    Attributes:
        model: folder in Hugging Face layout, `--model`.
        mm_model: model file of training, `--mm-model`.
        load: run, checkpoint or folder with the weights, `--load`; a run says by itself what its model is.
        lora_load: adapter that is added, `--lora-load`.
        ema: take the averaged weights of the checkpoint.
        init: `random` to see what an untrained model says.
        template: id of the chat template; None: that of the run, else of the family.
        limits: of images and videos, as in `preprocess_parameters`; over those of the run.
        dtype: of the weights; None: what config.json says.
    """

    model: str | None = None
    mm_model: str | None = None
    load: str | None = None
    lora_load: str | None = None
    ema: bool = False
    init: str | None = None
    template: str | None = None
    limits: Mapping[str, Any] | None = None
    dtype: str | None = None


def build_chat(sources: ChatSources, *, seed: int = 0, device: torch.device | None = None) -> Chat:
    """Build network and template, and load the weights.

    Args:
        seed: of random weights.
        device: where to compute; the machine's accelerator by default.

    Raises:
        UserError: the model is unknown, or weights are missing or do not fit.
    """
    device = Accelerator.current().device if device is None else device
    checkpoint, values = _checkpoint(sources)
    component, hooks = _component(sources, checkpoint, values)
    folder = expanded(component.from_pretrained or "")
    conversations = _conversations(values)
    parameters = dict(conversations.get("preprocess_parameters") or {})
    tokenizer = parameters.pop("model_name_or_path", None) or str(folder)
    name = sources.template or _template(component, conversations)
    limits = {key: value for key, value in (sources.limits or {}).items() if value is not None}
    # Before the weights, which may take minutes.
    template = build_template(name, tokenizer, **{**parameters, **limits})
    network = build_component(component, "meta", hooks=hooks)
    config = read_hf_config(folder)
    stored = config.get("dtype") or config.get("torch_dtype")
    cast_parameters(network, parse_dtype(sources.dtype or (stored if isinstance(stored, str) else "fp32")))
    random = sources.init == "random" or (component.init == "random" and sources.load is None)
    materialize(network, device, seed, random_init=random)
    network.requires_grad_(False)
    if random:
        log.warning("the model has random weights, as %s asks", "--init" if sources.init else "its file")
    else:
        network = _fill(network, component, sources, checkpoint)
    if sources.lora_load is not None:
        network = with_adapter(network, expanded(sources.lora_load))
    return Chat(network.eval(), template, _settings(network, folder), device)


def _checkpoint(sources: ChatSources) -> tuple[Path | None, Mapping[str, Any]]:
    """The checkpoint that `--load` means, and the configuration that it carries."""
    if sources.load is None or is_hf_folder(expanded(sources.load)):
        if sources.ema:
            raise UserError("--ema: only a run or a checkpoint has averaged weights; name one with --load")
        return None, {}
    checkpoint = resolve_load(expanded(sources.load))
    values = read_state(checkpoint)["state"].get("config", {})
    values = values.get("values", {}) if isinstance(values, Mapping) else {}
    return checkpoint, values if isinstance(values, Mapping) else {}


def _component(
    sources: ChatSources, checkpoint: Path | None, values: Mapping[str, Any]
) -> tuple[ComponentConfig, Any]:
    if sources.mm_model is not None:
        lone = read_component(sources.mm_model, NETWORK)
        return replace(lone.component, lora=None), lone.hooks
    if sources.model is not None:
        return _of_folder(sources.model), None
    if checkpoint is not None:
        if "model" not in values:
            raise UserError(f"{checkpoint} does not carry its configuration; give --model FOLDER")
        if "init_from_hf_path" not in values["model"]:
            raise UserError(
                f"--load {sources.load}: this run trained no chat model; videos are made with --mm-model "
                "inference_model.json"
            )
        lone = stored_component(values["model"], NETWORK, str(checkpoint))
        return replace(lone.component, lora=None), lone.hooks
    return _of_folder(str(sources.load)), None


def _of_folder(folder: str) -> ComponentConfig:
    """The network that config.json of a folder names."""
    path = expanded(folder)
    if not (path / "config.json").is_file():
        raise UserError(
            f"--model {folder}: there is no config.json (looked for {(path / 'config.json').absolute()}); name a folder "
            "in Hugging Face layout"
        )
    config = read_hf_config(path)
    architectures = config.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else ())[:1], config.get("model_type")]
    manager = default_manager()
    group = ROLES["transformers_model"].name
    known = manager.ids(group)
    id = next((name for name in names if name in known), None)
    if id is None:
        what = ", ".join(str(name) for name in names if name) or "none"
        raise UserError(
            f"--model {folder}: its config.json names {what}, and no installed package brings that; `mm list` shows "
            f"what there is ({', '.join(sorted(known))})"
        )
    spec = manager.resolve(group, id)
    return ComponentConfig(
        "transformers_model", id, spec, None, {"init_from_hf_path": folder}, from_pretrained=folder
    )


def _fill(
    network: nn.Module, component: ComponentConfig, sources: ChatSources, checkpoint: Path | None
) -> nn.Module:
    if checkpoint is None:
        folder = sources.load or component.from_pretrained or ""
        load_predictor_folder(network, folder, component)
        log.info("weights of %s", folder)
        return network
    if "lora" in read_state(checkpoint)["state"]:
        base = find_adapter_source(checkpoint, "--load").base or component.from_pretrained
        if base is None or not expanded(base).exists():
            raise UserError(
                f"{checkpoint} holds an adapter, and the weights under it ({base or 'random ones'}) are not there; give "
                "--model FOLDER with them, and the run as --lora-load"
            )
        if is_hf_folder(expanded(base)):
            load_predictor_folder(network, base, component)
        else:
            load_module_weights(network, resolve_load(expanded(base)), prefix=NETWORK)
        log.info("weights under the adapter: %s", base)
        network = with_adapter(network, checkpoint, flag="--load")
    else:
        load_module_weights(network, checkpoint, prefix=NETWORK, ema=sources.ema)
    log.info("weights of %s", checkpoint)
    return network


def _conversations(values: Mapping[str, Any]) -> Mapping[str, Any]:
    data = values.get("data")
    section = data.get("dataset_param") if isinstance(data, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _template(component: ComponentConfig, conversations: Mapping[str, Any]) -> str:
    basic = conversations.get("basic_parameters")
    if isinstance(basic, Mapping) and isinstance(name := basic.get("template"), str):
        return name
    cls = config_class(
        Part(NETWORK, component.role, (), (), component.model_id, component.spec), default_manager()
    )
    family = (
        cls if cls is not None and issubclass(cls, TransformersFamilyConfig) else TransformersFamilyConfig
    )
    return family.chat_template


def _settings(network: Any, folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        try:
            return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
    return GenerationConfig.from_model_config(network.config)
