"""Two experts must meet: training files of each and the inference file state one boundary, as sigma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document
from mm_core.config.experts import TrainedSigmas, trained_sigmas
from mm_core.config.findings import Finding, show
from mm_core.config.origin import KeyPath, dotted

#: Boundaries are written as fractions with three digits; one unit of the last is less than this, at every shift in use.
_TOLERANCE = 0.002
_RATIO: tuple[KeyPath, ...] = (("boundary_ratio",), ("pipeline_config", "boundary_ratio"))
#: Names of the constant shift of a flow-matching grid, in schedulers of training and of sampling.
_SHIFTS = ("flow_shift", "shift")


@dataclass(frozen=True)
class _Run:
    document: Document
    diffusion: ComponentConfig
    sigmas: TrainedSigmas

    def path(self, key: str) -> KeyPath:
        return (*self.diffusion.path, key)

    def stated(self, key: str) -> str:
        """`max_timestep_boundary 0.358 at shift 5, model.json:11:33`."""
        path = self.path(key)
        written = (
            f"{key} {show(self.document.value(path))}" if self.document.has(path) else f"{key} by default"
        )
        shift = _shift(self.diffusion)
        at = "" if shift is None or key == "boundary" else f" at shift {shift[1]:g}"
        return f"{written}{at}, {self.document.origin(path)}"


def check_experts(
    training: Sequence[tuple[Document, ComponentConfig]],
    inference: Document | None = None,
    sampler: ComponentConfig | None = None,
) -> Iterator[Finding]:
    """What training files and the inference file of one model say about its experts' noise levels must agree.

    Args:
        training: model files with their diffusion.
        inference, sampler: an inference file and its diffusion.

    Raises:
        UserError: see `mm_core.config.experts.trained_sigmas`.
    """
    runs = [
        _Run(document, diffusion, sigmas)
        for document, diffusion in training
        if (sigmas := trained_sigmas(diffusion)) is not None
    ]
    yield from _meeting(runs)
    if inference is not None:
        yield from _boundary(runs, inference)
        if sampler is not None:
            yield from _shifts(training, inference, sampler)


def _meeting(runs: Sequence[_Run]) -> Iterator[Finding]:
    """Where the high-noise expert's training ends, the low-noise expert's begins."""
    edges = [(run, edge) for run in runs if (edge := run.sigmas.edge) is not None]
    highs = [item for item in edges if item[0].sigmas.expert == "high-noise"]
    lows = [item for item in edges if item[0].sigmas.expert == "low-noise"]
    for high, (bottom, bottom_key) in highs:
        for low, (top, top_key) in lows:
            if abs(bottom - top) <= _TOLERANCE:
                continue
            what = "no expert is trained" if bottom > top else "both experts are trained"
            text = (
                f"the low-noise expert is trained from sigma {top:.4f} down ({low.stated(top_key)}), but the high-noise "
                f"expert down to {bottom:.4f} ({high.stated(bottom_key)}): between them {what}"
            )
            path = low.path(top_key)
            origin = low.document.origin(path)
            yield Finding.at(
                origin, "warning", "boundary", text, path=path, suggestion="Let both files state one boundary"
            )


def _boundary(runs: Sequence[_Run], inference: Document) -> Iterator[Finding]:
    """The sampler hands over where training did."""
    path = next((path for path in _RATIO if inference.has(path)), None)
    value = None if path is None else inference.value(path)
    if value is not None and not _is_sigma(value):
        return  # the file's own class says so
    by_edge: dict[float, list[_Run]] = {}
    for run in runs:
        edge = run.sigmas.edge
        if edge is not None and (value is None or abs(edge[0] - value) > _TOLERANCE):
            by_edge.setdefault(round(edge[0], 3), []).append(run)
    for rounded, disagreeing in by_edge.items():
        # One finding for both experts' files; the expert that is asked for what it has not seen says why it matters.
        run = next((run for run in disagreeing if _asked_for_more(run.sigmas, value)), disagreeing[0])
        edge = run.sigmas.edge
        assert edge is not None
        sigma, key = edge
        direction = "down to" if run.sigmas.expert == "high-noise" else "from"
        trained = (
            f"the {run.sigmas.expert} expert is trained {direction} sigma {sigma:.4f} ({run.stated(key)})"
        )
        mend = f"Write {rounded:g}, or train both experts with the other boundary"
        if path is None or value is None:
            text = f"boundary_ratio is not given, but {trained}: one expert would denoise what it was not trained for"
            origin = inference.origin(())
            mend = f"Give boundary_ratio {rounded:g} and low_noise_predictor"
            yield Finding.at(origin, "warning", "boundary", text, path=("boundary_ratio",), suggestion=mend)
            continue
        text = f"{dotted(path)} {show(value)} is sigma {value:.4f}, but {trained}: " + (
            "between them it denoises what it was not trained for"
            if _asked_for_more(run.sigmas, value)
            else "what it was trained for between them is left to the other expert"
        )
        yield Finding.at(inference.origin(path), "warning", "boundary", text, path=path, suggestion=mend)


def _asked_for_more(sigmas: TrainedSigmas, boundary: float | None) -> bool:
    """Whether sampling asks an expert for noise levels outside its training."""
    if boundary is None or sigmas.boundary is not None:
        return True  # of two experts, one of them
    return boundary < sigmas.low if sigmas.expert == "high-noise" else boundary > sigmas.high


def _shifts(
    training: Sequence[tuple[Document, ComponentConfig]], inference: Document, sampler: ComponentConfig
) -> Iterator[Finding]:
    """Another shift in sampling spends its steps elsewhere; both are legitimate, so it is only said."""
    own = _shift(sampler)
    if own is None:
        return
    name, value = own
    path = (*sampler.path, name)
    for document, diffusion in training:
        other = _shift(diffusion)
        if other is None or other[1] == value:
            continue
        where = document.origin((*diffusion.path, other[0]))
        text = (
            f"{name} is {value:g}, while training has {other[0]} {other[1]:g} ({where}): sampling spends its steps on "
            "other noise levels than training did, which is no mistake by itself"
        )
        yield Finding.at(inference.origin(path), "note", "shift", text, path=path)
        return


def _shift(diffusion: ComponentConfig) -> tuple[str, float] | None:
    fields: Mapping[str, Any] = diffusion.fields
    for name in _SHIFTS:
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return name, float(value)
    return None


def _is_sigma(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < 1.0
