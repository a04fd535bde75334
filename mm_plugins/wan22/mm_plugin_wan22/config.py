"""What a configuration may say about Wan's components. Torch-free: `mm check` and `mm list` import this file.

Field names are MindSpeed-MM's, so that its model files load as they are; `WanDiT`, `WanFlowMatchScheduler`
and `WanVideoVAE` map them to diffusers' names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm_core.config.keys import NoEffect, Only
from mm_core.config.section import SectionModel, invalid

PositiveInt = Annotated[int, Field(ge=1)]
# Far above every model there is: a slip of the keyboard is an error here rather than a build without end.
Width = Annotated[int, Field(ge=1, le=2**18)]
Channels = Annotated[int, Field(ge=1, le=2**16)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=4096)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16384)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]

_KERNELS = "the attention backend chooses its own layout and kernels"
_RECOMPUTE = "recomputation is chosen by recompute_modules in fsdp2.yaml"


class WanDiTConfig(SectionModel):
    """`predictor` with `model_id: wandit`: the Wan diffusion transformer (Wan et al., 2025), text to
    video.
    """

    model_type: Annotated[
        str,
        Only(
            "t2v",
            "wan2.2-t2v",
            reason="this version trains text to video; i2v, flf2v, ti2v and wan2.2-i2v "
            "need an image condition that it does not make",
        ),
    ] = "t2v"
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    text_len: Tokens = 512
    in_dim: Channels = 16
    hidden_size: Width = 2048
    ffn_dim: Width = 8192
    freq_dim: Annotated[int, Field(ge=2, le=2**18, multiple_of=2)] = 256
    text_dim: Width = 4096
    out_dim: Channels = 16
    num_heads: Heads = 16
    num_layers: Layers = 32
    qk_norm: Annotated[bool, Only(True, reason="the model always normalises queries and keys")] = True
    qk_norm_type: Annotated[
        str, Only("rmsnorm", reason="the model's query and key norm is an RMSNorm over all heads")
    ] = "rmsnorm"
    cross_attn_norm: bool = True
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    max_seq_len: Tokens = 1024

    img_dim: Annotated[int, NoEffect("only Wan2.1's image-conditioned models embed CLIP image features")] = (
        1280
    )
    clip_token_len: Annotated[int, NoEffect("only first-last-frame models embed CLIP image features")] = 257
    seperated_timestep: Annotated[
        bool,
        NoEffect(
            "every token of a text-to-video sample has that sample's timestep, so one timestep a sample "
            "computes the same",
            quiet_for=(False,),
        ),
    ] = False
    pipeline_num_layers: Annotated[
        list[int] | None, NoEffect("layers are sharded by FSDP2, not cut into pipeline stages")
    ] = None
    fa_layout: Annotated[str, NoEffect(_KERNELS)] = "bnsd"
    use_fused_rmsnorm: Annotated[bool, NoEffect("torch's own RMSNorm is used", quiet_for=(False,))] = False
    attention_async_offload: Annotated[
        bool, NoEffect("activations are kept or recomputed, not offloaded", quiet_for=(False,))
    ] = False
    fp32_calculate: Annotated[
        bool, NoEffect("norms and modulation always compute in fp32", quiet_for=(True,))
    ] = True
    recompute_granularity: Annotated[str | None, NoEffect(_RECOMPUTE)] = None
    recompute_method: Annotated[str | None, NoEffect(_RECOMPUTE)] = None
    recompute_num_layers: Annotated[int | None, NoEffect(_RECOMPUTE)] = None
    FPDT: Annotated[
        bool, NoEffect("sequence chunking for long contexts is not applied", quiet_for=(False,))
    ] = False
    vae_scale_factor: Annotated[
        list[int] | None, NoEffect("the factors are those of the autoencoder itself")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> WanDiTConfig:
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
        if self.in_dim != self.out_dim:
            raise invalid(
                "out_dim",
                f"in_dim {self.in_dim} and out_dim {self.out_dim} differ, but text to video reads and "
                "predicts the same latent channels",
            )
        return self


class WanFlowMatchSchedulerConfig(SectionModel):
    """`diffusion` with `model_id: wan_flow_match_scheduler`: flow matching with a shifted sigma grid."""

    num_train_timesteps: Steps = 1000
    num_inference_timesteps: Steps | None = None
    shift: Annotated[float, Field(gt=0.0)] = 3.0
    sigma_max: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    sigma_min: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.003 / 1.002
    extra_one_step: bool = False
    guidance_scale: float | tuple[float, float] = 0.0
    min_timestep_boundary: UnitInterval = 0.0
    max_timestep_boundary: UnitInterval = 1.0
    boundary: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    expert: Literal["high", "low"] | None = None
    inverse_timesteps: Annotated[
        bool, Only(False, reason="Wan's time runs from noise to video in training and in generation")
    ] = False
    reverse_sigmas: Annotated[
        bool, Only(False, reason="Wan's sigma is the share of noise; the reverse would train another model")
    ] = False

    @model_validator(mode="after")
    def _check(self) -> WanFlowMatchSchedulerConfig:
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


class WanVideoVAETiling(SectionModel):
    """`ae.tiling_param`, in pixels."""

    tile_sample_min_height: PositiveInt = 256
    tile_sample_min_width: PositiveInt = 256
    tile_sample_stride_height: PositiveInt = 192
    tile_sample_stride_width: PositiveInt = 192

    @model_validator(mode="after")
    def _check(self) -> WanVideoVAETiling:
        for side in ("height", "width"):
            size, stride = (getattr(self, f"tile_sample_{what}_{side}") for what in ("min", "stride"))
            if stride > size:
                raise invalid(
                    f"tile_sample_stride_{side}",
                    f"tile_sample_stride_{side} {stride} is larger than tile_sample_min_{side} {size}: "
                    "tiles would leave gaps",
                )
        return self


class WanVideoVAEConfig(SectionModel):
    """`ae` with `model_id: wan_video_vae`: diffusers' AutoencoderKLWan with normalised latents.

    The second group of fields describes the network. They are for `init: random`; a pretrained folder brings
    its own, and one given beside it must agree.
    """

    do_sample: bool = True
    norm_latents: bool = True
    norm_mode: Literal["channel_specified_shift_scale", "value_shift_scale"] = "channel_specified_shift_scale"
    shift_factor: float | None = None
    scaling_factor: Annotated[float, Field(gt=0.0)] | None = None
    enable_tiling: bool = False
    tiling_param: WanVideoVAETiling | None = None
    i2v_processor: Annotated[
        dict[str, Any] | None, Only(None, reason="image conditions are made for image-to-video training only")
    ] = None

    base_dim: Channels | None = None
    decoder_base_dim: Channels | None = None
    z_dim: Channels | None = None
    dim_mult: list[PositiveInt] | None = None
    num_res_blocks: Layers | None = None
    attn_scales: list[float] | None = None
    temperal_downsample: list[bool] | None = None
    dropout: UnitInterval | None = None
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0.0)]] | None = None
    is_residual: bool | None = None
    in_channels: Channels | None = None
    out_channels: Channels | None = None
    patch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> WanVideoVAEConfig:
        if (
            self.dim_mult is not None
            and self.temperal_downsample is not None
            and len(self.temperal_downsample) != len(self.dim_mult) - 1
        ):
            raise invalid(
                "temperal_downsample",
                f"temperal_downsample has {len(self.temperal_downsample)} entries, but dim_mult of "
                f"{len(self.dim_mult)} stages "
                f"needs {len(self.dim_mult) - 1}",
            )
        if self.temperal_downsample is not None and sum(self.temperal_downsample) > 2:
            raise invalid(
                "temperal_downsample",
                "temperal_downsample may be true at most twice: the encoder reads frames in groups of four",
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and self.z_dim is not None and len(values) != self.z_dim:
                raise invalid(name, f"{name} has {len(values)} entries for z_dim {self.z_dim}")
        return self

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; left out they are upstream's, Wan2.1's."""
        return 16 if self.z_dim is None else self.z_dim

    def size_problem(self, frames: int, height: int, width: int) -> str | None:
        """Return why a video of these sizes cannot be encoded, or None."""
        if (frames - 1) % 4:
            near = 1 + (frames - 1) // 4 * 4
            return f"frames must be 4k + 1; nearest are {near} and {near + 4}"
        stages = 4 if self.dim_mult is None else len(self.dim_mult)
        factor = 2 ** (stages - 1) * (self.patch_size or 1)
        for side, size in (("height", height), ("width", width)):
            if size % factor:
                near = size // factor * factor
                choices = f"nearest are {near} and {near + factor}" if near else f"at least {factor}"
                return f"{side} must be a multiple of {factor}; {choices}"
        return None


class WanPipelineConfig(SectionModel):
    """`pipeline_config` with `pipeline_class: WanPipeline`."""

    input_size: tuple[Side, Side, Side]
    """Frames, height and width of the video in pixels."""
    boundary_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Sigma at and above which `predictor` denoises, below it `low_noise_predictor`."""
    negative_prompt: str | None = None
    cpu_offload: bool = False
    """Keep each component on the CPU while it is idle."""
    seed: int | None = None
    vae_scale_factor_spatial: Annotated[
        int | None, NoEffect("the factor is that of the autoencoder itself")
    ] = None
    expand_timesteps: Annotated[
        bool,
        NoEffect(
            "every token of a text-to-video sample has the same timestep, so one a sample computes the same",
            quiet_for=(False,),
        ),
    ] = False
