"""One file for a whole job: MindSpeed-MM's combined YAML, and `job.yaml`, a superset of it.

    plugins: [mmzoo-plugin-wan22]      # as in model.json
    gpt_args: {lr: 1.0e-4}             # flags, with _; also under the name `flags`; lora_args likewise
    model: {predictor: {}}             # each of the four an object, or the path of a file
    data: data.json
    tools: {profile: {}}
    fsdp2: fsdp2.yaml
    MM_TOOL_PATH: tools.json           # of the combined YAML: its relative paths are meant from the working directory
    ANCHOR: &ANCHOR value              # any other name in capitals holds a value for aliases

Any other key is an error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_core.config.document import Document, closest_path, expanded, read_document
from mm_core.config.findings import ConfigError, Finding, clip, closest, show
from mm_core.config.flags import TrainFlags
from mm_core.config.kinds import JOB_KINDS, Kind, detect_kind, expect_kind, read_kind, without_schema
from mm_core.config.origin import KeyPath, Origin, dotted
from mm_core.config.overrides import FLAG_OF, FLAG_SECTIONS, SECTIONS, apply_overrides
from mm_core.config.paths import PATH_KEYS, Paths

TOOL_PATH = "MM_TOOL_PATH"
KEYS = (*SECTIONS, *FLAG_SECTIONS, "plugins", TOOL_PATH)
_SECTION_OF = {flag: section for section, flag in FLAG_OF.items()}


@dataclass(frozen=True)
class FlagEntry:
    """A flag as a job file has it: plain data, the place of the value and of its name, and its dotted path."""

    value: Any
    origin: Origin
    key: Origin
    path: str


@dataclass
class JobFile:
    """The content of a job file.

    Attributes:
        path: as the user named it.
        classic: whether it is a combined YAML of MindSpeed-MM.
        sections: those written in the file itself, as documents with the file's places.
        plugins: the document and path of `plugins`, if it is given.
        flags: attribute -> entry, of gpt_args and lora_args, and of sections that are paths.
        findings: what is wrong with the file as such; nothing about the values of flags and sections.
    """

    path: str
    classic: bool
    sections: dict[str, Document] = field(default_factory=dict)
    plugins: Document | None = None
    flags: dict[str, FlagEntry] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def read_job_file(path: str) -> JobFile:
    """Read a job file.

    Raises:
        ConfigError: it cannot be read, or is another kind of file.
    """
    document = without_schema(read_document(path))
    kind = detect_kind(document)
    if kind not in JOB_KINDS:
        article = "an" if kind is Kind.INFERENCE else "a"
        what = f"this is {article} {kind} by its keys" if kind else "none of its keys is one of a job file"
        flag = {
            Kind.MODEL: "--mm-model ", Kind.DATA: "--mm-data ", Kind.TOOLS: "--mm-tool ",
            Kind.FSDP2: "--fsdp2-config-path ",
        }.get(kind or Kind.INFERENCE)  # fmt: skip
        mend = f"Write {flag}{path}" if flag else f"A job file has {', '.join((*SECTIONS, 'gpt_args'))}"
        raise ConfigError(
            [Finding("error", "wrong-file", f"{what}, expected a job file", path, suggestion=mend)]
        )
    return from_document(document)


def from_document(document: Document) -> JobFile:
    """Take a job file's document apart."""
    job = JobFile(document.path, TOOL_PATH in document.data)
    paths = Paths(document.path, job.classic)
    flags = [key for key in FLAG_SECTIONS if key in document.data]
    if "gpt_args" in flags and "flags" in flags:
        _twice(job, document, ("flags",), '"flags" and "gpt_args" are two names of one thing', ("gpt_args",))
        flags.remove("flags")
    for key in flags:
        _collect_flags(job, document, (key,), paths)
    # An alias has the place of what it stands for.
    held = Counter(document.origins.values())
    for key, value in document.data.items():
        if key in SECTIONS:
            _section(job, document, key, value, paths)
        elif key == TOOL_PATH:
            _tool_path(job, document, value, paths)
        elif key == "plugins":
            job.plugins = document
        elif key not in FLAG_SECTIONS:
            _holder(job, document, key, value, aliased=held[document.origin((key,))] > 1)
    for key, section in job.sections.items():
        other = job.flags.pop(FLAG_OF[key], None)
        if other is not None:
            text = f"the {key} section is given twice: it is written at {section.origin(())} too"
            job.findings.append(given_twice(other.key, text, other.path))
    job.findings += paths.notes
    return job


def _section(job: JobFile, document: Document, key: str, value: Any, paths: Paths) -> None:
    if isinstance(value, Mapping):
        job.sections[key] = paths.in_document(without_schema(document.section((key,))), key)
    elif isinstance(value, str) and value:
        _path_of_section(job, document, (key,), FLAG_OF[key], paths)
    elif value is not None:
        text = f'"{key}" is {show(value)}, expected an object or the path of a file'
        job.findings.append(Finding.at(document.origin((key,)), "error", "wrong-type", text, path=(key,)))


def _tool_path(job: JobFile, document: Document, value: Any, paths: Paths) -> None:
    if isinstance(value, str) and value:
        _path_of_section(job, document, (TOOL_PATH,), "mm_tool", paths)
    elif value not in (None, ""):
        text = f'"{TOOL_PATH}" is {show(value)}, expected the path of the tools file'
        origin = document.origin((TOOL_PATH,))
        job.findings.append(Finding.at(origin, "error", "wrong-type", text, path=TOOL_PATH))


def _path_of_section(job: JobFile, document: Document, path: KeyPath, flag: str, paths: Paths) -> None:
    """A section that is the path of a file is the flag that names the file."""
    before = job.flags.get(flag)
    if before is not None:
        text = f"the {_SECTION_OF[flag]} file is given twice: at {before.key} too, as {before.path}"
        job.findings.append(given_twice(document.key_origin(path), text, path))
        return
    origin = document.origin(path)
    seen = paths.seen(document.value(path), origin, str(path[0]), ())
    job.flags[flag] = FlagEntry(seen, origin, document.key_origin(path), dotted(path))


def _collect_flags(job: JobFile, document: Document, path: KeyPath, paths: Paths) -> None:
    """Take the flags of an object, and of objects inside it, which only group them."""
    node = document.value(path)
    if node is None:
        return
    if not isinstance(node, Mapping):
        text = f'"{dotted(path)}" is {show(node)}, expected an object of flags'
        job.findings.append(Finding.at(document.origin(path), "error", "wrong-type", text, path=path))
        return
    for key, value in node.items():
        place: KeyPath = (*path, key)
        name = key.removeprefix("--").replace("-", "_")
        if isinstance(value, Mapping):
            if name in TrainFlags.model_fields:
                text = f'"{dotted(place)}" is {show(value, place)}, expected the value of a flag'
                origin = document.origin(place)
                job.findings.append(Finding.at(origin, "error", "wrong-type", text, path=place))
            else:
                _collect_flags(job, document, place, paths)
            continue
        before = job.flags.get(name)
        if before is not None:
            _twice(job, document, place, f'"{clip(key)}" is given twice', before)
            continue
        if value is None:
            continue
        origin = document.origin(place)
        if name in PATH_KEYS and isinstance(value, str):
            value = paths.seen(value, origin, str(path[0]), (key,))
        job.flags[name] = FlagEntry(value, origin, document.key_origin(place), dotted(place))


def _twice(job: JobFile, document: Document, path: KeyPath, text: str, first: FlagEntry | KeyPath) -> None:
    place = first.key if isinstance(first, FlagEntry) else document.key_origin(first)
    job.findings.append(given_twice(document.key_origin(path), f"{text}, first at {place}", path))


def _holder(job: JobFile, document: Document, key: str, value: Any, *, aliased: bool) -> None:
    """A name in capitals may hold a scalar, which aliases repeat; any other key is unknown."""
    origin, path = document.key_origin((key,)), (key,)
    capitals = key.isupper() and key.replace("_", "").isalnum()
    # FSDP2_PATH is a name of its own, however near it is to fsdp2; MODEL is not.
    lower = key.lower() if key.lower() in KEYS else None
    near = lower or closest(key, [TOOL_PATH] if capitals else KEYS)
    mend = f'Did you mean "{near}"?' if near else ""
    if not capitals or isinstance(value, Mapping | list):
        text = f'unknown key "{clip(key)}" in the job file'
        if capitals:
            what = "a list" if isinstance(value, list) else "an object"
            text = f'"{clip(key)}" is {what}: a name in capitals holds one plain value, for aliases'
        mend = mend or f"Known keys: {', '.join(KEYS)}"
        job.findings.append(Finding.at(origin, "error", "unknown-key", text, path=path, suggestion=mend))
        return
    if aliased:
        return
    if near:
        text = f'unknown key "{clip(key)}" in the job file'
        job.findings.append(Finding.at(origin, "error", "unknown-key", text, path=path, suggestion=mend))
    else:
        text = f'nothing refers to "{clip(key)}"'
        job.findings.append(Finding.at(origin, "note", "no-effect", text, path=path))


def given_twice(origin: Origin, text: str, path: KeyPath | str) -> Finding:
    """Return the error about the second of two places that say one thing."""
    return Finding.at(origin, "error", "given-twice", text, path=path, suggestion="Keep one of them")


def read_section(flags: TrainFlags, section: str, kind: Kind) -> tuple[Document | None, list[Finding]]:
    """Return one section of a job, from the job file or a file of its own, with what the command line says anew; None
    if nobody gives it. The findings are errors of the command line and of `plugins`.

    Raises:
        ConfigError: its file cannot be read, or is of another kind.
    """
    named: str | None = getattr(flags, FLAG_OF[section])
    document = flags.sections.get(section)
    if named is not None:
        missing = missing_file(flags, section)
        if missing is not None and missing.line is not None:
            raise ConfigError([missing])  # it says where the name stands
        document = read_kind(named, kind)
    elif document is not None:
        document = expect_kind(document, kind, section)
    findings: list[Finding] = []
    if section == "model" and flags.plugins is not None:
        document, findings = _with_plugins(document, flags.plugins)
    if any(override.section == section for override in flags.overrides):
        start = document or Document.from_data({}, Origin("flag", detail="command line"))
        document, found = apply_overrides(start, flags.overrides, section)
        findings += found
    return document, findings


def missing_file(flags: TrainFlags, section: str) -> Finding | None:
    """Return the error if a section is the path of a file that does not exist."""
    flag = FLAG_OF[section]
    path: str | None = getattr(flags, flag)
    if path is None or os.path.exists(expanded(path)):
        return None
    return flags.finding(flag, "missing-path", f'"{clip(path)}": there is no such file', closest_path(path))


def _with_plugins(model: Document | None, job: Document) -> tuple[Document | None, list[Finding]]:
    place: KeyPath = ("plugins",)
    if model is None:
        text = '"plugins" is given, but the job has no model'
        return None, [Finding.at(job.key_origin(place), "error", "missing-key", text, path=place)]
    if model.has(place):
        text = f'"plugins" is given twice: in the model section too, at {model.key_origin(place)}'
        return model, [given_twice(job.key_origin(place), text, place)]
    return model.grafted(place, job, place), []
