"""What a configuration may say about LTX-Video's components. Torch-free, because `mm check` imports it.

Names that the core compares between sections (`in_dim`, `out_dim`, `text_dim`, `latent_channels`) are the
core's; the others are diffusers'.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from mm_core.config.section import SectionModel, invalid

# Far above every model there is: a slip of the keyboard is an error here rather than a build without end.
Channels = Annotated[int, Field(ge=1, le=2**16)]
Width = Annotated[int, Field(ge=1, le=2**18)]
Count = Annotated[int, Field(ge=1, le=1000)]
Heads = Annotated[int, Field(ge=1, le=4096)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16384)]
Patch = Annotated[int, Field(ge=1, le=64)]
Positive = Annotated[float, Field(gt=0.0)]
FrameRate = Annotated[float, Field(gt=0.0, le=1000.0)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
T = TypeVar("T")

VAE_FRAMES = 8
"""Frames of a video for one of its latents, with the three halvings of the published autoencoders."""


class LTXDiTConfig(SectionModel):
    """`predictor` with `model_id: ltx_dit`: the transformer of LTX-Video (HaCohen et al., 2024). The
    defaults are those of the published 2B model.
    """

    in_dim: Channels = 128
    out_dim: Channels = 128
    patch_size: tuple[Patch, Patch, Patch] = (1, 1, 1)
    """Latent frames, rows and columns of one token; rows and columns are equal."""
    num_heads: Heads = 32
    head_dim: Width = 64
    num_layers: Count = 28
    text_dim: Width = 4096
    cross_attention_dim: Width | None = None
    """Width of the captions inside the model, `num_heads * head_dim`; the plugin's hook fills it."""
    norm_eps: Positive = 1e-6
    frame_rate: FrameRate = 25.0
    """Frames a second of the videos: rotary positions along time are seconds."""
    temporal_compression: Count = VAE_FRAMES
    """Frames of a video for one of its latents, by the autoencoder."""
    spatial_compression: Count = 32
    """Pixels along a side for one of its latents, by the autoencoder."""
    checkpoint_keys: Literal["diffusers", "lightricks"] = "diffusers"
    """How a folder that is written names its tensors. Both spellings are read."""

    @property
    def width(self) -> int:
        """Channels of a token inside the model."""
        return self.num_heads * self.head_dim

    @model_validator(mode="after")
    def _check(self) -> LTXDiTConfig:
        if self.width % 2 or self.width < 6:
            raise invalid(
                "head_dim",
                f"num_heads * head_dim is {self.width}: rotary embedding of three axes needs an even number "
                "of at least 6",
            )
        if self.cross_attention_dim not in (None, self.width):
            raise invalid(
                "cross_attention_dim",
                f"cross_attention_dim {self.cross_attention_dim} is not num_heads * head_dim, {self.width}: "
                "captions are projected to the model's width; leave it out",
            )
        if self.patch_size[1] != self.patch_size[2]:
            raise invalid("patch_size", f"patch_size {list(self.patch_size)}: rows and columns must be equal")
        if self.in_dim != self.out_dim:
            raise invalid(
                "out_dim",
                f"in_dim {self.in_dim} and out_dim {self.out_dim} differ, but text to video reads and "
                "predicts the same latent channels",
            )
        return self


class LTXFlowMatchSchedulerConfig(SectionModel):
    """`diffusion` with `model_id: ltx_flow_match`: rectified flow whose noise level grows with the number of
    tokens. The defaults are the published ones.
    """

    num_train_timesteps: Steps = 1000
    num_inference_timesteps: Steps | None = None
    guidance_scale: float = 0.0
    base_shift: float = 0.95
    """Shift, as a logarithm, at `base_seq_len` tokens."""
    max_shift: float = 2.05
    """Shift, as a logarithm, at `max_seq_len` tokens; a straight line through both, also beyond them."""
    base_seq_len: Tokens = 1024
    max_seq_len: Tokens = 4096
    shift_terminal: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.1
    """Sigma of the last step when a video is made; None leaves the shifted grid as it is."""
    timestep_std: Positive = 1.0
    """Spread of the logit-normal distribution from which training draws sigmas."""

    @model_validator(mode="after")
    def _check(self) -> LTXFlowMatchSchedulerConfig:
        if self.base_seq_len >= self.max_seq_len:
            raise invalid(
                "base_seq_len",
                f"base_seq_len {self.base_seq_len} must be below max_seq_len {self.max_seq_len}",
            )
        return self


class LTXVideoVAEConfig(SectionModel):
    """`ae` with `model_id: ltx_video_vae`: diffusers' AutoencoderKLLTXVideo with normalised latents.

    The second group of fields describes the network. They are for `init: random`; a pretrained folder brings
    its own, and one given beside it must agree.
    """

    do_sample: bool = True
    """Draw latents from the posterior; otherwise take its mode."""
    enable_tiling: bool = False
    decode_timestep: UnitInterval = 0.0
    """What a pretrained decoder with `timestep_conditioning` (0.9.1 and later) is told; others ignore it."""

    latent_channels: Channels | None = None
    block_out_channels: list[Channels] | None = None
    layers_per_block: list[Count] | None = None
    spatio_temporal_scaling: list[bool] | None = None
    patch_size: Patch | None = None
    resnet_norm_eps: Positive | None = None
    scaling_factor: Positive | None = None
    encoder_causal: bool | None = None
    decoder_causal: bool | None = None
    latents_mean: list[float] | None = None
    """One number for each latent channel; zeros by default. A pretrained folder holds its own."""
    latents_std: list[Positive] | None = None
    """One number for each latent channel; ones by default. A pretrained folder holds its own."""

    @model_validator(mode="after")
    def _check(self) -> LTXVideoVAEConfig:
        blocks = _or(self.block_out_channels, (128, 256, 512, 512))
        for name, expected, why in (
            ("spatio_temporal_scaling", len(blocks), "one for each entry of block_out_channels"),
            ("layers_per_block", len(blocks) + 1, "one for each entry of block_out_channels and one more"),
        ):
            values = getattr(self, name)
            given = len(values) if values is not None else 4 + (name == "layers_per_block")
            if given != expected:
                raise invalid(name, f"{name} has {given} entries, but needs {expected}: {why}")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            channels = _or(self.latent_channels, 128)
            if values is not None and len(values) != channels:
                raise invalid(name, f"{name} has {len(values)} entries for {channels} latent channels")
        return self

    @property
    def factors(self) -> tuple[int, int]:
        """Frames, and pixels along a side, for one latent."""
        halvings = 2 ** sum(_or(self.spatio_temporal_scaling, (True, True, True, False)))
        return halvings, halvings * _or(self.patch_size, 4)

    def size_problem(self, frames: int, height: int, width: int) -> str | None:
        """Return why a video of these sizes cannot be encoded, or None."""
        temporal, spatial = self.factors
        if (frames - 1) % temporal:
            near = 1 + (frames - 1) // temporal * temporal
            return f"frames must be {temporal}k + 1; nearest are {near} and {near + temporal}"
        for side, size in (("height", height), ("width", width)):
            if size % spatial:
                near = size // spatial * spatial
                choices = f"nearest are {near} and {near + spatial}" if near else f"at least {spatial}"
                return f"{side} must be a multiple of {spatial}; {choices}"
        return None


class LTXPipelineConfig(SectionModel):
    """`pipeline_config` with `pipeline_class: LTXPipeline`."""

    input_size: tuple[Side, Side, Side]
    """Frames, height and width of the video in pixels."""
    frame_rate: FrameRate | None = None
    """Frames a second that the model is told; by default the predictor's own."""
    negative_prompt: str | None = None
    seed: int | None = None


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
