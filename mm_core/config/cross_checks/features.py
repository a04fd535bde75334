"""Stored features must be those that the job's encoders would make, and what the predictor takes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, expanded
from mm_core.config.features import (
    CONDITION,
    INDEX,
    STORED,
    FeatureIndex,
    Stored,
    clip_settings,
    fingerprint,
    read_index,
    text_settings,
)
from mm_core.config.findings import Finding, show
from mm_core.config.origin import KeyPath
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.model import ModelConfig

CODE = "stored-features"
VIDEO, TEXT = "load_video_features", "load_text_features"
_BASIC: KeyPath = ("dataset_param", "basic_parameters")
_OF_VIDEO, _OF_TEXT = ("ae",), ("text_encoder",)
_OTHER_PREDICTOR = (
    "Make the features again with this model file's encoders, or give the predictor that they are for"
)


def loaded_parts(model: Any) -> tuple[str, ...]:
    """Sections of a model file whose components are not built, since what they make is stored."""
    video, text = (getattr(model, name, False) for name in (VIDEO, TEXT))
    return (*(_OF_VIDEO if video else ()), *(_OF_TEXT if text else ()))


def is_loaded(name: str, model: Any) -> bool:
    """Whether a component (`ae`, `ae.i2v_processor`, `text_encoder.0`) is one of those."""
    return name.split(".")[0] in loaded_parts(model)


def check_features(
    section: ModelConfig,
    model: Document,
    data: Document,
    components: Mapping[str, ComponentConfig],
) -> Iterator[Finding]:
    """`load_video_features` and `load_text_features` must go with a dataset of stored features that has them.

    Encoders that the model file still describes must be those that made the features; settings of data.json that decide clips
    and tokens must be those of then; latents and embeddings must be what the predictor reads.

    Args:
        components: of the job, the encoders included.
    """
    dataset = components.get("dataset")
    basic = None if dataset is None else dataset.fields.get("basic_parameters")
    if dataset is None or not isinstance(basic, Mapping) or "data_path" not in basic:
        return  # a dataset of a plugin's own; it says what its samples are
    stored = basic.get("data_storage_mode") == STORED
    wanted = {VIDEO: section.load_video_features, TEXT: section.load_text_features}
    if not stored:
        for name in (name for name, asked in wanted.items() if asked):
            text = f"{name} is true, but the samples of data_path are videos and captions"
            mend = (
                f'Make features with `mm extract-features`, name their {INDEX} as data_path and write "data_storage_mode": '
                f'"{STORED}"'
            )
            yield _at(model, (name,), text, mend)
        return
    for key in ("data_path", "val_data_path"):
        if basic.get(key) is None:
            continue
        try:
            index = read_index(str(basic[key]))
        except UserError as error:
            if expanded(str(basic[key])).is_file():  # else it is said as a path
                yield _at(data, (*_BASIC, key), str(error).removesuffix("."))
            continue
        yield from _check_index(index, wanted, model, data, components)


def _check_index(
    index: FeatureIndex,
    wanted: Mapping[str, bool],
    model: Document,
    data: Document,
    components: Mapping[str, ComponentConfig],
) -> Iterator[Finding]:
    for name, half in ((VIDEO, index.video), (TEXT, index.text)):
        what = "latents" if name == VIDEO else "embeddings of captions"
        if wanted[name] and half is None:
            mend = f"Write false, or make them with `mm extract-features --what {'video' if name == VIDEO else 'text'}`"
            yield _at(model, (name,), f"{name} is true, but {index.path} has no {what}", mend)
        elif half is not None and not wanted[name]:
            yield _at(model, (name,), f"{name} is false, but {index.path} has {what}", "Write true")
        elif half is not None:
            yield from _check_half(name, half, index, model, data, components)


def _check_half(
    name: str,
    half: Stored,
    index: FeatureIndex,
    model: Document,
    data: Document,
    components: Mapping[str, ComponentConfig],
) -> Iterator[Finding]:
    heads = _OF_VIDEO if name == VIDEO else _OF_TEXT
    for part, component in components.items():
        if part.split(".")[0] not in heads:
            continue
        made = half.encoders.get(part)
        if made is None:
            text = (
                f"{component.label} is described here, but the features in {index.path} were made without it"
            )
            yield _at(model, component.path, text, "Make them again, or remove the section")
        elif fingerprint(component) != made:
            text = f"the features in {index.path} were made by another {component.label}: section or weights differ"
            mend = "Make them again with `mm extract-features`, or give the section and the weights of then"
            yield _at(model, component.path, text, mend)
    dataset = components["dataset"]
    own = clip_settings(dataset) if name == VIDEO else text_settings(dataset)
    for key, then in half.settings.items():
        now = own.get(key)
        if key not in own or now == then or (key == "tokenizer" and now is None):
            continue
        path = _place(dataset, name, key)
        text = f"{key} is {show(now)}, but the features in {index.path} were made with {show(then)}"
        if key == "tokenizer":
            text = f"the features in {index.path} were made with the tokens of another tokenizer"
        yield _at(data, path, text, "Write that, or make them again with `mm extract-features`")
    yield from _check_width(name, half, index, model, components.get("predictor"))
    if name == VIDEO:
        yield from _check_conditions(half, index, model, components.get("predictor"))


def _check_width(
    name: str, half: Stored, index: FeatureIndex, model: Document, predictor: ComponentConfig | None
) -> Iterator[Finding]:
    """The channels of latents, and the width of embeddings, as far as the predictor's section tells them."""
    tensor, axis = ("latents", 0) if name == VIDEO else ("prompt", -1)
    shape = half.tensors.get(tensor, ("", ()))[1]
    if predictor is None or not shape:
        return
    keys = ("latent_channels", "out_dim") if name == VIDEO else ("text_width", "text_dim")
    taken = getattr(predictor.config, keys[0], None)
    taken = predictor.fields.get(keys[1]) if taken is None else taken
    if isinstance(taken, int) and shape[axis] is not None and taken != shape[axis]:
        what = "channels of latents" if name == VIDEO else "channels of embeddings"
        text = f"{predictor.label} takes {taken} {what}, but those in {index.path} have {shape[axis]}"
        yield _at(model, predictor.path, text, _OTHER_PREDICTOR)


def _check_conditions(
    half: Stored, index: FeatureIndex, model: Document, predictor: ComponentConfig | None
) -> Iterator[Finding]:
    """What was made of given frames, as far as the predictor's config class tells what it takes."""
    takes = None if predictor is None else getattr(predictor.config, "conditions", None)
    if predictor is None or not isinstance(takes, Mapping):
        return
    has = {name.removeprefix(CONDITION) for name in half.tensors if name.startswith(CONDITION)}
    for name in (name for name, needed in takes.items() if needed and name not in has):
        text = f"{predictor.label} needs {name}, but {index.path} has none"
        mend = "Make the features again with the ae.i2v_processor that makes it"
        yield _at(model, predictor.path, text, mend)
    for name in sorted(has - takes.keys()):
        text = f"{predictor.label} takes no {name}, which {index.path} has"
        yield _at(model, predictor.path, text, _OTHER_PREDICTOR)


def _place(dataset: ComponentConfig, name: str, key: str) -> KeyPath:
    if name == VIDEO:
        return (*dataset.path, "preprocess_parameters", key)
    if key in ("tokenizer", "model_max_length"):
        return (*dataset.path, "tokenizer_config", "from_pretrained" if key == "tokenizer" else key)
    return (*dataset.path, key)


def _at(document: Document, path: KeyPath, text: str, mend: str = "") -> Finding:
    return Finding.at(document.origin(path), "error", CODE, text, path=path, suggestion=mend)
