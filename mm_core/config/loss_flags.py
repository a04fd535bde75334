"""MindSpeed-MM's flags that say how the losses of tokens are weighted: `loss_cfg.loss_type` of the model file, by flag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mm_core.config.findings import Finding, show
from mm_core.config.origin import KeyPath
from mm_core.config.section import SectionModel

if TYPE_CHECKING:
    from mm_core.config.document import Document
    from mm_core.config.flags import TrainFlags

_PATH: KeyPath = ("loss_cfg", "loss_type")
_TYPES = {
    "calculate_per_sample_loss": "per_sample_loss",
    "calculate_per_token_loss": "per_token_loss",
    "calculate_square_loss": "square_loss",
    "calculate_token_loss": "token_loss",
}
_ALIKE = ("default", "per_token_loss", "token_loss")  # names of one thing


class LossFlags(SectionModel):
    """Loss of language models"""

    calculate_per_sample_loss: Annotated[
        bool,
        Field(description="every sample counts the same, as loss_type per_sample_loss of the model file"),
    ] = False
    calculate_per_token_loss: Annotated[
        bool,
        Field(description="every learnt token counts the same, as loss_type per_token_loss; the default"),
    ] = False
    calculate_square_loss: Annotated[
        bool,
        Field(
            description="a sample of n learnt tokens counts √n, as loss_type square_loss of the model file"
        ),
    ] = False
    calculate_token_loss: Annotated[
        bool, Field(description="another name of --calculate-per-token-loss, as loss_type token_loss")
    ] = False


def with_loss_flags(
    document: Document, flags: TrainFlags, *, language: bool
) -> tuple[Document, list[Finding]]:
    """Write into the model file what the flags say of the loss.

    Args:
        document: the model file.
        language: whether it is that of a language model.

    Returns:
        The file, and errors about places that disagree.
    """
    given = [name for name in _TYPES if getattr(flags, name)]
    if not given:
        return document, []
    if not language:
        text = "it weighs the tokens of a text, and this model learns none"
        return document, [
            Finding.at(flags.origin(name), "note", "no-effect", text, path=flags.spelling(name))
            for name in given
        ]
    first, *others = given
    wanted = _TYPES[first]
    for name in others:
        if not _same(_TYPES[name], wanted):
            text = f"it asks for {_TYPES[name]}, but {flags.spelling(first)} for {wanted}"
            return document, [flags.finding(name, "conflict", text, "Keep one of them")]
    written = document.value(_PATH) if document.has(_PATH) else None
    if written is None:
        if document.has(_PATH[:1]) and not isinstance(document.value(_PATH[:1]), dict):
            return document, []  # said when the section is checked
        return document.replaced(_PATH, wanted, flags.origin(first)), []
    if _same(written, wanted):
        return document, []
    text = f"it asks for {wanted}, but loss_cfg.loss_type is {show(written)} ({document.origin(_PATH)})"
    return document, [flags.finding(first, "conflict", text, "Keep one of them")]


def _same(one: object, other: object) -> bool:
    return one == other or (one in _ALIKE and other in _ALIKE)
