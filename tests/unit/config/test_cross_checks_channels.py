"""Channels of predictor, autoencoder and text encoder: by names, and by what a predictor's config class tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_core.config import cross_checks
from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, read_document
from mm_core.config.section import SectionModel
from mm_registry import UserError
from mm_registry.spec import EntrySpec

MODEL = """\
predictor:
  model_id: dit
  in_dim: {in_dim}
  out_dim: {out_dim}
  text_dim: {text_dim}
ae:
  latent_channels: 16
text_encoder:
  config: {{d_model: 64}}
"""


class Names(SectionModel):
    """A predictor's class that only has the core's names."""

    in_dim: int
    out_dim: int
    text_dim: int


class Conditions(Names):
    """One that joins a mask and a first frame to the latents."""

    condition_channels: int = 20


class Tells(SectionModel):
    """One with names of its own."""

    in_dim: int
    out_dim: int
    text_dim: int
    groups: int = 3

    @property
    def latent_channels(self) -> int:
        return self.out_dim * self.groups

    @property
    def condition_channels(self) -> int:
        return 0

    @property
    def text_width(self) -> int:
        return self.text_dim * 2


class Broken(Names):
    @property
    def text_width(self) -> int:
        raise ZeroDivisionError("no groups")


class AutoEncoder(SectionModel):
    latent_channels: int = 16


def found(
    tmp_path: Path, cls: type[SectionModel], in_dim: int = 16, out_dim: int = 16, text_dim: int = 64
) -> list[str]:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.format(in_dim=in_dim, out_dim=out_dim, text_dim=text_dim))
    document = read_document(path)
    return [str(f).removeprefix(f"{tmp_path}/") for f in check(document, cls)]


def check(document: Document, cls: type[SectionModel]) -> Any:
    def part(role: str, config: SectionModel | None, fields: dict[str, Any]) -> ComponentConfig:
        spec = EntrySpec("x", f"mm_core.{role}", "x:X", "some-plugin", "1.0", "")
        return ComponentConfig(role, "dit", spec, config, fields, init="random", path=(role,))

    fields = {key: value for key, value in document.value(("predictor",)).items() if key != "model_id"}
    components = {
        "predictor": part("predictor", cls(**fields), fields),
        "ae": part("ae", AutoEncoder(), {"latent_channels": 16}),
        "text_encoder": part("text_encoder", None, {"config": {"d_model": 64}}),
    }
    return cross_checks.check_channels(components, document)


CASES: list[tuple[Any, dict[str, int], list[str]]] = [
    (Names, {}, []),
    (Names, {"in_dim": 36}, []),  # conditions may be joined to the latents
    (Names, {"in_dim": 4}, ["model.yaml:3:11 error: in_dim is 4, but ae (dit) has 16 latent channels. Write 16"]),
    (Names, {"in_dim": 48, "out_dim": 48},
     ["model.yaml:4:12 error: out_dim is 48, but ae (dit) has 16 latent channels. Write 16"]),
    (Names, {"text_dim": 32},
     ["model.yaml:5:13 error: text_dim is 32, but text_encoder (dit) has embeddings of 64. Write 64"]),
    (Conditions, {"in_dim": 36}, []),
    (Conditions, {"in_dim": 33},
     ["model.yaml:3:11 error: in_dim is 33, but ae (dit) has 16 latent channels and 20 of conditions are joined to them. "
      "Write 36"]),
    (Tells, {"out_dim": 4, "text_dim": 32},
     ["model.yaml:1:1 error: predictor (dit) predicts 12 channels, but ae (dit) has 16 latent channels"]),
    (Tells, {"out_dim": 4, "text_dim": 64},
     ["model.yaml:1:1 error: predictor (dit) predicts 12 channels, but ae (dit) has 16 latent channels",
      "model.yaml:1:1 error: predictor (dit) reads embeddings of 128, but text_encoder (dit) has embeddings of 64"]),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "sizes", "expected"), CASES)
def test_channels(tmp_path: Path, cls: Any, sizes: dict[str, int], expected: list[str]) -> None:
    assert found(tmp_path, cls, **sizes) == expected


def test_a_class_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"text_width of some-plugin 1\.0's config class raised ZeroDivisionError: no gr"
    ):
        found(tmp_path, Broken)
