"""What a configuration may say about more of diffusers' schedulers. Torch-free; fields and defaults are those of their
constructors, which a test compares. `UniPCMultistepScheduler` and `FlowMatchEulerDiscreteScheduler` have classes of their
own, from which common fields are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from mm_core.config.keys import Only
from mm_core.models.scheduler_config import (
    FlowMatchEulerDiscreteConfig,
    SamplerBaseConfig,
    UniPCMultistepConfig,
)

_LEARNED = "no pipeline here predicts a variance"


def _taken(cls: type[SamplerBaseConfig], *names: str) -> dict[str, Any]:
    """Types of another class's fields, with their marks and descriptions."""
    fields = cls.model_fields
    return {
        name: Annotated[(fields[name].annotation, *fields[name].metadata, _described(fields[name]))]
        for name in names
    }


def _described(field: Any) -> Any:
    return Field(description=field.description)


_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_LIMITS = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_FLOW = ("use_flow_sigmas", "flow_shift")
_SHIFTING = ("use_dynamic_shifting", "time_shift_type")
_GRID = ("timestep_spacing", "steps_offset")

#: Name of a field -> its type, with its description.
_FIELDS: dict[str, Any] = {
    **_taken(UniPCMultistepConfig, *_BETAS, *_SPACINGS, *_LIMITS, *_FLOW, *_SHIFTING, *_GRID),
    **_taken(
        UniPCMultistepConfig, "solver_order", "prediction_type", "lower_order_final", "final_sigmas_type"
    ),
    **_taken(UniPCMultistepConfig, "rescale_betas_zero_snr", "sigma_min", "sigma_max"),
    **_taken(FlowMatchEulerDiscreteConfig, "shift", "base_shift", "max_shift", "base_image_seq_len"),
    **_taken(FlowMatchEulerDiscreteConfig, "max_image_seq_len", "invert_sigmas", "shift_terminal"),
    "algorithm_type": Annotated[
        Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
        Field(description="Form of DPM-Solver; those with sde add fresh noise in each step."),
    ],
    "solver_type": Annotated[
        Literal["midpoint", "heun"], Field(description="How the second order is reached.")
    ],
    "euler_at_final": Annotated[bool, Field(description="Make the last step an Euler step.")],
    "use_lu_lambdas": Annotated[bool, Field(description="Space steps as Lu et al. (2022) do.")],
    "lambda_min_clipped": Annotated[
        float | None, Field(description="Least logarithm of the signal-to-noise ratio; None: no limit.")
    ],
    "variance_type": Annotated[
        Any, Only(None, reason=_LEARNED), Field(description="Kind of predicted variance.")
    ],
    "predictor_order": Annotated[int, Field(ge=1, description="Order of the predicting step.")],
    "corrector_order": Annotated[int, Field(ge=0, description="Order of the correcting step; 0 is without.")],
    "tau_func": Annotated[
        Any,
        Only(None, reason="a function cannot stand in a file"),
        Field(description="Share of fresh noise in time."),
    ],
    "clip_sample": Annotated[
        bool, Field(description="Clip predicted samples; for models of pixels, not of latents.")
    ],
    "clip_sample_range": Annotated[float, Field(gt=0.0, description="Largest value then.")],
    "set_alpha_to_one": Annotated[
        bool, Field(description="End without noise, rather than at the first training step.")
    ],
    "interpolation_type": Annotated[
        Literal["linear", "log_linear"], Field(description="How sigmas between training steps are found.")
    ],
    "timestep_type": Annotated[
        Literal["discrete", "continuous"],
        Field(description="What the model is told: steps, or logarithms of sigma."),
    ],
    "scale_factors": Annotated[
        Any,
        Only(None, reason="the size of the latents is fixed here"),
        Field(description="Growth of the latents."),
    ],
    "upscale_mode": Annotated[str, Field(description="How they would grow.")],
}


def _config(model_id: str, /, changed: dict[str, Any] | None = None, **defaults: Any) -> Any:
    """A config class with the fields of `defaults`.

    Args:
        changed: types of fields that differ here.
    """
    types = {**_FIELDS, **(changed or {})}
    fields: dict[str, Any] = {name: (types[name], default) for name, default in defaults.items()}
    return create_model(
        f"{model_id.removesuffix('Scheduler')}Config",
        __base__=SamplerBaseConfig,
        __module__=__name__,
        __doc__=f"`diffusion` with `model_id: {model_id}`.",
        **fields,
    )


def _betas(start: float = 0.0001, end: float = 0.02) -> dict[str, Any]:
    return {"beta_start": start, "beta_end": end, "beta_schedule": "linear", "trained_betas": None}


_OF_NOISE: dict[str, Any] = {**_betas(), "prediction_type": "epsilon"}
_NO_LIMITS: dict[str, Any] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_EVEN: dict[str, Any] = dict.fromkeys(_SPACINGS, False)
_NO_FLOW: dict[str, Any] = {"use_flow_sigmas": False, "flow_shift": 1.0}
_NO_SHIFT: dict[str, Any] = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
_SOLVER: dict[str, Any] = {**_OF_NOISE, **_NO_LIMITS, **_EVEN, **_NO_FLOW}
_DPM: dict[str, Any] = {
    "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero",
    "lambda_min_clipped": None, "variance_type": None,
}  # fmt: skip


def _one_of(*names: str, about: str) -> Any:
    return Annotated[Literal[names], Field(description=about)]


DPMSolverMultistepConfig = _config(
    "DPMSolverMultistepScheduler",
    **_SOLVER, **_DPM, **_NO_SHIFT, **_LINSPACE,
    lower_order_final=True, euler_at_final=False, use_lu_lambdas=False, rescale_betas_zero_snr=False,
)  # fmt: skip
DPMSolverSinglestepConfig = _config(
    "DPMSolverSinglestepScheduler", **_SOLVER, **_DPM, **_NO_SHIFT, lower_order_final=False
)
DEISMultistepConfig = _config(
    "DEISMultistepScheduler",
    {
        "algorithm_type": _one_of("deis", about="Form of the solver."),
        "solver_type": _one_of("logrho", about="Variable that the solver integrates over."),
    },
    **_SOLVER, **_NO_SHIFT, **_LINSPACE,
    solver_order=2, algorithm_type="deis", solver_type="logrho", lower_order_final=True,
)  # fmt: skip
SASolverConfig = _config(
    "SASolverScheduler",
    {
        "algorithm_type": _one_of(
            "data_prediction", "noise_prediction", about="What the solver extrapolates; each step adds fresh noise."
        )
    },
    **_SOLVER, **_LINSPACE,
    predictor_order=2, corrector_order=2, tau_func=None, algorithm_type="data_prediction", lower_order_final=True,
    lambda_min_clipped=None, variance_type=None,
)  # fmt: skip
FlowMatchHeunDiscreteConfig = _config("FlowMatchHeunDiscreteScheduler", shift=1.0)
FlowMatchLCMConfig = _config(
    "FlowMatchLCMScheduler",
    **_EVEN, **_NO_SHIFT,
    shift=1.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, invert_sigmas=False,
    shift_terminal=None, scale_factors=None, upscale_mode="bicubic",
)  # fmt: skip
DDIMConfig = _config(
    "DDIMScheduler",
    **_OF_NOISE, **_NO_LIMITS, **_LEADING,
    clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True, rescale_betas_zero_snr=False,
)  # fmt: skip
DDPMConfig = _config(
    "DDPMScheduler",
    {
        "variance_type": _one_of(
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", about="Size of the fresh noise."
        )
    },
    **_OF_NOISE, **_NO_LIMITS, **_LEADING,
    variance_type="fixed_small", clip_sample=True, clip_sample_range=1.0, rescale_betas_zero_snr=False,
)  # fmt: skip
EulerDiscreteConfig = _config(
    "EulerDiscreteScheduler",
    **_OF_NOISE, **_EVEN, **_LINSPACE,
    interpolation_type="linear", sigma_min=None, sigma_max=None, timestep_type="discrete", rescale_betas_zero_snr=False,
    final_sigmas_type="zero",
)  # fmt: skip
EulerAncestralDiscreteConfig = _config(
    "EulerAncestralDiscreteScheduler", **_OF_NOISE, **_LINSPACE, rescale_betas_zero_snr=False
)
HeunDiscreteConfig = _config(
    "HeunDiscreteScheduler",
    **_betas(0.00085, 0.012), **_EVEN, **_LINSPACE,
    prediction_type="epsilon", clip_sample=False, clip_sample_range=1.0,
)  # fmt: skip
