"""What is given to a network beside the noised latents and the text must be what its type takes.

What config classes tell about it is in `mm_core.config.conditions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mm_core.config.component import ComponentConfig
from mm_core.config.conditions import GivenFrames
from mm_core.config.cross_checks.paths import check_path
from mm_core.config.document import Document
from mm_core.config.findings import Finding, Level
from mm_core.config.origin import KeyPath
from mm_registry.errors import UserError

_PROCESSOR = "ae.i2v_processor"
_PLACE: KeyPath = ("ae", "i2v_processor")
_TASK: KeyPath = ("task",)
_FIRST_FRAME: KeyPath = ("dataset_param", "preprocess_parameters", "train_pipeline", "first_frame_vae")


def check_conditions(
    components: Mapping[str, ComponentConfig],
    document: Document,
    data: Document | None = None,
    level: Level = "error",
) -> Iterator[Finding]:
    """The task, the image processor and the type of the predictor must fit together.

    Args:
        document: of the model.
        data: of the dataset; what is done to first frames there has no effect without a processor.
        level: of a folder that is missing.

    Raises:
        UserError: a property of a plugin's config class raised; its distribution is named.
    """
    processor, stored = components.get(_PROCESSOR), document.data.get("load_video_features") is True
    if processor is None and document.has(_PLACE) and document.value(_PLACE) is not None:
        return  # what is wrong with it is said elsewhere
    if processor is not None:
        yield from check_path(document, (*_PLACE, "image_encoder"), "folder", level)
    found = list(_task(processor, document, stored))
    yield from found
    for name in ("predictor", "low_noise_predictor"):
        predictor = components.get(name)
        if predictor is not None and not found:
            wrong = list(_names(predictor, processor, document, stored))
            yield from wrong
            if processor is not None and not wrong:
                yield from _frames(predictor, processor, document)
    if processor is None and data is not None and data.has(_FIRST_FRAME) and data.value(_FIRST_FRAME):
        text = '"first_frame_vae" has no effect here: this model is given no first frame (task "i2v")'
        yield Finding.at(data.key_origin(_FIRST_FRAME), "note", "no-effect", text, path=_FIRST_FRAME)


def _task(processor: ComponentConfig | None, document: Document, stored: bool) -> Iterator[Finding]:
    given = document.data.get("task", "t2v") == "i2v"
    origin = document.origin(_TASK) if document.has(_TASK) else document.key_origin(_PLACE)
    if given and processor is None and not stored:
        text = '"task" is "i2v", but no "i2v_processor" in ae makes the condition of the given frames'
        mend = 'Add ae.i2v_processor with a "processor_id"; `mm list` shows the ids'
        yield Finding.at(origin, "error", "condition", text, path=_TASK, suggestion=mend)
    elif processor is not None and not given:
        what = '"task" is "t2v"' if document.has(_TASK) else '"task" is "t2v" by default'
        text = f"{what}, but ae has an i2v_processor ({processor.model_id}), which gives the model frames"
        mend = 'Write "task": "i2v", or remove ae.i2v_processor'
        yield Finding.at(origin, "error", "condition", text, path=_TASK, suggestion=mend)


def _names(
    predictor: ComponentConfig, processor: ComponentConfig | None, document: Document, stored: bool
) -> Iterator[Finding]:
    takes = _told(predictor, "conditions")
    if not isinstance(takes, Mapping):
        return
    made = frozenset() if processor is None else _told(processor, "conditions")
    if not isinstance(made, frozenset | set):
        return
    label, path = _of_type(predictor, document)
    for name, needed in takes.items():
        if not needed or name in made or stored:
            continue
        if processor is None:
            text, mend = f"{label} needs {name}, but nothing makes it of given frames", "Add ae.i2v_processor"
            if document.data.get("task") != "i2v":
                mend += ', and "task": "i2v"'
        else:
            text = f"{label} needs {name}, which {processor.label} does not make"
            mend = _switch(processor, name)
        yield Finding.at(document.origin(path), "error", "condition", text, path=path, suggestion=mend)
    for name in sorted(made - takes.keys()):
        assert processor is not None
        place = (*processor.path, processor.id_key)
        text = f"{processor.label} makes {name}, but {label} takes no such condition"
        mend = "It takes " + " and ".join(takes) if takes else "Remove ae.i2v_processor"
        yield Finding.at(document.origin(place), "error", "condition", text, path=place, suggestion=mend)


def _frames(predictor: ComponentConfig, processor: ComponentConfig, document: Document) -> Iterator[Finding]:
    takes, gives = _told(predictor, "given_frames"), _told(processor, "given_frames")
    if not isinstance(takes, GivenFrames) or not isinstance(gives, GivenFrames):
        return
    label, path = _of_type(predictor, document)
    for which in ("first", "last"):
        wanted, given = getattr(takes, which), getattr(gives, which)
        if (wanted, given) in (("must", "never"), ("never", "must")):
            lacks = given == "never"
            text = (
                f"{label} {'needs' if lacks else 'takes no'} {'a ' if lacks else ''}{which} frame, but {processor.label} "
                f"gives {'none' if lacks else 'it'}"
            )
            mend = _switch(processor, which) if lacks else ""
            yield Finding.at(document.origin(path), "error", "condition", text, path=path, suggestion=mend)


def _switch(processor: ComponentConfig, what: str) -> str:
    switches = _told(processor, "switches")
    key = switches.get(what) if isinstance(switches, Mapping) else None
    return "Choose another processor_id" if key is None else f"Give its {key}"


def _of_type(predictor: ComponentConfig, document: Document) -> tuple[str, KeyPath]:
    """What messages call a predictor, and the place of its type."""
    path = (*predictor.path, "model_type")
    if not document.has(path):
        return predictor.label, predictor.path
    return f"{predictor.label} of model_type {document.value(path)}", path


def _told(component: ComponentConfig, name: str) -> Any:
    try:
        return getattr(component.config, name, None)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{component.label}: {name} of {component.spec.provider}'s config class raised {text}"
        ) from error
