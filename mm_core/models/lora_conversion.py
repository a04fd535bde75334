"""A checkpoint of a run with LoRA as the folder of its adapter, or as a whole folder in which the adapter is added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_core.config.component import ComponentConfig
from mm_core.config.component_file import LoneComponent
from mm_core.config.document import expanded
from mm_core.models.factory import build_component
from mm_core.models.lora_weights import adapter_bases, find_adapter_source, weights_fingerprint
from mm_core.weights import is_hf_folder
from mm_core.weights.adapter import find_adapter
from mm_core.weights.convert import Conversion, described_conversion, small_files
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_folder import known_recipes
from mm_core.weights.hf_save import assembled, save_hf_folder
from mm_core.weights.library_config import folder_config
from mm_core.weights.mapping import module_recipes
from mm_core.weights.peft_folder import save_peft_folder
from mm_core.weights.peft_merge import Read, merged_reader
from mm_core.weights.peft_names import adapter_tensors, base_tensors, kept_tensors
from mm_core.weights.recipe import inverted, sources
from mm_core.weights.sources import FolderSource, TensorSource
from mm_core.weights.tensors import compare_keys, dtype_name

_CONFIG = "config.json"


def convert_adapter(
    source: TensorSource,
    names: Mapping[str, str],
    lone: LoneComponent,
    folder: Path,
    *,
    name: str,
    kind: str,
    left_out: tuple[str, ...],
    merge: bool = False,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int,
) -> Conversion:
    """Write a checkpoint's adapter, tensor by tensor.

    Args:
        names: the module's name -> the source's.
        lone: the component, without adapters; those that the checkpoint tells of are added.
        name: of the component, in the checkpoint.
        merge: write the whole network with what the adapter adds, computed in fp32 and rounded once.
        base: folder of the weights under it; the one that the run had, by default.
        dtype: of all floating-point tensors; None: the adapter's, and of a merged folder the base's.

    Raises:
        WeightsError: the source does not fit, or the base is absent or another one.
    """
    told = find_adapter_source(source.path, "--from", component=name)
    component = replace(lone.component, lora=told.config)
    network = build_component(component, "meta", hooks=lone.hooks)
    kept = set(kept_tensors(network))
    missing, unexpected = compare_keys(kept, names)
    if missing or unexpected:
        raise WeightsError(
            f"{source.path} does not fit {component.label} with LoRA:\n" + "\n".join([*missing, *unexpected])
        )

    def read(name: str) -> torch.Tensor:
        value = source.read(names[name])
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    if not merge:
        if kept - adapter_tensors(network).keys():
            raise WeightsError(
                f"{source.path} has trained weights beside its adapter (lora_mixed_training), which an adapter's folder "
                "cannot hold; give --merge-lora."
            )
        save_peft_folder(network, folder, values={name: read(name) for name in sorted(kept)})
        return described_conversion(source.path, folder, f"the adapter of {kind}", left_out)
    opened = _base(base or told.base, told.path, name, named=base is not None)
    _write_merged(
        network, component, opened, lambda name: source.read(names[name]), folder, dtype, max_file_bytes
    )
    return described_conversion(source.path, folder, f"{kind}, added to {opened.path}", left_out)


def _base(place: str | None, checkpoint: Path, component: str, *, named: bool) -> FolderSource:
    """The folder under the adapter; another one than the run's only if its weights are the same."""
    if place is None:
        raise WeightsError(
            f"{checkpoint}: its adapter was trained on random weights, to which nothing can be added later; train with "
            '"lora_save_full_weight": true and --save-hf.'
        )
    path = expanded(place)
    if not is_hf_folder(path):
        raise WeightsError(
            f"{place}: the weights under the adapter are in no Hugging Face folder there; name one with --base"
            + ("." if named else ", of the same weights (`mm convert` makes it of a run).")
        )
    from mm_core.weights.state_file import read_state

    lora = read_state(checkpoint)["state"]["lora"]
    base = adapter_bases(lora).get(component, lora.get("base"))
    known = base.get("fingerprint") if isinstance(base, Mapping) else None
    if known is not None and weights_fingerprint(path) != known and is_hf_folder(expanded(str(base["path"]))):
        raise WeightsError(
            f"{place}: these are not the weights that {checkpoint} was trained on ({base['path']}); name that folder with "
            "--base."
        )
    return FolderSource(path)


def _write_merged(
    network: nn.Module,
    component: ComponentConfig,
    opened: FolderSource,
    read: Read,
    folder: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
) -> None:
    adapter = find_adapter(component)
    tensors = base_tensors(network)
    shapes = {key: info.shape for key, info in opened.tensors.items()}
    recipes = known_recipes(network, module_recipes(network, adapter, shapes), tensors)
    stored = {id(tensors[name]): recipe for name, recipe in recipes.items() if name in tensors}
    missing, unexpected = compare_keys(
        {n for n, t in tensors.items() if n in recipes or id(t) not in stored}, recipes
    )
    if missing or unexpected:
        raise WeightsError(
            f"{opened.path} does not fit {component.label}:\n" + "\n".join([*missing, *unexpected])
        )

    def read_base(name: str) -> torch.Tensor:
        recipe = stored[id(tensors[name])]
        return assembled(recipe, {key: opened.read(key) for key in sources(recipe)})

    dtypes = {}
    for name, recipe in recipes.items():
        own = opened.tensors[next(sources(recipe))].dtype
        dtypes[name] = dtype_name(dtype if dtype is not None and own.is_floating_point else own)
    config: Any = folder_config(network, adapter, component.fields, dtypes)
    files = [file for file in small_files(opened.path) if file.name != _CONFIG]
    save_hf_folder(
        network, folder, adapter, config, dtypes=dtypes, layout=inverted(recipes, shapes),
        read=merged_reader(network, read, read_base), max_file_bytes=max_file_bytes, beside=files,
    )  # fmt: skip
