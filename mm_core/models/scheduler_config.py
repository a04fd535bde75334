"""What a configuration may say about diffusers' schedulers. Torch-free; fields and defaults are those of
their constructors.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.keys import Legacy, Only
from mm_core.config.section import SectionModel, invalid

PositiveInt = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1, le=100_000)]


class SamplerBaseConfig(SectionModel):
    """Keys that every sampling scheduler has."""

    num_train_timesteps: Annotated[
        Steps, Field(description="Points of the training grid; timesteps are sigma times this.")
    ] = 1000
    num_train_steps: Annotated[
        Steps | None,
        Legacy("num_train_timesteps"),
        Field(description="What MindSpeed-MM's examples write and its scheduler ignores."),
    ] = None
    num_inference_steps: Annotated[
        Steps | None, Field(description="Denoising steps, unless --num-inference-steps says.")
    ] = None
    guidance_scale: Annotated[
        float | tuple[float, float],
        Field(
            description="Classifier-free guidance, none up to 1; two numbers are for the high-noise and the low-noise expert."
        ),
    ] = 0.0

    @property
    def is_flow(self) -> bool:
        """Whether it integrates the velocity of flow matching, as `DiffusersScheduler.is_flow`."""
        told = getattr(self, "prediction_type", None), getattr(self, "use_flow_sigmas", None)
        if told == (None, None):  # one of those that know nothing else
            return type(self).__name__.startswith("FlowMatch")
        return told == ("flow_prediction", True)

    @model_validator(mode="after")
    def _check_one_spacing(self) -> Self:
        chosen = [
            name
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
            if getattr(self, name, False)
        ]
        if len(chosen) > 1:
            raise invalid(chosen[1], f"only one spacing of sigmas can be chosen, not {' and '.join(chosen)}")
        return self


class SamplerConfig(SamplerBaseConfig):
    """Keys of flow matching that several have."""

    use_karras_sigmas: Annotated[bool, Field(description="Space sigmas as Karras et al. (2022) do.")] = False
    use_exponential_sigmas: Annotated[
        bool, Field(description="Space sigmas evenly on a logarithmic scale.")
    ] = False
    use_beta_sigmas: Annotated[bool, Field(description="Space sigmas by a beta distribution.")] = False
    use_dynamic_shifting: Annotated[
        bool,
        Only(False, reason="no pipeline here gives the shift for each resolution that it needs"),
        Field(description="Shift sigmas by the size of the video."),
    ] = False
    shift_terminal: Annotated[
        float | None, Field(description="Stretch the grid so that its last sigma is this.")
    ] = None


class UniPCMultistepConfig(SamplerConfig):
    """`diffusion` with `model_id: UniPCMultistepScheduler`."""

    beta_start: Annotated[
        float, Field(description="First beta of the noise schedule; without use_flow_sigmas.")
    ] = 0.0001
    beta_end: Annotated[
        float, Field(description="Last beta of the noise schedule; without use_flow_sigmas.")
    ] = 0.02
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear", "squaredcos_cap_v2"],
        Field(description="How betas go from the first to the last."),
    ] = "linear"
    trained_betas: Annotated[
        list[float] | None, Field(description="All betas; instead of beta_start, beta_end and beta_schedule.")
    ] = None
    solver_order: Annotated[
        PositiveInt, Field(description="Order of the solver; 2 is advised with guidance, 3 without.")
    ] = 2
    prediction_type: Annotated[
        Literal["epsilon", "sample", "v_prediction", "flow_prediction"],
        Field(description="What the model predicts; Wan needs flow_prediction."),
    ] = "epsilon"
    thresholding: Annotated[
        bool, Field(description="Clip predicted samples by a quantile; for models of pixels, not of latents.")
    ] = False
    dynamic_thresholding_ratio: Annotated[float, Field(description="That quantile.")] = 0.995
    sample_max_value: Annotated[float, Field(description="Largest bound of thresholding.")] = 1.0
    predict_x0: Annotated[
        bool, Field(description="Update by the predicted sample rather than by the noise.")
    ] = True
    solver_type: Annotated[
        Literal["bh1", "bh2"],
        Field(description="Form of the solver's step; bh2 is advised from 10 steps on."),
    ] = "bh2"
    lower_order_final: Annotated[
        bool, Field(description="Lower the order in the last steps, for fewer than 15 steps.")
    ] = True
    disable_corrector: Annotated[
        list[int], Field(description="Steps without the corrector, counted from 0.")
    ] = Field(default_factory=list)
    solver_p: Annotated[
        Any,
        Only(None, reason="a scheduler object cannot stand in a file"),
        Field(description="Scheduler that predicts, in place of UniP."),
    ] = None
    use_flow_sigmas: Annotated[bool, Field(description="Use the sigmas of flow matching; Wan needs it.")] = (
        False
    )
    flow_shift: Annotated[
        Annotated[float, Field(gt=0.0)],
        Field(description="Shift of those sigmas towards noise: shift·s / (1 + (shift − 1)·s)."),
    ] = 1.0
    timestep_spacing: Annotated[
        Literal["linspace", "leading", "trailing"],
        Field(description="How the steps are chosen from the training grid."),
    ] = "linspace"
    steps_offset: Annotated[int, Field(description="Added to the timesteps, for `leading`.")] = 0
    final_sigmas_type: Annotated[
        Literal["zero", "sigma_min"],
        Field(description="Last sigma: zero, or that of the last training step."),
    ] = "zero"
    rescale_betas_zero_snr: Annotated[
        bool, Field(description="Rescale betas so that the first step is pure noise.")
    ] = False
    time_shift_type: Annotated[
        Literal["exponential"],
        Field(description="Form of the shift that depends on the resolution; diffusers'."),
    ] = "exponential"
    sigma_min: Annotated[
        float | None, Field(description="Smallest sigma, for Karras' spacing and its like.")
    ] = None
    sigma_max: Annotated[
        float | None, Field(description="Largest sigma, for Karras' spacing and its like.")
    ] = None


class FlowMatchEulerDiscreteConfig(SamplerConfig):
    """`diffusion` with `model_id: FlowMatchEulerDiscreteScheduler`."""

    shift: Annotated[
        Annotated[float, Field(gt=0.0)],
        Field(description="Shift of the sigmas towards noise: shift·s / (1 + (shift − 1)·s)."),
    ] = 1.0
    base_shift: Annotated[
        float | None, Field(description="Shift at the smallest image; of use_dynamic_shifting.")
    ] = 0.5
    max_shift: Annotated[
        float | None, Field(description="Shift at the largest image; of use_dynamic_shifting.")
    ] = 1.15
    base_image_seq_len: Annotated[
        PositiveInt, Field(description="Tokens of the smallest image; of use_dynamic_shifting.")
    ] = 256
    max_image_seq_len: Annotated[
        PositiveInt, Field(description="Tokens of the largest image; of use_dynamic_shifting.")
    ] = 4096
    invert_sigmas: Annotated[
        bool,
        Only(False, reason="sigma is the share of noise here; the reverse belongs to other models"),
        Field(description="Let sigmas ascend."),
    ] = False
    time_shift_type: Annotated[
        Literal["exponential", "linear"],
        Field(description="Form of the shift that depends on the resolution; diffusers'."),
    ] = "exponential"
    stochastic_sampling: Annotated[bool, Field(description="Add fresh noise in each step.")] = False
