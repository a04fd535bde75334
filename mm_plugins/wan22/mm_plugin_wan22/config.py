"""What a configuration may say about Wan's predictor, schedule and pipeline; `autoencoder_config` has the rest.
Torch-free: `mm check` and `mm list` import this file.

Field names are MindSpeed-MM's, so that its model files load as they are; `WanDiT`, `WanFlowMatchScheduler`
and `WanVideoVAE` map them to diffusers' names.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mm_core.config.experts import TrainedSigmas, shifted_sigma
from mm_core.config.keys import Legacy, NoEffect, NotYet, Only
from mm_core.config.recompute import Granularity, Method, recompute_problem
from mm_core.config.section import SectionModel, invalid
from mm_plugin_wan22.autoencoder_config import (
    Channels,
    Layers,
    PositiveInt,
    UnitInterval,
    WanVideoVAEConfig,
    WanVideoVAETiling,
    Width,
)

__all__ = [
    "WanDiTConfig",
    "WanFlowMatchSchedulerConfig",
    "WanPipelineConfig",
    "WanVideoVAEConfig",
    "WanVideoVAETiling",
]

Tokens = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=4096)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16384)]

_KERNELS = "the attention backend chooses its own layout and kernels"
_FPDT = "sequence chunking for long contexts is not applied"
_ONE_TIMESTEP = (
    "only a given first frame (ti2v) has a timestep of its own; all other tokens share their sample's, so one "
    "timestep a sample computes the same"
)
#: Types whose input has, beside the noised latents, as many latents of the given frames and a mask of four channels.
_CONCATENATED = frozenset({"i2v", "flf2v", "wan2.2-i2v"})
_MASK_CHANNELS = 4


class WanDiTConfig(SectionModel):
    """`predictor` with `model_id: wandit`: the Wan diffusion transformer (Wan et al., 2025). This version trains and
    samples text to video.
    """

    model_type: Annotated[
        Literal["t2v", "i2v", "flf2v", "ti2v", "wan2.2-t2v", "wan2.2-i2v"],
        NotYet("t2v", "wan2.2-t2v", reason="the image condition of other types than t2v is not made yet"),
        Field(
            description="What the network is given beside the noised latents; `wan2.2-t2v` is the network of `t2v`, "
            "with two experts."
        ),
    ] = "t2v"
    patch_size: Annotated[
        tuple[PositiveInt, PositiveInt, PositiveInt],
        Field(description="Latent frames, rows and columns of one token."),
    ] = (1, 2, 2)
    text_len: Annotated[Tokens, Field(description="Tokens of a prompt.")] = 512
    in_dim: Annotated[
        Channels,
        Field(
            description="Channels of the input: the latents', or for `i2v`, `flf2v` and `wan2.2-i2v` twice as many "
            "and a mask's four."
        ),
    ] = 16
    hidden_size: Annotated[Width, Field(description="Width of a token, a multiple of `num_heads`.")] = 2048
    ffn_dim: Annotated[Width, Field(description="Width inside the feed-forward layers.")] = 8192
    freq_dim: Annotated[
        int, Field(ge=2, le=2**18, multiple_of=2, description="Width of the timestep's sinusoidal embedding.")
    ] = 256
    text_dim: Annotated[Width, Field(description="Width of the text encoder's output.")] = 4096
    out_dim: Annotated[Channels, Field(description="Channels of the output: those of the latents.")] = 16
    num_heads: Annotated[Heads, Field(description="Attention heads.")] = 16
    num_layers: Annotated[Layers, Field(description="Transformer blocks.")] = 32
    qk_norm: Annotated[
        bool,
        Only(True, reason="the model always normalises queries and keys"),
        Field(description="Normalise queries and keys."),
    ] = True
    qk_norm_type: Annotated[
        str,
        Only("rmsnorm", reason="the model's query and key norm is an RMSNorm over all heads"),
        Field(description="Kind of that norm."),
    ] = "rmsnorm"
    cross_attn_norm: Annotated[
        bool,
        Field(
            description="Normalise the input of cross attention. MindSpeed-MM always does, whatever is written."
        ),
    ] = True
    eps: Annotated[float, Field(gt=0.0, description="Added to variances in norms.")] = 1e-6
    max_seq_len: Annotated[
        Tokens, Field(description="Positions of rotary embedding along each axis, in tokens.")
    ] = 1024

    img_dim: Annotated[
        int,
        NoEffect("only Wan2.1's image-conditioned models embed CLIP image features"),
        Field(description="Width of CLIP's image features."),
    ] = 1280
    clip_token_len: Annotated[
        int,
        NoEffect("only first-last-frame models embed CLIP image features"),
        Field(description="Tokens of CLIP's image features."),
    ] = 257
    seperated_timestep: Annotated[
        bool,
        NoEffect(_ONE_TIMESTEP, quiet_for=(False,)),
        Field(description="A timestep for each token (the spelling is MindSpeed-MM's)."),
    ] = False
    pipeline_num_layers: Annotated[
        list[int] | list[list[int]] | None,
        Field(
            description="Blocks of each pipeline stage, or of each part of the stages for interleaved ones; without "
            "--pipeline-model-parallel-size it does nothing. None: dealt out evenly."
        ),
    ] = None
    fa_layout: Annotated[
        str, NoEffect(_KERNELS), Field(description="Order of axes in Ascend's fused attention.")
    ] = "bnsd"
    use_fused_rmsnorm: Annotated[
        bool,
        NoEffect("torch's own RMSNorm is used", quiet_for=(False,)),
        Field(description="Use Ascend's fused RMSNorm."),
    ] = False
    attention_async_offload: Annotated[
        bool,
        Field(
            description="Keep what the attentions of a block save for backward in host memory until then; of a block that is "
            "recomputed, its inputs. offload_activations in fsdp2.yaml decides if it is written."
        ),
    ] = False
    fp32_calculate: Annotated[
        bool,
        NoEffect("norms and modulation always compute in fp32", quiet_for=(True,)),
        Field(description="Compute norms and modulation in fp32."),
    ] = True
    recompute_granularity: Annotated[
        Granularity | None,
        Field(
            description="Compute blocks again in backward: `full` keeps only their inputs, `selective` also results of "
            "matrix products and attention. Each key of fsdp2.yaml about it decides if it is written."
        ),
    ] = None
    recompute_method: Annotated[
        Method | None,
        Field(
            description="Which blocks, with `full`: `uniform` is all of them, `block` the first `recompute_num_layers`."
        ),
    ] = None
    recompute_num_layers: Annotated[
        PositiveInt | None,
        NoEffect("every block is a checkpoint of its own", when=("recompute_method", "uniform")),
        Field(description="How many, for `block`."),
    ] = None
    distribute_saved_activations: Annotated[
        bool,
        NoEffect("activations stay on the rank that made them", quiet_for=(False,)),
        Field(description="Share saved activations among tensor-parallel ranks."),
    ] = False
    FPDT: Annotated[
        bool, NoEffect(_FPDT, quiet_for=(False,)), Field(description="Attend to long sequences in chunks.")
    ] = False
    FPDT_chunk_number: Annotated[
        int | None, NoEffect(_FPDT), Field(description="Number of those chunks.")
    ] = None
    FPDT_with_offload: Annotated[
        bool, NoEffect(_FPDT, quiet_for=(False,)), Field(description="Keep idle chunks in host memory.")
    ] = False
    vae_scale_factor: Annotated[
        list[int] | None,
        NoEffect("the factors are those of the autoencoder itself"),
        Field(description="Compression of the autoencoder in time, height and width."),
    ] = None

    @property
    def latent_strides(self) -> tuple[int, int, int] | None:
        """What the autoencoders of the published models leave of frames, rows and columns: 48 channels are Wan2.2 5B's."""
        return {16: (4, 8, 8), 48: (4, 16, 16)}.get(self.out_dim)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = recompute_problem(
            self.recompute_granularity, self.recompute_method, self.recompute_num_layers
        )
        if problem is not None:
            raise invalid(problem[0], ". ".join(problem[1:]))
        if self.hidden_size % self.num_heads:
            raise invalid(
                "hidden_size",
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: each "
                "head takes an equal share",
            )
        head_dim = self.hidden_size // self.num_heads
        if head_dim % 2 or head_dim < 6:
            raise invalid(
                "num_heads",
                f"hidden_size / num_heads is {head_dim}: rotary embedding of three axes needs an even "
                "number of at least 6",
            )
        self._check_channels()
        return self

    def _check_channels(self) -> None:
        if self.model_type in _CONCATENATED:
            wanted = 2 * self.out_dim + _MASK_CHANNELS
            if self.in_dim != wanted:
                raise invalid(
                    "in_dim",
                    f"in_dim {self.in_dim} does not fit model_type {self.model_type}, which reads the noised latents, "
                    f"as many of the given frames and a mask of {_MASK_CHANNELS} channels: {wanted} for out_dim "
                    f"{self.out_dim}",
                )
        elif self.in_dim != self.out_dim:
            raise invalid(
                "out_dim",
                f"in_dim {self.in_dim} and out_dim {self.out_dim} differ, but a model of type {self.model_type} reads "
                "and predicts the same latent channels",
            )


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
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
        Field(description="Sigma at and above which the high-noise expert works; with `expert`."),
    ] = None
    expert: Annotated[
        Literal["high", "low"] | None, Field(description="Which side of `boundary` is trained.")
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
        if (self.boundary is None) != (self.expert is None):
            raise invalid(
                "boundary" if self.expert is None else "expert",
                'boundary (a sigma) and expert ("high" or "low") belong together: give both or neither',
            )
        if self.boundary is not None and (self.min_timestep_boundary, self.max_timestep_boundary) != (
            0.0,
            1.0,
        ):
            raise invalid(
                "boundary",
                "boundary with expert says which timesteps are trained, and so do min_timestep_boundary "
                "and max_timestep_boundary: "
                "keep one of the two forms",
            )
        return self

    def trained_sigmas(self) -> TrainedSigmas:
        """Which noise levels are trained, as `WanFlowMatchScheduler` draws them."""
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

    input_size: Annotated[
        tuple[Side, Side, Side], Field(description="Frames, height and width of the video, in pixels.")
    ]
    boundary_ratio: Annotated[
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
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
        NoEffect(_ONE_TIMESTEP, quiet_for=(False,)),
        Field(description="A timestep for each token."),
    ] = False
