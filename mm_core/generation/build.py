"""From a generation job to a pipeline with weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.accelerator import parse_dtype
from mm_core.models.factory import build_sora_model
from mm_core.models.precision import cast_parameters
from mm_core.models.pretrained import load_predictor_folder
from mm_core.models.sora import EXPERTS
from mm_core.models.text_encoders import check_vocabulary
from mm_core.weights import is_hf_folder, load_module_weights, materialize, resolve_load
from mm_registry.errors import UserError
from mm_registry.manager import default_manager

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.generation_job import GenerationJob

logger = logging.getLogger(__name__)

RANDOM = "random"


def build_pipeline(
    job: GenerationJob,
    *,
    device: torch.device,
    seed: int,
    load: str | Path | None = None,
    ema: bool = False,
) -> tuple[Any, dict[str, str]]:
    """Build the model with its weights, and the pipeline around it.

    Args:
        device: where to compute.
        seed: of random predictor weights, where the file asks for them.
        load: training run, checkpoint or folder of weights of `predictor`; the job's own by default.
        ema: take the averaged weights of that checkpoint.

    Returns:
        The pipeline, and where the weights of each expert came from (an absolute path, or `random`).

    Raises:
        UserError: weights are missing or do not fit, there are no averaged ones, or the tokenizer has more ids than the
            text encoder.
    """
    pipeline = job.components["pipeline"]
    resident = torch.device("cpu") if pipeline.fields.get("cpu_offload") else device
    tokenizer = _tokenizer(job)
    model = build_sora_model(job.components, device=resident, hooks=job.hooks)
    if model.text_encoder is not None:
        check_vocabulary(model.text_encoder, len(tokenizer))
    sources = {}
    if ema and (load or job.load) is None:
        raise UserError(
            "--ema: there is no checkpoint to take averaged weights of; add --load with a run or a checkpoint"
        )
    for name in EXPERTS:
        if name in job.components:
            given = (load or job.load) if name == "predictor" else None
            averaged = ema and given is not None
            sources[name] = _fill(
                getattr(model, name), name, job.components[name], resident, seed, given, ema=averaged
            )
    model.eval()
    cls: Any = default_manager().load(pipeline.spec)
    return cls(model, tokenizer, device=device, **pipeline.fields), sources


def _fill(
    module: nn.Module,
    name: str,
    component: ComponentConfig,
    device: torch.device,
    seed: int,
    load: str | Path | None,
    *,
    ema: bool = False,
) -> str:
    """Give an expert its storage and weights; `load` comes before the section's own source."""
    source = load
    if source is None and component.init != "random":
        source = component.from_pretrained
    if source is None and component.init != "random":
        raise UserError(
            f"{name}: no weights; give --load (a run, a checkpoint or a folder of weights), "
            "from_pretrained in its section, or "
            '"init": "random" to see what an untrained model makes'
        )
    if component.dtype:
        cast_parameters(module, parse_dtype(component.dtype))  # on meta: no fp32 copy is ever made
    materialize(module, device, seed, random_init=source is None)
    module.requires_grad_(False)
    if source is None:
        logger.warning("%s has random weights, as its section asks", name)
        return RANDOM
    path = Path(source).expanduser()
    if is_hf_folder(path):
        if ema:
            raise UserError(
                f"--ema: {path} is a folder of weights, which are averaged or not; give a run or a checkpoint"
            )
        load_predictor_folder(module, path, component)
    else:
        path = resolve_load(path)
        # A run trains one expert, whichever of the two it is, under this name.
        load_module_weights(module, path, prefix="predictor", ema=ema)
    return str(path.resolve())


def _tokenizer(job: GenerationJob) -> Any:
    from mm_core.data.text import PromptTokenizer

    settings = job.tokenizer
    return PromptTokenizer(
        Path(settings.from_pretrained).expanduser(),
        max_length=settings.model_max_length,
        methods=job.model.prompt_methods,
        class_name=settings.autotokenizer_name,
    )
