"""The frames that a generation job is given: which files, for which prompt, and whether the network takes them.

A predictor's config class may have, torch-free, `given_frames`: a property, as `GivenFrames`. Without one nothing is
checked before the pipeline is built, which then says by itself whether it takes images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mm_core.config.component import ComponentConfig
from mm_core.config.conditions import GivenFrames
from mm_core.config.cross_checks import check_path, missing_path
from mm_core.config.document import Document, expanded
from mm_core.config.findings import Finding, Level
from mm_core.config.origin import KeyPath
from mm_registry.errors import UserError

FIRST, LAST, PAIR = "image", "last_image", "dual_image"
_LISTS = (".txt",)
_PROCESSOR = ("ae", "i2v_processor")


@dataclass(frozen=True, slots=True)
class Images:
    """Files of first and of last frames, each as long as there are videos, or empty."""

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


def read_images(document: Document, prompts: int) -> tuple[Images, int, list[Finding]]:
    """Read the keys `image`, `last_image` and `dual_image` of an inference file.

    One image serves all prompts, and one prompt all images.

    Args:
        document: with the keys' types right.
        prompts: how many there are.

    Returns:
        The files, how many different inputs there are, and what is wrong.
    """
    found: list[Finding] = []
    lists: dict[str, tuple[str, ...]] = {}
    pairs = document.data.get(PAIR)
    for key in (FIRST, LAST):
        value = document.data.get(key)
        if value is not None and pairs is not None:
            origin, path = document.key_origin((PAIR,)), (PAIR,)
            text = f'"{PAIR}" names first and last frames, and so does "{key}"'
            found.append(Finding.at(origin, "error", "twice", text, path=path, suggestion="Remove one"))
            return Images(), prompts, found
        lists[key], wrong = _files(document, (key,), value)
        found += wrong
    if pairs is not None:
        lists[FIRST], lists[LAST], wrong = _pairs(document, pairs)
        found += wrong
    if found:
        return Images(), prompts, found
    inputs = max(prompts, *map(len, lists.values()))
    for key, files in lists.items():
        if files and len(files) not in (1, inputs):
            path = (PAIR if pairs is not None else key,)
            text = f'"{path[0]}" names {len(files)} files for {inputs} prompts or images of another key'
            mend = "Give as many as there are prompts, or one for all"
            found.append(
                Finding.at(document.origin(path), "error", "count", text, path=path, suggestion=mend)
            )
    if prompts not in (0, 1, inputs):
        text = f"there are {prompts} prompts for {inputs} images"
        mend = "Give as many prompts as images, or one for all"
        path = ("prompt",)
        found.append(Finding.at(document.origin(path), "error", "count", text, path=path, suggestion=mend))
    if lists[LAST] and not lists[FIRST]:
        text = f'"{LAST}" is given without "{FIRST}": a video with a last frame begins with a given one'
        found.append(Finding.at(document.origin((LAST,)), "error", "missing-key", text, path=(LAST,)))
    spread = {key: files * inputs if len(files) == 1 else files for key, files in lists.items()}
    return Images(spread[FIRST], spread[LAST]), inputs, found


def check_given_frames(
    predictor: ComponentConfig, document: Document, task: str | None, level: Level
) -> Iterator[Finding]:
    """The network must take the images that the file gives, and be given those that it needs.

    Args:
        task: `t2v` or `i2v` if the file says so.
        level: of an image that is missing; the command line may give it.

    Raises:
        UserError: the property of a plugin's class raised; its distribution is named.
    """
    keys = {key for key in (FIRST, LAST, PAIR) if document.data.get(key) is not None}
    first, last = bool(keys & {FIRST, PAIR}), bool(keys & {LAST, PAIR})
    path: KeyPath
    if task is not None and (task == "i2v") != first:
        path = ("task",)
        text = f'"task" is "{task}", but {"there is an image" if first else "no image is given"}'
        mend = 'Write "task": "i2v"' if first else "Add --image FILE"
        severity = "error" if first else level
        yield Finding.at(document.origin(path), severity, "image", text, path=path, suggestion=mend)
        return
    takes = _told(predictor, "given_frames")
    if not isinstance(takes, GivenFrames):
        return
    kind = predictor.fields.get("model_type")
    label = predictor.label if kind is None else f"{predictor.label} of model_type {kind}"
    for name, rule, has, key in (
        ("first", takes.first, first, FIRST),
        ("last", takes.last, last, LAST),
    ):
        if has and rule == "never":
            written = PAIR if PAIR in keys else key
            text = f'"{written}" is given, but {label} takes no {name} frame'
            yield Finding.at(document.origin((written,)), "error", "image", text, path=(written,))
        elif not has and rule == "must":
            text = f"{label} needs a {name} frame"
            mend = f"Add --{key.replace('_', '-')} FILE"
            origin = document.key_origin(predictor.path)
            yield Finding.at(origin, level, "image", text, path=(key,), suggestion=mend)


def check_conditions_made(
    components: Mapping[str, ComponentConfig], document: Document, level: Level
) -> Iterator[Finding]:
    """What the predictor needs of given frames must be made: by ae.i2v_processor, else by what the pipeline brings, whose
    config class may tell it as `conditions`.

    Args:
        level: of a folder that is missing.

    Raises:
        UserError: the property of a plugin's class raised; its distribution is named.
    """
    processor, pipeline = components.get(".".join(_PROCESSOR)), components.get("pipeline")
    predictor = components.get("predictor")
    yield from check_path(document, (*_PROCESSOR, "image_encoder"), "folder", level)
    maker = processor or pipeline
    if predictor is None or maker is None:
        return
    takes, made = _told(predictor, "conditions"), _told(maker, "conditions")
    if not isinstance(takes, Mapping) or not isinstance(made, frozenset | set):
        return
    for name in (name for name, needed in takes.items() if needed and name not in made):
        path = (*predictor.path, "model_type") if "model_type" in predictor.fields else predictor.path
        text = f"{predictor.label} needs {name}, which {maker.label} does not make of the given frames"
        switches = _told(processor, "switches") if processor is not None else {}
        key = switches.get(name) if isinstance(switches, Mapping) else None
        mend = "Give ae.i2v_processor, or another one" if key is None else f"Give its {key}"
        if processor is None:
            mend = "Give ae an i2v_processor that does"
        yield Finding.at(document.origin(path), "error", "condition", text, path=path, suggestion=mend)


def _told(component: ComponentConfig, name: str) -> Any:
    try:
        return getattr(component.config, name, None)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{component.label}: {name} of {component.spec.provider}'s config class raised {text}"
        ) from error


def _files(document: Document, path: KeyPath, value: object) -> tuple[tuple[str, ...], list[Finding]]:
    """The files that a key names: one, a list, or those in a .txt file, one a line."""
    if value is None:
        return (), []
    if isinstance(value, list):
        texts = [str(text).strip() for text in value]
    elif str(value).lower().endswith(_LISTS):
        lines, wrong = _lines(document, path, str(value))
        if wrong:
            return (), wrong
        texts = lines
    else:
        texts = [str(value).strip()]
    return tuple(texts), [finding for text in texts for finding in _missing(document, path, value, text)]


def _pairs(document: Document, value: object) -> tuple[tuple[str, ...], tuple[str, ...], list[Finding]]:
    """First and last frames: `[first, last]`, a list of such pairs, or a .txt file with `first,last` a line."""
    path: KeyPath = (PAIR,)
    rows: list[list[str]]
    if isinstance(value, str):
        lines, wrong = _lines(document, path, value)
        if wrong:
            return (), (), wrong
        rows = [[part.strip() for part in line.split(",")] for line in lines]
    else:
        assert isinstance(value, list)
        rows = [value] if all(isinstance(each, str) for each in value) else value
    odd = next((row for row in rows if len(row) != 2), None)
    if odd is not None or not rows:
        text = f'"{PAIR}" has {odd or "no pair"}, which is not a first and a last frame'
        mend = 'Write ["first.png", "last.png"], a list of such pairs, or a .txt file with first,last a line'
        return (), (), [Finding.at(document.origin(path), "error", "image", text, path=path, suggestion=mend)]
    found = [finding for row in rows for text in row for finding in _missing(document, path, value, text)]
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows), found


def _lines(document: Document, path: KeyPath, value: str) -> tuple[list[str], list[Finding]]:
    file = expanded(value)
    if not file.is_file():
        return [], [missing_path(document, path, value, "file")]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        text = f'"{value}" cannot be read as UTF-8 text: {error}'
        return [], [Finding.at(document.origin(path), "error", "unreadable", text, path=path)]
    lines = [line for line in lines if line]
    if not lines:
        text = f'"{value}" names no file'
        return [], [Finding.at(document.origin(path), "error", "image", text, path=path)]
    return lines, []


def _missing(document: Document, path: KeyPath, value: object, text: str) -> Iterator[Finding]:
    """The finding about one image that is not there; the file that lists it is named too."""
    try:
        if text and expanded(text).is_file():
            return
    except OSError:
        pass  # said as a file that is not there
    finding = missing_path(document, path, text, "file")
    if isinstance(value, str) and value != text:
        finding = Finding.at(
            document.origin(path),
            finding.level,
            finding.code,
            f"{value}, which {path[0]} names, has {finding.message.partition(' is ')[2]}",
            path=path,
            suggestion=finding.suggestion,
        )
    yield finding
