"""The frozen components of a job: how large they are, as far as that can be told without their weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mm_core.config import TrainingJob
from mm_core.config.component import ComponentConfig
from mm_core.config.document import expanded
from mm_core.models.factory import build_component
from mm_core.models.skeleton import collect_skeletons
from mm_core.weights.headers import read_headers
from mm_core.weights.hf_folder import weight_files

_ROLES = ("ae", "text_encoder")


@dataclass(frozen=True)
class Frozen:
    """All frozen components together, each whole on every rank.

    Args:
        numel: their parameters.
        bytes: in the dtypes that they are loaded in.
        notes: about those whose size is not known.
    """

    numel: int = 0
    bytes: int = 0
    notes: tuple[str, ...] = ()


def frozen_components(job: TrainingJob) -> Frozen:
    """Build each frozen component on the meta device, from its folder's config.json or its section."""
    numel = size = 0
    notes = []
    for name, component in job.components.items():
        if component.role not in _ROLES:
            continue
        module = _build(component, job)
        if isinstance(module, nn.Module):
            tensors = [*module.parameters(), *module.buffers()]
            numel += sum(p.numel() for p in module.parameters())
            size += sum(t.numel() * t.itemsize for t in tensors)
        elif isinstance(module, int):
            numel, size = numel + module // 4, size + module
        else:
            notes.append(f"{name} ({component.model_id}) is not counted: {module}")
    return Frozen(numel, size, tuple(notes))


def _build(component: ComponentConfig, job: TrainingJob) -> nn.Module | int | str:
    """The component, the bytes of its files, or why neither is known."""
    pretrained = component.init != "random" and component.from_pretrained is not None
    folder = expanded(component.from_pretrained or "")
    if pretrained and not folder.is_dir():
        return f"there is no folder {component.from_pretrained}"
    if not pretrained and component.init != "random":
        return "its section names no weights"
    try:
        with collect_skeletons():
            module: nn.Module = build_component(component, "meta", hooks=job.hooks)
        return module
    except Exception as error:  # noqa: BLE001 - a plugin's class need not be made for the meta device
        if pretrained and (files := weight_files(folder)):
            return sum(tensor.nbytes for tensor in read_headers(files).values())
        return f"its class cannot be on the meta device ({type(error).__name__})"
