"""From a generation job to a pipeline with weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm_core.accelerator import parse_dtype
from mm_core.config.document import expanded
from mm_core.config.lora import ADAPTER_CONFIG
from mm_core.models.factory import build_sora_model
from mm_core.models.kernels import Computation
from mm_core.models.lora_inference import with_adapter
from mm_core.models.lora_weights import find_adapter_source
from mm_core.models.precision import cast_parameters
from mm_core.models.pretrained import load_predictor_folder
from mm_core.models.sora import EXPERTS
from mm_core.models.text_encoders import check_vocabulary
from mm_core.weights import is_hf_folder, load_module_weights, materialize, resolve_load
from mm_core.weights.sources import CheckpointSource
from mm_core.weights.state_file import read_state
from mm_registry.errors import UserError
from mm_registry.manager import default_manager

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.generation_job import GenerationJob

logger = logging.getLogger(__name__)

RANDOM = "random"


@dataclass(frozen=True)
class WeightSources:
    """Where weights come from besides the job's own sections.

    Attributes:
        load: runs, checkpoints or folders of weights: of the predictor, or one for each expert; one checkpoint of both
            experts fills both. By default the job's own.
        lora: adapters that are added: PEFT's folders or runs; of the predictor, or one for each expert.
        ema: take the averaged weights of the checkpoints.
    """

    load: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    ema: bool = False


def build_pipeline(
    job: GenerationJob,
    *,
    device: torch.device,
    seed: int,
    load: str | Path | Sequence[str | Path] | None = None,
    lora: Sequence[str | Path] = (),
    ema: bool = False,
) -> tuple[Any, dict[str, str]]:
    """Build the model with its weights, and the pipeline around it.

    Args:
        device: where to compute.
        seed: of random predictor weights, where the file asks for them.
        load, lora, ema: see `WeightSources`.

    Returns:
        The pipeline, and where the weights of each expert came from (an absolute path, or `random`); what was added to them
        is under `… lora`.

    Raises:
        UserError: weights are missing or do not fit, there are no averaged ones, or the tokenizer has more ids than the
            text encoder.
    """
    pipeline = job.components["pipeline"]
    resident = torch.device("cpu") if pipeline.fields.get("cpu_offload") else device
    sources = WeightSources(_paths(load if load is not None else job.load), _paths(lora), ema)
    experts = [name for name in EXPERTS if name in job.components]
    _check_sources(sources, experts)
    tokenizer = build_tokenizer(job)
    where = Computation.of(device, job.components[EXPERTS[0]].dtype, gradients=False)
    model = build_sora_model(job.components, device=resident, hooks=job.hooks, where=where)
    if model.text_encoder is not None:
        check_vocabulary(model.text_encoder, len(tokenizer))
    filled: dict[str, str] = {}
    for index, name in enumerate(experts):
        module = getattr(model, name)
        given = _of_expert(sources.load, index)
        filled[name] = _fill(module, name, job.components[name], resident, seed, given, ema=ema)
        if (adapter := _of_expert(sources.lora, index)) is not None:
            path = expanded(adapter)
            with_adapter(module, path, name if holds_both(adapter) else EXPERTS[0])
            filled[f"{name} lora"] = str(find_adapter_source(path).path.resolve())
    model.eval()
    cls: Any = default_manager().load(pipeline.spec)
    return cls(model, tokenizer, device=device, **pipeline.fields), filled


def holds_both(load: str) -> bool:
    """Whether a path is a run, or a checkpoint, of both experts."""
    path = expanded(load)
    if is_hf_folder(path) or (path / ADAPTER_CONFIG).is_file():
        return False
    names = CheckpointSource(resolve_load(path)).tensors
    return any(name.startswith(f"{EXPERTS[1]}.") for name in names)


def _of_expert(paths: Sequence[str], index: int) -> str | None:
    """The path of the first or the second expert: its own, or a run of both."""
    if index < len(paths):
        return paths[index]
    return paths[0] if paths and holds_both(paths[0]) else None


def _paths(given: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def _check_sources(sources: WeightSources, experts: Sequence[str]) -> None:
    if sources.ema and not sources.load:
        raise UserError(
            "--ema: there is no checkpoint to take averaged weights of; add --load with a run or a checkpoint"
        )
    for flag, paths in (("--load", sources.load), ("--lora-load", sources.lora)):
        if len(paths) > len(experts):
            raise UserError(
                f"{flag} names {len(paths)} places ({', '.join(paths)}), but the inference file has "
                f"{len(experts)} expert{'s' if len(experts) > 1 else ''}; give one for each"
            )
    if sources.load and len(experts) == 1 and holds_both(sources.load[0]):
        raise UserError(
            f"--load {sources.load[0]} was trained with both experts, and the inference file has one; give it "
            "low_noise_predictor (a section like predictor's) and boundary_ratio"
        )


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
    path = None if source is None else expanded(str(source))
    checkpoint = None if path is None or is_hf_folder(path) else resolve_load(path)
    state = {} if checkpoint is None else read_state(checkpoint)["state"]
    base = None if checkpoint is None or "lora" not in state else _base_of(name, component, checkpoint)
    # Random weights under an adapter are those that its run drew.
    random = path is None or base == RANDOM
    materialize(module, device, int(state.get("seed", seed)), random_init=random)
    module.requires_grad_(False)
    if path is None:
        logger.warning("%s has random weights, as its section asks", name)
        return RANDOM
    if checkpoint is None:
        if ema and load is not None:
            raise UserError(
                f"--ema: {path} is a folder of weights, which are averaged or not; give a run or a checkpoint"
            )
        load_predictor_folder(module, path, component)
        return str(path.resolve())
    # A run that trains one expert, whichever of the two it is, has it under the first's name.
    stored = name if holds_both(str(checkpoint)) else EXPERTS[0]
    if base is None:
        load_module_weights(module, checkpoint, prefix=stored, ema=ema and load is not None)
        return str(checkpoint.resolve())
    if ema and load is not None:
        raise UserError(
            f"--ema: {checkpoint} was trained with LoRA, and averages of an adapter are not used here; leave --ema out"
        )
    logger.info("%s: weights under the adapter: %s", name, base)
    if is_hf_folder(expanded(base)):
        load_predictor_folder(module, expanded(base), component)
    elif base != RANDOM:
        prefix = name if holds_both(base) else EXPERTS[0]
        load_module_weights(module, resolve_load(expanded(base)), prefix=prefix)
    with_adapter(module, checkpoint, stored, flag="--load")
    return str(checkpoint.resolve())


def _base_of(name: str, component: ComponentConfig, checkpoint: Path) -> str:
    """Folder or run of the weights under the adapter of a checkpoint: the section's, else those that it was trained on; or
    `random`.

    Raises:
        UserError: it was trained on random weights, and the section does not ask for such.
    """
    stored = name if holds_both(str(checkpoint)) else EXPERTS[0]
    base = component.from_pretrained or find_adapter_source(checkpoint, "--load", component=stored).base
    if base is None and component.init != "random":
        raise UserError(
            f"{name}: {checkpoint} holds an adapter of random weights; give from_pretrained in the section, or "
            '"init": "random" to see what it makes of those'
        )
    return base or RANDOM


def build_tokenizer(job: GenerationJob) -> Any:
    from mm_core.data.text import PromptTokenizer

    settings = job.tokenizer
    return PromptTokenizer(
        Path(settings.from_pretrained).expanduser(),
        max_length=settings.model_max_length,
        methods=job.model.prompt_methods,
        class_name=settings.autotokenizer_name,
    )
