"""From a command line, and the job file on it, to checked flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mm_core.config.document import EXTENSIONS, Document
from mm_core.config.findings import ConfigError, Finding, clip, closest, has_errors
from mm_core.config.flag_help import flag_name, kind_of, metavar
from mm_core.config.flags import TrainFlags, check_together
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.overrides import FLAG_OF, SECTIONS, Override, is_override, parse_override
from mm_core.config.section import check_section

TYPE_CHECKING = False  # typing's, which is slow to import
if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from mm_core.config.job_file import JobFile

_COMMA = re.compile(r",(?![^{}]*\})")  # not of a pattern such as blocks.{0-3,7}
_WHOLE = re.compile(r"[+-]?\d+\Z")


@dataclasses.dataclass
class _Line:
    """What a command line says: flags by attribute, with their place, spelling and the place of their name."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, Origin] = dataclasses.field(default_factory=dict)
    keys: dict[str, Origin] = dataclasses.field(default_factory=dict)
    given: dict[str, str] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    job_files: list[str] = dataclasses.field(default_factory=list)
    overrides: list[Override] = dataclasses.field(default_factory=list)
    taken_back: set[str] = dataclasses.field(default_factory=set)

    def put(self, name: str, value: Any, spelling: str, origin: Origin, key: Origin | None = None) -> None:
        self.values[name], self.given[name] = value, spelling
        self.origins[name], self.keys[name] = origin, key or origin


def parse_train_flags(argv: Sequence[str]) -> TrainFlags:
    """Read a command line: `--flag value`, `--flag=value`, `_` or `-`, no abbreviations; one job file; and any number of
    `key.path=value`. Of a flag given twice the last one counts; flags win over the job file, `key.path=value` over all
    files.

    Raises:
        ConfigError: everything that is wrong with the flags, each with a suggestion, and with the job file as such.
    """
    flags, findings = read_command_line(argv)
    if has_errors(findings):
        raise ConfigError(findings)
    return flags


def read_command_line(argv: Sequence[str], job: JobFile | None = None) -> tuple[TrainFlags, list[Finding]]:
    """As `parse_train_flags`, but return the findings. If there is an error among them, the flags are those without
    one, so that the files that they name can be checked all the same.

    Args:
        job: the job file, if it has been read already; by default the one that the line names, if any.
    """
    line = _split(argv)
    if job is None:
        job = _job_file(line)
    if job is not None:
        _put_under(line, job)
    document = Document(job.path if job else "", line.values, _places(line.origins), _places(line.keys))
    checked = check_section(TrainFlags, document, label="the command line")
    findings = line.findings + [_about_flag(finding, line) for finding in checked.findings]
    flags = checked.section
    if flags is None:
        good = {name: value for name, value in line.values.items() if _is_good(name, value)}
        flags = TrainFlags.model_validate(good)
    flags._given = {name: spelling for name, spelling in line.given.items() if name in flags.model_fields_set}
    flags._origins = {name: line.origins[name] for name in flags._given}
    flags._overrides = tuple(line.overrides)
    if job is not None:
        flags._job_file, flags._sections, flags._plugins = job.path, job.sections, job.plugins
        findings += _given_twice(flags, job)
    if checked.section is not None:
        findings += check_together(flags)
    if not has_errors(findings):
        flags._findings = tuple(findings)
    return flags, findings


def _places(origins: Mapping[str, Origin]) -> dict[KeyPath, Origin]:
    return {(name,): origin for name, origin in origins.items()}


def _is_good(name: str, value: Any) -> bool:
    return not has_errors(check_section(TrainFlags, Document("", {name: value})).findings)


def _given_twice(flags: TrainFlags, job: JobFile) -> list[Finding]:
    """A section that the job file holds cannot be a file of a flag's as well."""
    from mm_core.config.job_file import given_twice

    findings = []
    for section, document in job.sections.items():
        name = FLAG_OF[section]
        if name in flags.model_fields_set:
            text = f"the {section} section is given twice: it is written at {document.origin(())} too"
            findings.append(given_twice(flags.origin(name), text, flags.spelling(name)))
    return findings


# -- the job file


def _job_file(line: _Line) -> JobFile | None:
    """Read the job file that the line names, if it names one."""
    if not line.job_files:
        return None
    from mm_core.config.job_file import read_job_file

    for other in line.job_files[1:]:
        text = f"a second job file: {line.job_files[0]} is given already"
        line.findings.append(Finding("error", "given-twice", text, other, suggestion="Keep one of them"))
    try:
        return read_job_file(line.job_files[0])
    except ConfigError as error:
        line.findings += error.findings
        return None


def _put_under(line: _Line, job: JobFile) -> None:
    """Put the flags of a job file under those of the command line."""
    line.findings += job.findings
    for name, entry in job.flags.items():
        field = TrainFlags.model_fields.get(name)
        if field is None:
            near = closest(name, TrainFlags.model_fields)
            mend = f'Did you mean "{near}"?' if near else "`mm train --help` lists the flags"
            text = f'there is no flag "{clip(entry.path.rpartition(".")[2])}"'
            line.findings.append(
                Finding.at(entry.key, "error", "unknown-flag", text, path=entry.path, suggestion=mend)
            )
        elif name not in line.given and name not in line.taken_back and not _asks_nothing(field, entry.value):
            line.put(name, _from_yaml(kind_of(field), entry.value), entry.path, entry.origin, entry.key)


def _asks_nothing(field: FieldInfo, value: Any) -> bool:
    """Whether a flag of a job file is as if it were not there: a switch that is off, a file that is not named. A number
    that has a default is none of these: `weight_decay: false` would train with another one than 0.
    """
    return value is False and (kind_of(field) is bool or field.default is None)


def _from_yaml(kind: type, value: Any) -> Any:
    """Return a flag's value that a job file has. What MindSpeed-MM reads back from a text is no mistake."""
    if isinstance(value, bool):
        return value
    if kind is list:
        return convert(list, [str(item) for item in value] if isinstance(value, list) else [str(value)])
    if kind is str and isinstance(value, int | float):
        return str(value)
    return convert(kind, [value]) if isinstance(value, str) and value else value


# -- the command line


def _split(argv: Sequence[str]) -> _Line:
    line = _Line()
    rest = list(argv)
    previous = ""
    while rest:
        word = rest.pop(0)
        if not _is_flag(word) or word == "--":
            _positional(line, word, previous)
            continue
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        field = TrainFlags.model_fields.get(name)
        previous = flag
        if field is None:
            line.findings.append(_unknown(flag))
            while rest and not _is_flag(rest[0]) and not is_override(rest[0]):
                rest.pop(0)  # its value is no mistake of its own
            continue
        kind = kind_of(field)
        texts = [text] if equals else []
        if not equals and kind is not bool:
            while (
                rest and not _is_flag(rest[0]) and (not texts or (kind is list and not is_override(rest[0])))
            ):
                texts.append(rest.pop(0))
        empty = bool(texts) and not any(text.strip() for text in texts)
        if empty or (not texts and kind is not bool):
            what = "it needs a value, and the one given is empty" if empty else "a value is missing"
            mend = f"Write {flag} or {flag}=false" if kind is bool else f"Write {flag} {metavar(field)}"
            line.findings.append(Finding("error", "missing-value", what, path=flag, suggestion=mend))
            continue
        _flag(line, name, convert(kind, texts), flag, Origin("flag", detail=flag))
    return line


def _flag(line: _Line, name: str, value: Any, spelling: str, origin: Origin) -> None:
    if name in line.given:
        text = "given more than once; the last one counts"
        line.findings.append(Finding("note", "repeated-flag", text, path=spelling))
    line.put(name, value, spelling, origin)


def _positional(line: _Line, word: str, previous: str) -> None:
    """Take a word that is no flag: a job file, or `key.path=value`."""
    if is_override(word):
        try:
            override = parse_override(word)
        except ConfigError as error:
            line.findings += error.findings
        else:
            _override(line, override)
    elif word.lower().endswith(EXTENSIONS) and word not in EXTENSIONS:
        line.job_files.append(word)
    else:
        line.findings.append(_stray(word, previous))


def _override(line: _Line, override: Override) -> None:
    spelling = override.origin.detail
    problem = mend = ""
    if override.section in SECTIONS:
        if override.path or isinstance(override.value, Mapping):
            line.overrides.append(override)
            return
        if isinstance(override.value, str):
            _flag(line, FLAG_OF[override.section], override.value, spelling, override.origin)
            return
        problem, mend = "a section is an object or the path of a file", "Name a key: section.key=value"
    else:
        name = override.path[-1].replace("-", "_")
        field = TrainFlags.model_fields.get(name)
        if field is None or len(override.path) > 1:
            near = closest(".".join(override.path), TrainFlags.model_fields)
            problem = f'there is no flag "{clip(".".join(override.path))}"'
            mend = f'Did you mean "{near}"?' if near else "`mm train --help` lists the flags"
        elif override.value is None or _asks_nothing(field, override.value):
            line.taken_back.add(name)  # as if the job file did not have it
            return
        else:
            _flag(line, name, _from_yaml(kind_of(field), override.value), spelling, override.origin)
            return
    line.findings.append(
        Finding.at(override.origin, "error", "bad-override", problem, path=spelling, suggestion=mend)
    )


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def convert(kind: type, texts: list[str]) -> Any:
    """Return the value of a flag; text that is no value of the kind stays text, and the check says so."""
    if kind is bool:
        return {"": True, "true": True, "false": False}.get(texts[0].lower(), texts[0]) if texts else True
    if kind is list:
        return [part for text in texts for part in _COMMA.split(text) if part]
    text = texts[0]
    if kind is int and _WHOLE.match(text) and len(text) < 30:
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _unknown(flag: str) -> Finding:
    near = closest(flag, [flag_name(name) for name in TrainFlags.model_fields])
    mend = f"Did you mean {near}?" if near else "`mm train --help` lists all"
    return Finding("error", "unknown-flag", "there is no such flag", path=flag, suggestion=mend)


def _stray(word: str, previous: str) -> Finding:
    name = previous[2:].replace("-", "_")
    field = TrainFlags.model_fields.get(name)
    if field is not None and kind_of(field) is bool:
        mend = (
            f"{previous} takes no value"
            if word.lower() != "false"
            else f"Leave {previous} out, or write {previous}=false"
        )
    else:
        mend = "Values follow a flag: --flag value"
    return Finding(
        "error", "stray-argument", f'unexpected argument "{clip(word)}"', path="command line", suggestion=mend
    )


def _about_flag(finding: Finding, line: _Line) -> Finding:
    """Say it about a flag rather than about a key of a file; what a job file says is about its key."""
    if finding.file is not None:
        return dataclasses.replace(finding, path=line.given.get(finding.path, finding.path))
    message, suggestion = finding.message, finding.suggestion
    for name, flag in line.given.items():
        if finding.path == flag:
            message = message.removeprefix(f'"{name}" ').removeprefix("is ").removeprefix(f'"{name}": ')
    message = message.removeprefix("true: only false is accepted: ")
    if "quotes" in suggestion:
        suggestion = ""
    return dataclasses.replace(finding, message=message, suggestion=suggestion)
