"""What stands behind each value of the new file, and above all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from mm_core.config.document import expanded
from mm_core.config.findings import Finding, clip
from mm_core.config.migrate.plan import Plan
from mm_core.config.migrate.shell_values import text_of, unknown_of
from mm_core.config.migrate.source_comments import source_comments
from mm_core.config.migrate.sources import ForeignJob
from mm_core.config.migrate.yaml_text import one_line
from mm_core.config.origin import KeyPath, Origin
from mm_core.config.secrets import HIDDEN, hide, is_secret

#: Findings that tell of a key for good; others, such as a missing folder, are of today and of this machine.
_LASTING = frozenset(
    {"no-effect", "not-available", "legacy-key", "unknown-key", "unknown-flag", "refused-value", "wrong-type"}
)
_KEY = re.compile(r'^"?[\w.-]+"?:? (?=has no effect|is an old spelling|cannot)')
_WIDTH = 180


class Comments:
    """Comments of one new file. `findings`: path in it -> what the check says there."""

    def __init__(self, job: ForeignJob, plan: Plan, findings: Mapping[KeyPath, Sequence[Finding]]) -> None:
        self._plan = plan
        self._findings = findings
        self._names = short_names([*job.sources, *(document.path for document in job.sections.values())])
        self._written = {path: source_comments(path) for path in self._names if path != job.script}
        # Of several keys on one line of the source, the first has the comments above it, the last those behind it.
        self._leaves = plan.leaves
        lines = [((origin.file, origin.line), path) for path, origin in plan.origins.items()]
        self._first = dict(reversed(lines))
        self._last = {line: path for line, path in lines if path in self._leaves}

    def behind(self, path: KeyPath) -> str:
        """Return origin, remark, findings and the source's own comment of the value at `path`."""
        said = [self._plan.remarks.get(path, "")]
        said += [_sentence(finding) for finding in self._findings.get(path, ()) if finding.code in _LASTING]
        origin = self._plan.origins.get(path)
        if len(path) > 1 and path in self._leaves:
            said.insert(0, self.place(origin))
        return clip_line("; ".join(filter(None, [*said, *self._own(path, "behind")])))

    def above(self, path: KeyPath) -> list[str]:
        """Return the source's own comments above the key at `path`."""
        return [clip_line(text) for text in self._own(path, "above")]

    def _own(self, path: KeyPath, where: str) -> list[str]:
        origin = self._plan.origins.get(path)
        if origin is None or origin.kind != "file" or origin.line is None:
            return []
        if (self._first if where == "above" else self._last).get((origin.file, origin.line)) != path:
            return []
        written = self._written.get(str(origin.file))
        if written is None:
            return []
        if where == "above":
            return written.above.get(origin.line, [])
        return [f'"{text}"' for text in [written.behind.get(origin.line, "")] if text]

    def place(self, origin: Origin | None) -> str:
        """Return `model.json:12`."""
        if origin is None:
            return ""
        if origin.kind != "file" or origin.line is None:
            return "command line" if origin.kind == "flag" else str(origin)
        return f"{self._names.get(str(origin.file), origin.file)}:{origin.line}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return path -> its last part, or the whole path where two end alike."""
    unique = list(dict.fromkeys(paths))
    last = [os.path.basename(path) for path in unique]
    return {path: name if last.count(name) == 1 else path for path, name in zip(unique, last, strict=True)}


def clip_line(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _sentence(finding: Finding) -> str:
    text = _KEY.sub("", finding.message)
    if finding.level == "error":
        return f"ERROR: {text}"
    return text


# -- the head of the file
# ------------------------------------------------------------------------------------------------------------


def head(job: ForeignJob, plan: Plan, name: str) -> list[str]:
    """Return the lines above everything: what this file is, how to train, and what of the script is not in it.

    Args:
        name: the new file's, as the user named it.
    """
    lines = [f"Written by `mm migrate` from {', '.join(dict.fromkeys(job.sources)) or 'flags'}."]
    lines += ["Relative paths are meant from this file's folder; behind each value stands where it was.", ""]
    lines += _training(job, name)
    lines += _data_lists(job, plan, os.path.dirname(expanded(name)))
    if job.exports:
        lines += ["", f"{job.script} also sets these, which are no part of a job file:"]
        lines += _exports(job)
    if plan.secrets:
        lines += ["", "Left out, because they are secrets:"]
        lines += [f"    {'.'.join(map(str, path))} ({origin})" for path, origin in plan.secrets.items()]
    return [f"# {one_line(line, strip=False)}".rstrip() for line in lines]


def _training(job: ForeignJob, name: str) -> list[str]:
    lines = [f"Check:  mm check {name}", f"Train:  mm train {name}"]
    launcher = job.launcher
    if launcher is None:
        return lines
    if launcher.single_node and launcher.ranks is not None:
        lines.append(f"    or  {launcher.command(name)}")
    else:
        lines[1:] = ["Train, on each machine:", f"    {launcher.command(name)}"]
    if launcher.unknown:
        lines.append(f"    ({', '.join(sorted(launcher.unknown))} as in {job.script})")
    if launcher.dropped:
        lines.append(f"    (without {' '.join(map(clip, launcher.dropped))}, which torchrun does not have)")
    return lines


def _data_lists(job: ForeignJob, plan: Plan, folder: str) -> list[str]:
    """What a data list names is meant from where training starts, wherever the job file is."""
    data = plan.values.get("data")
    named = isinstance(data, dict) and "data_path" in str(data.get("dataset_param"))
    start = os.path.relpath(os.path.realpath(job.folder or "."), os.path.realpath(folder or "."))
    if not named or start == ".":
        return []
    return [
        f"Train from the folder {start} (seen from here): data lists name folders from where training starts."
    ]


def _exports(job: ForeignJob) -> list[str]:
    from mm_core.config.environment import VARIABLES

    known = {variable.name: variable for variable in VARIABLES}
    rows = []
    for export in job.exports:
        text = HIDDEN if is_secret(export.name) else clip(hide(text_of(export.value)))
        variable = known.get(export.name)
        meaning = "not known here" if variable is None else variable.meaning
        if variable is not None and not variable.reader:
            meaning += "; no effect here"
        elif variable is not None and unknown_of(export.value) is None:
            problem = variable.problem(text_of(export.value))
            meaning += f"; {export.name} {problem}" if problem else ""
        rows.append((f"    export {export.name}={text}", clip_line(meaning)))
    width = min(60, max(len(left) for left, _ in rows))
    return [f"{left:<{width}}  {right}" for left, right in rows]
