"""What a foreign job consists of, wherever it was written: flags, sections, environment, launcher."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm_core.config.document import EXTENSIONS, Document, read_document
from mm_core.config.findings import ConfigError, Finding, clip, has_errors
from mm_core.config.job_file import TOOL_PATH, from_document
from mm_core.config.kinds import JOB_KINDS, Kind, detect_kind, read_kind, without_schema
from mm_core.config.migrate.flag_words import FlagWords, ForeignFlag, read_flags, words_of
from mm_core.config.migrate.launcher import Launcher, read_launcher
from mm_core.config.migrate.shell_script import Export, read_script
from mm_core.config.origin import Origin
from mm_core.config.overrides import FLAG_OF

_GIVEN = re.compile(r"(\d+|[A-Za-z_]\w*)=")
KIND_OF = {"model": Kind.MODEL, "data": Kind.DATA, "tools": Kind.TOOLS, "fsdp2": Kind.FSDP2}
_SECTION_OF_KIND = {
    Kind.MODEL: "model",
    Kind.TRANSFORMERS: "model",
    Kind.DATA: "data",
    Kind.TOOLS: "tools",
    Kind.FSDP2: "fsdp2",
}


@dataclass
class ForeignJob:
    """A job as its sources say it.

    Attributes:
        sources: the files as the user named them.
        flags: attribute -> flag, in the order of the sources; files that became sections are not among them.
        sections: `model`, `data`, `tools`, `fsdp2` -> document, whose relative paths are meant from `folder`.
        files: section -> the flag that named its file, or the file itself.
        plugins: the value of `plugins`.
        overruled: flags that a later one, or one of the command line, replaces.
        folder: where the job ran, from the working directory; "" is the working directory.
        launcher, exports: of the launch script.
        holders: names in capitals of a combined YAML, whose values stand where they were used.
    """

    sources: list[str] = field(default_factory=list)
    flags: dict[str, ForeignFlag] = field(default_factory=dict)
    sections: dict[str, Document] = field(default_factory=dict)
    files: dict[str, ForeignFlag | str] = field(default_factory=dict)
    plugins: Any = None
    overruled: list[ForeignFlag] = field(default_factory=list)
    folder: str = ""
    launcher: Launcher | None = None
    exports: tuple[Export, ...] = ()
    script: str = ""
    holders: list[tuple[str, Origin]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def seen(self, path: str, origin: Origin) -> str:
        """Return a path of the job, written at `origin`, as seen from the working directory."""
        if not self.folder or origin.kind == "flag" or path.startswith("~") or os.path.isabs(path):
            return path
        return os.path.join(self.folder, path)


def read_sources(argv: Sequence[str], *, inline: bool = True) -> ForeignJob:
    """Read the sources that a command line names: a script, configuration files, `NAME=value` for the script's
    variables, and flags of `mm train`, which win over the script's.

    Raises:
        ConfigError: with everything that keeps the job from being read.
    """
    reading = _Reading(inline)
    reading.read(list(argv))
    if has_errors(reading.job.findings):
        raise ConfigError(reading.job.findings)
    return reading.job


class _Reading:
    def __init__(self, inline: bool) -> None:
        self.job = ForeignJob()
        self.inline = inline

    def error(
        self, code: str, message: str, file: str | None = None, *, path: str = "", mend: str = ""
    ) -> None:
        self.job.findings.append(Finding("error", code, message, file, path=path, suggestion=mend))

    def read(self, argv: list[str]) -> None:
        words, given, flags = _sorted(argv)
        scripts = [word for word in words if not word.lower().endswith(EXTENSIONS)]
        files = [word for word in words if word not in scripts]
        if len(scripts) > 1:
            self.error("given-twice", f"a second launch script: {scripts[0]} is given already", scripts[1],
                       mend="Migrate one job at a time")  # fmt: skip
            return
        if given and not scripts:
            name = next(iter(given))
            self.error("stray-argument", f'"{clip(name)}=…" sets a variable of a launch script, and none is given',
                       path="command line")  # fmt: skip
        if scripts:
            self._script(scripts[0], given)
        for file in files:
            self._file(file)
        line = read_flags(words_of(flags), None)
        self.job.findings += line.findings
        self._take(line)
        if not self.job.sources and not self.job.flags and not self.job.findings:
            self.error("missing-argument", "nothing to migrate: name a launch script, files or flags",
                       path="mm migrate", mend="See mm migrate --help")  # fmt: skip
        self._sections()

    # -- scripts and flags
    # ------------------------------------------------------------------------------------------------------

    def _script(self, path: str, given: dict[str, str]) -> None:
        job = self.job
        job.sources.append(path)
        try:
            script = read_script(path, given)
        except ConfigError as error:
            job.findings += error.findings
            return
        job.findings += script.findings
        job.script, job.exports, job.folder = path, script.exports, script.launch.folder
        job.launcher = read_launcher(script.launch.launcher, script.launch.line)
        line = read_flags(script.launch.words, path, script.launch.line)
        job.findings += line.findings
        for file, origin in line.files[:1]:
            if line.flags:
                text = "flags beside the YAML file count here; MindSpeed-MM drops them"
                job.findings.append(Finding.at(origin, "note", "flags-count", text))
            self._file(job.seen(file, origin))
        for file, origin in line.files[1:]:
            job.findings.append(
                Finding.at(origin, "error", "stray-argument", f'unexpected argument "{clip(file)}"')
            )
        self._take(line)

    def _take(self, line: FlagWords) -> None:
        """Put flags over those that are there."""
        job = self.job
        job.overruled += line.repeated
        for name, flag in line.flags.items():
            before = job.flags.get(name)
            if before is not None:
                job.overruled.append(before)
            job.flags[name] = flag
            section = next((section for section, known in FLAG_OF.items() if known == name), "")
            if section in job.sections:
                written = job.sections.pop(section)
                text = f"{flag.spelling} replaces the {section} section of {written.path}"
                job.findings.append(Finding.at(flag.origin, "note", "replaced", text))

    # -- files
    # ------------------------------------------------------------------------------------------------------

    def _file(self, path: str) -> None:
        job = self.job
        try:
            document = without_schema(read_document(path))
        except ConfigError as error:
            job.findings += error.findings
            return
        kind = detect_kind(document)
        if kind in JOB_KINDS:
            job.sources.append(path)
            self._job_file(document)
            return
        section = _SECTION_OF_KIND.get(kind) if kind is not None else None
        if section is None:
            what = (
                f"this is an {kind}" if kind is Kind.INFERENCE else "its keys do not tell what it configures"
            )
            mend = (
                "`mm generate` takes it as it is"
                if kind is Kind.INFERENCE
                else f"Known are: {', '.join(Kind)}"
            )
            self.error("wrong-file", f"{what}, which is no part of a training job", path, mend=mend)
            return
        if section in job.files:
            self.error(
                "given-twice", f"a second {KIND_OF[section]}: {job.files[section]} is given already", path
            )
            return
        job.sources.append(path)
        job.files[section] = path
        if self.inline:
            job.sections[section] = document
        else:
            job.flags[FLAG_OF[section]] = ForeignFlag(FLAG_OF[section], path, (), path, Origin("file", path))

    def _job_file(self, document: Document) -> None:
        job = self.job
        written = from_document(document)
        job.findings += [finding for finding in written.findings if finding.code != "no-effect"]
        job.plugins = written.plugins.data["plugins"] if written.plugins is not None else None
        for section, content in written.sections.items():
            if section in job.sections:
                self.error("given-twice", f"a second {section} section", content.path)
            job.sections[section] = content
        for name, entry in written.flags.items():
            if entry.value is not False:
                spelling = entry.path.rpartition(".")[2]
                job.flags[name] = ForeignFlag(
                    name, f"{spelling}:", (str(entry.value),), entry.value, entry.key
                )
        capitals = [key for key in document.data if key.isupper() and key != TOOL_PATH]
        job.holders = [(key, document.key_origin((key,))) for key in capitals]

    def _sections(self) -> None:
        """Read the files that flags name, so that they can stand in the job file."""
        job = self.job
        if not self.inline:
            return
        for section, name in FLAG_OF.items():
            flag = job.flags.pop(name, None)
            if flag is None:
                continue
            if section in job.sections:
                text = f"the {section} file is given twice: {job.files.get(section, 'a section')} and {flag.value}"
                job.findings.append(Finding.at(flag.origin, "error", "given-twice", text))
                continue
            path = job.seen(str(flag.value), flag.origin)
            try:
                document = _read(path, KIND_OF[section])
            except ConfigError as error:
                job.findings += [_named_by(finding, flag) for finding in error.findings]
                continue
            job.files[section] = flag
            job.sections[section] = document
            job.sources.append(path)


def _read(path: str, kind: Kind) -> Document:
    document = without_schema(read_document(path))
    if kind is Kind.MODEL and detect_kind(document) is Kind.TRANSFORMERS:
        return document  # whether it can be trained is for the check of the new file to say
    return read_kind(path, kind)


def _named_by(finding: Finding, flag: ForeignFlag) -> Finding:
    """Say which flag names a file that cannot be read."""
    if finding.code != "missing-file" or flag.origin.kind != "file":
        return finding
    mend = f"{finding.suggestion.removesuffix('?')}? " if finding.suggestion.endswith("?") else ""
    mend += "Run `mm migrate` from the folder in which training starts, or give the file with its flag"
    return replace(finding, message=f"{finding.message}, which {flag.origin} names", suggestion=mend)


def _sorted(argv: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Tell files, `NAME=value` and flags with their values apart: files stand before the first flag."""
    first = next((index for index, word in enumerate(argv) if word.startswith("--")), len(argv))
    given: dict[str, str] = {}
    words = []
    for word in argv[:first]:
        if _GIVEN.match(word):
            name, _, value = word.partition("=")
            given[name] = value
        else:
            words.append(word)
    return words, given, argv[first:]
