"""What a configuration may say about Wan's predictor, schedule and pipeline; `autoencoder_config` has the rest.
Torch-free: `mm check` and `mm list` import this file.

Field names are MindSpeed-MM's, so that its model files load as they are; `WanDiT`, `WanFlowMatchScheduler`
and `WanVideoVAE` map them to diffusers' names.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.experts import TrainedSigmas, shifted_sigma
from mm_core.config.keys import Legacy, NoEffect, Only
from mm_core.config.section import SectionModel, invalid
from mm_core.config.sigmas import Boundary
from mm_plugin_wan22.autoencoder_config import UnitInterval, WanVideoVAEConfig, WanVideoVAETiling
from mm_plugin_wan22.predictor_config import ONE_TIMESTEP, WanDiTConfig

__all__ = [
    "WanDiTConfig",
    "WanFlowMatchSchedulerConfig",
    "WanPipelineConfig",
    "WanVideoVAEConfig",
    "WanVideoVAETiling",
]

Steps = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16384)]


class WanFlowMatchSchedulerConfig(SectionModel):
    """`diffusion` with `model_id: wan_flow_match_scheduler`: flow matching with a shifted sigma grid.

    Timesteps descend, so boundaries as fractions of the grid count from pure noise; `boundary` and `expert` say the
    same as a sigma, whatever the shift.
    """

    num_train_timesteps: Annotated[Steps, Field(description="Points of the grid.")] = 1000
    num_train_steps: Annotated[
        Steps | None,
        Legacy("num_train_timesteps"),
        Field(description="What MindSpeed-MM's inference examples write; its scheduler ignores it."),
    ] = None
    num_inference_timesteps: Annotated[Steps | None, Field(description="Sampling steps.")] = None
    shift: Annotated[
        float, Field(gt=0.0, description="Sigmas become shift·s / (1 + (shift − 1)·s): above 1, more noise.")
    ] = 3.0
    sigma_max: Annotated[
        float, Field(gt=0.0, le=1.0, description="First sigma of the grid, before the shift.")
    ] = 1.0
    sigma_min: Annotated[
        float, Field(ge=0.0, lt=1.0, description="Last sigma of the grid, before the shift.")
    ] = 0.003 / 1.002
    extra_one_step: Annotated[
        bool, Field(description="Divide the grid into one more step and leave out its last point.")
    ] = False
    guidance_scale: Annotated[
        float | tuple[float, float],
        Field(
            description="Classifier-free guidance, without at 0 or 1; two numbers are for the high-noise and the "
            "low-noise expert."
        ),
    ] = 0.0
    min_timestep_boundary: Annotated[
        UnitInterval,
        Field(description="Where training's part of the grid begins, a fraction of it; 0 is pure noise."),
    ] = 0.0
    max_timestep_boundary: Annotated[
        UnitInterval, Field(description="Where training's part of the grid ends, a fraction of it.")
    ] = 1.0
    boundary: Annotated[
        Boundary | None,
        Field(
            description="Sigma at and above which the high-noise expert works. Without `expert` both are trained in one "
            "job, which has a `low_noise_predictor`."
        ),
    ] = None
    expert: Annotated[
        Literal["high", "low"] | None,
        Field(description="Which side of `boundary` is trained; none: both, each by its own expert."),
    ] = None
    inverse_timesteps: Annotated[
        bool,
        Only(False, reason="Wan's time runs from noise to video in training and in generation"),
        Field(description="Let timesteps ascend."),
    ] = False
    reverse_sigmas: Annotated[
        bool,
        Only(False, reason="Wan's sigma is the share of noise; the reverse would train another model"),
        Field(description="Take sigma for the share of video."),
    ] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise invalid("sigma_min", f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.min_timestep_boundary >= self.max_timestep_boundary:
            raise invalid(
                "min_timestep_boundary",
                f"min_timestep_boundary {self.min_timestep_boundary} must be below max_timestep_boundary "
                f"{self.max_timestep_boundary}; both are fractions of the descending grid, 0 is pure noise",
            )
        if self.boundary is None and self.expert is not None:
            raise invalid(
                "expert",
                f"expert {self.expert} has no boundary (a sigma) that says where its part ends; give it too",
            )
        if self.boundary is not None and (self.min_timestep_boundary, self.max_timestep_boundary) != (
            0.0,
            1.0,
        ):
            raise invalid(
                "boundary",
                "boundary says which timesteps are trained, and so do min_timestep_boundary "
                "and max_timestep_boundary: "
                "keep one of the two forms",
            )
        return self

    def trained_sigmas(self) -> TrainedSigmas:
        """Which noise levels are trained, as `WanFlowMatchScheduler` draws them."""
        if self.boundary is not None and self.expert is None:
            return TrainedSigmas(1.0, 0.0, "boundary", "boundary", self.boundary)
        if self.boundary is not None:
            high, low = (1.0, self.boundary) if self.expert == "high" else (self.boundary, 0.0)
            return TrainedSigmas(high, low, "boundary", "boundary")
        steps = self.num_train_timesteps
        start, stop = int(self.min_timestep_boundary * steps), int(self.max_timestep_boundary * steps)

        def sigma(index: int) -> float:
            return shifted_sigma(
                index,
                steps=steps,
                shift=self.shift,
                sigma_max=self.sigma_max,
                sigma_min=self.sigma_min,
                extra_one_step=self.extra_one_step,
            )

        high, low = sigma(start) if start else 1.0, sigma(stop) if stop < steps else 0.0
        return TrainedSigmas(high, low, "min_timestep_boundary", "max_timestep_boundary")


class WanPipelineConfig(SectionModel):
    """`pipeline_config` with `pipeline_class: WanPipeline`."""

    needs_flow: ClassVar[bool] = True

    input_size: Annotated[
        tuple[Side, Side, Side], Field(description="Frames, height and width of the video, in pixels.")
    ]
    boundary_ratio: Annotated[
        Boundary | None,
        Field(
            description="Sigma at and above which `predictor` denoises, and below it `low_noise_predictor`."
        ),
    ] = None
    negative_prompt: Annotated[
        str | None, Field(description="What guidance moves away from; None: Wan's own text.")
    ] = None
    cpu_offload: Annotated[bool, Field(description="Keep each component on the CPU while it is idle.")] = (
        False
    )
    seed: Annotated[int | None, Field(description="Of the first noise; None: 0.")] = None
    vae_scale_factor_spatial: Annotated[
        int | None,
        NoEffect("the factor is that of the autoencoder itself"),
        Field(description="Pixels of a side of one latent."),
    ] = None
    expand_timesteps: Annotated[
        bool,
        NoEffect(ONE_TIMESTEP, quiet_for=(False,)),
        Field(description="A timestep for each token."),
    ] = False

    @property
    def conditions(self) -> frozenset[str]:
        """Names of the conditions that the pipeline makes of given frames where ae has no i2v_processor."""
        return frozenset({"i2v_vae_feature", "first_frame_latents"})
