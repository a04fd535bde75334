"""A second expert in a model file: its section, and what it needs beside it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.experts import trained_sigmas
from mm_core.config.findings import Finding
from mm_core.config.model import COMPONENT_SECTIONS, SECOND
from mm_core.config.origin import KeyPath

if TYPE_CHECKING:
    from mm_core.config.flags import TrainFlags
    from mm_core.config.fsdp2 import Fsdp2Config

_PATH: KeyPath = (SECOND,)


def with_second_expert(document: Document) -> tuple[Document, list[tuple[str, str]]]:
    """Make a section of `low_noise_predictor` when it is a folder: the predictor's, with its weights from there.

    Returns:
        The document, and the sections of components in it with their roles.
    """
    sections = [(name, name) for name in COMPONENT_SECTIONS]
    second = document.data.get(SECOND)
    if second is None:
        return document, sections
    predictor = document.data.get("predictor")
    if isinstance(second, str) and isinstance(predictor, Mapping):
        section = {key: value for key, value in predictor.items() if key != "init"}
        document = document.replaced(_PATH, {**section, "from_pretrained": second}, document.origin(_PATH))
    return document, [*sections, (SECOND, "predictor")]


def without_repeated(findings: Iterable[Finding], written: Document | None) -> list[Finding]:
    """Leave out what is said of a section that was copied from the first expert's, where it is said already.

    Args:
        written: the file as it was read.
    """
    copied = written is not None and isinstance(written.data.get(SECOND), str)
    return [f for f in findings if not (copied and f.path.startswith(f"{SECOND}."))]


def check_both_experts(
    components: Mapping[str, ComponentConfig], document: Document, flags: TrainFlags | None = None
) -> Iterator[Finding]:
    """Two experts are trained in one job if there are two predictors and `diffusion` says where the second takes over; one of
    them alone is a mistake.

    Raises:
        UserError: see `mm_core.config.experts.trained_sigmas`.
    """
    diffusion = components.get("diffusion")
    if diffusion is None:
        return
    sigmas = trained_sigmas(diffusion)
    boundary = None if sigmas is None else sigmas.boundary
    if SECOND not in components:
        if sigmas is not None and boundary is not None and document.data.get(SECOND) is None:
            path: KeyPath = (*diffusion.path, sigmas.low_key)
            text = f"{sigmas.low_key} {boundary:g} without expert parts the noise levels between two experts, but there is one"
            mend = 'Give low_noise_predictor (a section, or its folder of weights), or expert "high" or "low"'
            yield Finding.at(document.origin(path), "error", "experts", text, path=path, suggestion=mend)
        return
    if boundary is None:
        key = "boundary" if sigmas is None else sigmas.low_key
        text = f"{SECOND} is given, but {diffusion.label} does not say at which noise level it takes over"
        told = sigmas is not None and sigmas.edge is not None
        mend = (
            f"Write diffusion.boundary (a sigma, 0.875 say) without expert in place of {key}, or leave {SECOND} out to "
            "train one expert"
            if told
            else f"Give diffusion.boundary (a sigma, 0.875 say), or leave {SECOND} out to train one expert"
        )
        yield Finding.at(document.key_origin(_PATH), "error", "experts", text, path=_PATH, suggestion=mend)
    if flags is None:
        return
    if flags.pipeline_model_parallel_size > 1:
        text = f"{flags.pipeline_model_parallel_size}: pipeline stages are cut from one network, and two experts are trained"
        mend = "Set it to 1, or train one expert at a time (boundary with expert)"
        yield flags.finding("pipeline_model_parallel_size", "conflict", text, mend)


def check_idle(
    components: Mapping[str, ComponentConfig], fsdp2: Fsdp2Config, document: Document
) -> Iterator[Finding]:
    """`offload_idle_predictor` does nothing for one predictor.

    Args:
        document: the sharding file.
    """
    if fsdp2.offload_idle_predictor and SECOND not in components:
        path: KeyPath = ("offload_idle_predictor",)
        text = "offload_idle_predictor has no effect here: one predictor is trained, and it is never idle"
        yield Finding.at(document.origin(path), "note", "no-effect", text, path=path)
