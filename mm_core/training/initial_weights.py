"""The weights with which a run starts that goes on from no checkpoint."""

from __future__ import annotations

import logging

import torch
from torch import nn

from mm_core.config import TrainingJob
from mm_core.config.document import expanded
from mm_core.models.pretrained import load_predictor_folder
from mm_core.weights import is_hf_folder, materialize
from mm_core.weights.stored import StoredWeights

log = logging.getLogger(__name__)


def load_initial_weights(
    predictor: nn.Module, job: TrainingJob, device: torch.device
) -> StoredWeights | None:
    """Give the sharded predictor its storage, then its values: keyed random ones, or those of a Hugging Face folder.

    Returns:
        How the weights lay in their folder; `None` if there is none: random ones, or those of a checkpoint, which
        `Resume.restore` reads.

    Raises:
        UserError: the folder's weights do not fit.
    """
    section, load = job.components["predictor"], job.flags.load
    folder = section.from_pretrained if section.init == "pretrained" else None
    if load is not None:  # a run or a Hugging Face folder
        folder = load if is_hf_folder(expanded(load)) else None
    random_init = folder is None and load is None
    materialize(predictor, device, job.flags.seed, random_init=random_init)
    if folder is None:
        if random_init:
            log.info("predictor has random weights, as its section asks")
        return None
    loaded = load_predictor_folder(predictor, folder, section)
    log.info("predictor: weights of %s", folder)
    return StoredWeights(loaded.dtypes, loaded.layout)
