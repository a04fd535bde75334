"""What a section may say. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel
from mm_core.config.transformers_model import TransformersFamilyConfig

Size = Annotated[int, Field(ge=1, le=64)]


class ToyDiTConfig(SectionModel):
    channels: Size = 4
    width: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 8
    text_dim: Size = 6
    num_layers: Size = 2


class ToyVAEConfig(SectionModel):
    latent_channels: Size = 4

    def size_problem(self, frames: int, height: int, width: int) -> str | None:
        for name, size in (("height", height), ("width", width)):
            if size % 2:
                return f"{name} must be even"
        return None


class ToyTextConfig(SectionModel):
    vocab_size: Size = 16
    width: Size = 6


class ToyFlowConfig(SectionModel):
    num_train_timesteps: Annotated[int, Field(ge=2, le=10000)] = 100
    guidance_scale: float = 1.0


class ToyFirstFrameConfig(SectionModel):
    has_weights = False

    frames: Size = 1

    @property
    def conditions(self) -> frozenset[str]:
        return frozenset({"first_frames"})


class ToyClipsConfig(SectionModel):
    samples: Size = 4


class ToyNetSectionConfig(TransformersFamilyConfig):
    hf_model_type: ClassVar[str] = "toy_net"
    hf_config_keys: ClassVar[Mapping[KeyPath, KeyPath]] = {("layers",): ("num_layers",)}

    layers: Size = 2
    freeze_embedding: bool = False

    def frozen_modules(self) -> tuple[str, ...]:
        return ("embed",) if self.freeze_embedding else ()

    def attention_implementations(self) -> dict[str, str]:
        return {"": "sdpa"}


class ToyPipelineConfig(SectionModel):
    input_size: tuple[Size, Size, Size]
