"""What a configuration may say about diffusers' schedulers. Torch-free; fields and defaults are those of
their constructors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm_core.config.keys import Legacy, Only
from mm_core.config.section import SectionModel, invalid

PositiveInt = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1, le=100_000)]


class SamplerConfig(SectionModel):
    """Keys that every sampling scheduler has."""

    num_train_timesteps: Steps = 1000
    num_train_steps: Annotated[Steps | None, Legacy("num_train_timesteps")] = None
    num_inference_steps: Steps | None = None
    guidance_scale: float | tuple[float, float] = 0.0
    """Classifier-free guidance, without at 0 or 1; two numbers are for the high-noise and the low-noise
    expert.
    """
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_dynamic_shifting: Annotated[
        bool, Only(False, reason="no pipeline here gives the shift for each resolution that it needs")
    ] = False
    shift_terminal: float | None = None

    @model_validator(mode="after")
    def _check_one_spacing(self) -> SamplerConfig:
        chosen = [
            name
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
            if getattr(self, name)
        ]
        if len(chosen) > 1:
            raise invalid(chosen[1], f"only one spacing of sigmas can be chosen, not {' and '.join(chosen)}")
        return self


class UniPCMultistepConfig(SamplerConfig):
    """`diffusion` with `model_id: UniPCMultistepScheduler`."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    solver_order: PositiveInt = 2
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: list[int] = Field(default_factory=list)
    solver_p: Annotated[Any, Only(None, reason="a scheduler object cannot stand in a file")] = None
    use_flow_sigmas: bool = False
    flow_shift: Annotated[float, Field(gt=0.0)] = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    time_shift_type: Literal["exponential"] = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None


class FlowMatchEulerDiscreteConfig(SamplerConfig):
    """`diffusion` with `model_id: FlowMatchEulerDiscreteScheduler`."""

    shift: Annotated[float, Field(gt=0.0)] = 1.0
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: PositiveInt = 256
    max_image_seq_len: PositiveInt = 4096
    invert_sigmas: Annotated[
        bool, Only(False, reason="sigma is the share of noise here; the reverse belongs to other models")
    ] = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False
