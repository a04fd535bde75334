"""The weights with which a run starts that goes on from no checkpoint."""

from __future__ import annotations

import logging

import torch
from torch import nn

from mm_core.config import TrainingJob
from mm_core.config.document import expanded
from mm_core.models.lora import initialise_adapters
from mm_core.models.lora_weights import base_path, check_adapted, find_adapter_source, load_adapter, load_base
from mm_core.models.pretrained import load_predictor_folder
from mm_core.models.sora import EXPERTS
from mm_core.sharding.pipeline import tensors_elsewhere
from mm_core.weights import is_hf_folder, materialize
from mm_core.weights.agreement import everywhere
from mm_core.weights.stored import StoredWeights

log = logging.getLogger(__name__)


def load_initial_weights(
    module: nn.Module, name: str, job: TrainingJob, device: torch.device
) -> StoredWeights | None:
    """Give a sharded component its storage, then its values: keyed random ones, or those of a Hugging Face folder.

    Args:
        module: what is trained of it on this rank, maybe one stage of several.
        name: of the component.

    Returns:
        How the weights lay in their folder; `None` if there is none: random ones, or those of a checkpoint, which
        `Resume.restore` reads.

    Raises:
        UserError: the folder's weights do not fit.
    """
    section, load = job.components[name], job.flags.load
    if section.lora is not None:
        return _with_adapters(module, name, job, device)
    folder = section.from_pretrained if section.init == "pretrained" else None
    if name == EXPERTS[1] and load is not None and is_hf_folder(expanded(load)):
        load = None  # the first expert's
    if load is not None:  # a run or a Hugging Face folder
        folder = load if is_hf_folder(expanded(load)) else None
    random_init = folder is None and load is None
    materialize(module, device, job.flags.seed, random_init=random_init)
    if folder is None:
        if random_init:
            log.info("%s has random weights, as its section asks", name)
        return None
    elsewhere = tensors_elsewhere(module)
    loaded = load_predictor_folder(module, folder, section, elsewhere=elsewhere)
    log.info("%s: weights of %s", name, folder)
    if not elsewhere:
        return StoredWeights(loaded.dtypes, loaded.layout)
    parts = everywhere((loaded.dtypes, loaded.layout))  # of each stage its own; a checkpoint tells of all
    dtypes = {name: dtype for part, _ in parts for name, dtype in part.items()}
    return StoredWeights(dtypes, {name: recipe for _, part in parts for name, recipe in part.items()})


def _with_adapters(
    module: nn.Module, name: str, job: TrainingJob, device: torch.device
) -> StoredWeights | None:
    """The same for a component with LoRA, whose checkpoints hold no weights but the adapters'."""
    section, load = job.components[name], job.flags.load
    assert section.lora is not None
    materialize(module, device, job.flags.seed, random_init=base_path(section, load) is None)
    initialise_adapters(module, job.flags.seed)
    stored = load_base(module, name, section, load)
    if section.lora.load is not None and (load is None or is_hf_folder(expanded(load))):
        source = find_adapter_source(expanded(section.lora.load))
        check_adapted(source, [n for n, component in job.components.items() if component.lora is not None])
        load_adapter(module, source, name, section.lora)
    return stored
