"""The sampler of an inference file must suit the model that it samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding, show

_GUIDANCE = "guidance_scale"


def check_sampler(components: Mapping[str, ComponentConfig], document: Document) -> Iterator[Finding]:
    """Guidance must be one number for each expert; and where the pipeline's config class says `needs_flow`, the sampler,
    whose config class may tell it as `is_flow`, must integrate a flow.
    """
    diffusion, pipeline = components.get("diffusion"), components.get("pipeline")
    if diffusion is None:
        return
    scale = diffusion.fields.get(_GUIDANCE)
    if isinstance(scale, list | tuple) and document.data.get("low_noise_predictor") is None:
        path = (*diffusion.path, _GUIDANCE)
        text = f"{_GUIDANCE} {show(list(scale))} is for two experts, but this file has one"
        mend = "Write one number, or give low_noise_predictor and boundary_ratio"
        yield Finding.at(document.origin(path), "error", "guidance", text, path=path, suggestion=mend)
    needs = pipeline is not None and getattr(pipeline.config, "needs_flow", False) is True
    if pipeline is not None and needs and getattr(diffusion.config, "is_flow", True) is False:
        mend = 'Write "prediction_type": "flow_prediction" and "use_flow_sigmas": true'
        if "use_flow_sigmas" not in diffusion.fields:
            mend = "Choose one for flows, such as UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
        path = (*diffusion.path, "model_id")
        text = f"{pipeline.label} needs a sampler of flows, which {diffusion.label} as written here is not"
        yield Finding.at(document.origin(path), "error", "sampler", text, path=path, suggestion=mend)
