"""Videos that are made while a model trains (`--sample-config`): the flags, and the inference file that says which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mm_core.config.findings import ConfigError, Finding
from mm_core.config.kinds import Kind, read_kind
from mm_core.config.origin import Origin

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.document import Document
    from mm_core.config.flags import TrainFlags
    from mm_core.config.generation_job import GenerationJob
    from mm_registry import PluginManager

_EXPERTS = ("predictor", "low_noise_predictor")
_LIVE = Origin("flag", detail="--sample-config")


def check_sample_flags(flags: TrainFlags) -> Iterator[Finding]:
    """What flags of sample videos do not fit each other."""
    if flags.sample_interval is not None and flags.sample_config is None:
        text, mend = "needs --sample-config: it says which videos are made", "Add --sample-config FILE"
        yield flags.finding("sample_interval", "missing-flag", text, mend)
    if flags.eval_ema and flags.ema_decay is None:
        text = "needs --ema-decay: there are no averaged weights without it"
        yield flags.finding("eval_ema", "missing-flag", text, "Add --ema-decay 0.999")
    if flags.sample_config is None:
        return
    if flags.save is None:
        text = "needs --save: the videos are written into the folder of the run"
        yield flags.finding("sample_config", "missing-flag", text, "Add --save FOLDER")
    if flags.pipeline_model_parallel_size > 1:
        text = f"no rank has the whole network with --pipeline-model-parallel-size {flags.pipeline_model_parallel_size}"
        yield flags.finding(
            "sample_config", "conflict", text, "Set it to 1, or make videos of the run's checkpoints"
        )


def read_samples(
    flags: TrainFlags, components: Mapping[str, ComponentConfig], manager: PluginManager
) -> tuple[GenerationJob | None, list[Finding]]:
    """Check the inference file. The networks in it are those that the job trains: where their weights come from is not
    read.

    Args:
        components: of the training job.

    Returns:
        The generation job, None if it has errors; and what there is to say about it.
    """
    from mm_core.config.generation_job import generation_job_of  # few jobs have samples

    assert flags.sample_config is not None
    trained = [name for name in _EXPERTS if name in components]
    if not trained:
        text = "this job trains no network that makes videos"
        return None, [flags.finding("sample_config", "conflict", text, "Leave it out")]
    try:
        document = read_kind(flags.sample_config, Kind.INFERENCE)
        job = generation_job_of(_with_live_weights(document), manager=manager)
    except ConfigError as error:
        return None, list(error.findings)
    findings = list(_differences(flags, job, components))
    return (None if findings else job), [*findings, *(f for f in job.findings if f.level == "warning")]


def _with_live_weights(document: Document) -> Document:
    """The file as if it named no weights of the networks, which nothing then looks for."""
    predictor = document.data.get(_EXPERTS[0])
    if isinstance(document.data.get(_EXPERTS[1]), str) and isinstance(predictor, Mapping):
        document = document.replaced((_EXPERTS[1],), dict(predictor), document.origin((_EXPERTS[1],)))
    if document.data.get("load") is not None:
        document = document.replaced(("load",), None, _LIVE)
    for name in _EXPERTS:
        if isinstance(section := document.data.get(name), Mapping):
            if section.get("from_pretrained") is not None:
                document = document.replaced((name, "from_pretrained"), None, _LIVE)
            document = document.replaced((name, "init"), "random", _LIVE)
    return document


def _differences(
    flags: TrainFlags, job: GenerationJob, components: Mapping[str, ComponentConfig]
) -> Iterator[Finding]:
    """What of the file cannot be made with what the job trains."""
    for name in _EXPERTS:
        ours, theirs = components.get(name), job.components.get(name)
        if (ours is None) != (theirs is None):
            have, lack = (
                ("the job trains", "the file has no")
                if theirs is None
                else ("the file has", "the job trains no")
            )
            text = f'{have} "{name}", and {lack} such expert'
            mend = "Give an inference file with the experts that the job trains"
            yield Finding.at(job.document.origin(()), "error", "conflict", text, path=name, suggestion=mend)
        elif ours is not None and theirs is not None and ours.spec.id != theirs.spec.id:
            path = (name, "model_id")
            text = f'"{theirs.spec.id}", but the job trains "{ours.spec.id}"'
            yield Finding.at(job.document.origin(path), "error", "conflict", text, path=path)
