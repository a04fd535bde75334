"""Checks between sections and files of a job. Cheap: nothing is opened but a `config.json` beside weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mm_core.config.component import WITH_WEIGHTS, ComponentConfig
from mm_core.config.document import Document, closest_path, expanded
from mm_core.config.findings import Finding, Level, clip, show
from mm_core.config.flags import TrainFlags
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.latents import check_size, latent_channels, read_hf_config
from mm_core.config.origin import KeyPath, dotted
from mm_core.config.section import SectionModel
from mm_core.config.tools import ToolsConfig


def missing_path(document: Document, path: KeyPath, value: str, what: str, level: Level = "error") -> Finding:
    """Return the finding for a path in a file that names nothing."""
    place = expanded(value)
    text, mend = f'{dotted(path)} is "{value}": ', ""
    if what == "folder" and place.is_file():
        text += "this is a file, not a folder"
        mend = f"Name the folder, {place.parent}" if place.parent.name else ""
    elif what == "file" and place.is_dir():
        text += "this is a folder, not a file"
    elif place.exists() and what in ("file", "folder"):
        text += f"this is no {what}"
    else:
        text += f"there is no such {what}"
        if not place.is_absolute():
            text += " (seen from the working directory)"
        mend = closest_path(value)
    return Finding.at(document.origin(path), level, "missing-path", text, path=path, suggestion=mend)


def check_path(document: Document, path: KeyPath, what: str, level: Level = "error") -> Iterator[Finding]:
    """What stands at `path` must name a file or folder (`what`) that exists; nothing if it is no text.

    It looks at the file rather than at checked sections, so that a mistake elsewhere hides no missing path.
    """
    value = document.value(path) if document.has(path) else None
    if not isinstance(value, str) or not value:
        return
    place = expanded(value)
    try:
        exists = {"file": place.is_file, "folder": place.is_dir}.get(what, place.exists)()
    except OSError as error:
        text = f'{dotted(path)} is "{clip(value)}", which cannot be looked at: {error.strerror}'
        yield Finding.at(document.origin(path), level, "missing-path", text, path=path)
        return
    if not exists:
        yield missing_path(document, path, value, what, level)


def check_folders(
    components: Iterable[ComponentConfig], document: Document, level: Level = "error"
) -> Iterator[Finding]:
    """Every `from_pretrained` of a component must be a folder."""
    for component in components:
        if component.from_pretrained is not None:
            yield from check_path(document, (*component.path, "from_pretrained"), "folder", level)


def check_weights(
    components: Mapping[str, ComponentConfig], document: Document, *, load: str | None, level: Level = "error"
) -> Iterator[Finding]:
    """Nothing starts from random weights unless its section says `init: random`.

    An autoencoder and a text encoder need `from_pretrained` or `init: random`; a predictor is also content
    with `--load`. A component whose config class says `has_weights = False` needs none.
    """
    for name, component in components.items():
        if component.role not in WITH_WEIGHTS or component.from_pretrained or component.init == "random":
            continue
        if isinstance(component.config, SectionModel) and not component.config.has_weights:
            continue
        predictor = component.role == "predictor"
        if predictor and load is not None and name == "predictor":
            continue
        sources = '--load, "from_pretrained"' if predictor else '"from_pretrained" (a folder)'
        origin = document.key_origin(component.path)
        yield Finding.at(
            origin,
            level if predictor else "error",
            "no-weights",
            f"{component.label} has no weights",
            path=component.path,
            suggestion=f'Give {sources}, or "init": "random" to start from random ones',
        )


def check_channels(components: Mapping[str, ComponentConfig], document: Document) -> Iterator[Finding]:
    """What one component puts out must be what the next takes in, as far as their sections or config.json
    files say.
    """
    predictor, ae = components.get("predictor"), components.get("ae")
    encoders = [component for name, component in components.items() if name.split(".")[0] == "text_encoder"]
    if predictor is None:
        return
    if ae is not None:
        latent = latent_channels(ae) or _number(ae, "z_dim", "latent_channels")
        produced = predictor.fields.get("out_dim")
        if latent is not None and isinstance(produced, int) and produced != latent:
            path = (*predictor.path, "out_dim")
            text = f"out_dim is {produced}, but {ae.label} has {latent} latent channels"
            yield Finding.at(
                document.origin(path), "error", "channels", text, path=path, suggestion=f"Write {latent}"
            )
    if len(encoders) == 1:
        width = _number(encoders[0], "d_model", "hidden_size")
        taken = predictor.fields.get("text_dim")
        if width is not None and isinstance(taken, int) and taken != width:
            path = (*predictor.path, "text_dim")
            text = f"text_dim is {taken}, but {encoders[0].label} has embeddings of {width}"
            yield Finding.at(
                document.origin(path), "error", "channels", text, path=path, suggestion=f"Write {width}"
            )


def check_clip_size(
    components: Mapping[str, ComponentConfig], dataset: ComponentConfig, document: Document
) -> Iterator[Finding]:
    """The autoencoder must be able to encode the dataset's clips."""
    ae, settings = components.get("ae"), dataset.fields.get("preprocess_parameters")
    if ae is None or not isinstance(settings, Mapping):
        return
    # Without force_resolution sides vary, and are multiples of the stride.
    fixed = settings.get("force_resolution", True)
    keys = ("num_frames", *(("max_height", "max_width") if fixed else ("hw_stride", "hw_stride")))
    places = {
        axis: (*dataset.path, "preprocess_parameters", key)
        for axis, key in zip(("frames", "height", "width"), keys, strict=True)
    }
    sizes = {axis: settings.get(path[-1]) for axis, path in places.items()}
    yield from check_size(ae, document, places, sizes)


def check_video_size(components: Mapping[str, ComponentConfig], document: Document) -> Iterator[Finding]:
    """The autoencoder must have latents of the size of the video that is generated."""
    ae, pipeline = components.get("ae"), components.get("pipeline")
    size = pipeline.fields.get("input_size") if pipeline is not None else None
    if ae is None or pipeline is None or not isinstance(size, list | tuple) or len(size) != 3:
        return
    axes = ("frames", "height", "width")
    places = {axis: (*pipeline.path, "input_size", index) for index, axis in enumerate(axes)}
    yield from check_size(ae, document, places, dict(zip(axes, size, strict=True)))


def check_text(
    components: Mapping[str, ComponentConfig],
    model: Document,
    tokens: int | None,
    tokenizer: Document,
    path: KeyPath,
) -> Iterator[Finding]:
    """The tokenizer must not make more tokens than the predictor reads, and there is one tokenizer.

    Args:
        tokens: `model_max_length` of the tokenizer, None if it is not known here.
        tokenizer, path: where that stands.
    """
    predictor = components.get("predictor")
    room = predictor.fields.get("text_len") if predictor is not None else None
    if predictor is not None and isinstance(room, int) and tokens is not None and tokens > room:
        text = f"model_max_length is {tokens}, but {predictor.label} reads {room} tokens (text_len)"
        mend = f"Write {room}, or raise text_len"
        yield Finding.at(tokenizer.origin(path), "error", "text-length", text, path=path, suggestion=mend)
    if "text_encoder.1" in components:
        place = components["text_encoder.1"].path
        text = "the captions are tokenised once, for one text encoder"
        mend = "Keep one section"
        yield Finding.at(model.key_origin(place), "error", "text-encoders", text, path=place, suggestion=mend)


def _number(component: ComponentConfig, *names: str) -> int | None:
    """Return a size that the section states (itself or in `config`), or the config.json of its pretrained
    folder.
    """
    nested = component.fields.get("config")
    sources: list[Mapping[str, Any]] = [component.fields]
    if isinstance(nested, Mapping):
        sources.append(nested)
    if component.init == "pretrained" and component.from_pretrained:
        sources.append(read_hf_config(expanded(component.from_pretrained)))
    for source in sources:
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def check_ranks(
    flags: TrainFlags, fsdp2: Fsdp2Config, document: Document, tools: ToolsConfig, ranks: int
) -> Iterator[Finding]:
    """The numbers of ranks, samples and shards must divide each other."""
    batch = flags.check_batch(ranks)
    if batch is not None and "global_batch_size" in flags.model_fields_set:
        yield batch
    size = fsdp2.shard_group_size(ranks)
    if ranks % size:
        text = (
            f"sharding_size is {size}, which does not divide the {ranks} "
            f"rank{'s' if ranks > 1 else ''} of the job"
        )
        mend = 'Write "auto" for all ranks, or a divisor'
        path: KeyPath = ("sharding_size",)
        yield Finding.at(document.origin(path), "error", "ranks", text, path=path, suggestion=mend)
    wanted = tools.profile.ranks
    if tools.profile.enable and -1 not in wanted and min(wanted) >= ranks:
        text = (
            f"profile.ranks is {show(wanted)}, but the job has ranks 0 to {ranks - 1}: nothing "
            "would be profiled"
        )
        yield Finding("error", "ranks", text, flags.mm_tool, path="profile.ranks")


def check_load(flags: TrainFlags) -> Iterator[Finding]:
    """`--load` must exist."""
    if flags.load is None:
        return
    place, shown = expanded(flags.load), clip(flags.load)
    try:
        exists, is_file = place.exists(), place.is_file()
    except OSError as error:
        yield flags.finding("load", "missing-path", f'"{shown}" cannot be looked at: {error.strerror}')
        return
    if is_file:
        yield flags.finding("load", "missing-path", f'"{shown}" is a file, not a folder')
    elif not exists:
        text = f'"{shown}": there is no such folder'
        yield flags.finding("load", "missing-path", text, closest_path(flags.load))
