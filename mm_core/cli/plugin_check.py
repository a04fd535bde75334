"""`mm plugin check DIST`: the conformance kit on an installed plugin. Without --import nothing of it is imported; with it,
that happens in processes of their own.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import only_word, output_format, take_option
from mm_core.cli.tables import json_text, printable, table
from mm_registry.errors import UserError

_HELP = """\
usage: mm plugin check DIST [--import] [--only CHECK[,CHECK…]] [--format table|json]

Check what an installed plugin promises. Without --import its metadata is looked at and nothing of it is imported.
--import runs the whole kit in processes of their own: it imports every target and reports the time, the heaviest modules
and what the import left behind, then builds and runs the components at a tiny size. --only runs single checks; the page
docs/conformance.md lists them. Exit code 2 if a check failed, else 0.
"""
_TRACES = {
    "distributed": "initialised torch.distributed",
    "torch": "changed torch's global state",
    "environment": "changed the environment",
    "interpreter": "changed the interpreter",
    "files": "wrote files",
    "threads": "started threads",
}


def run(argv: list[str]) -> int:
    """Check a plugin, print the report, and return 0, or 2 if a check failed.

    Raises:
        UserError: the distribution is not installed or is no plugin; there is no such check.
    """
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    form, rest = output_format(argv, ("table", "json"))
    written, rest = take_option(rest, "--only")
    imports = "--import" in rest
    distribution = only_word(
        [word for word in rest if word != "--import"], "mm plugin check", "a distribution"
    )
    only = None if written is None else [name.strip() for name in written.split(",") if name.strip()]
    if only == []:
        raise UserError("mm plugin check: --only names no check; docs/conformance.md lists them")
    from mm_core.testing.run import check_plugin

    if not imports:
        _refuse_importing(only)
    report = check_plugin(
        distribution, only=only, stages=None if imports else ["metadata"], with_imports=imports
    ).to_dict()
    sys.stdout.write(json_text(report) if form == "json" else printable(_text(report, imports)))
    return 0 if report["ok"] else UserError.exit_code


def _refuse_importing(only: Iterable[str] | None) -> None:
    from mm_core.testing.execute import selected_checks

    if only is None:
        return
    importing = [check.name for check in selected_checks(list(only), None) if check.stage != "metadata"]
    if importing:
        raise UserError(f"mm plugin check: the check {importing[0]!r} imports the plugin; add --import")


def _text(report: Mapping[str, Any], imported: bool) -> str:
    results = report["results"]
    parts = [f"{report['distribution']} {report['version']}\n", _counts(results)]
    parts += _sections(results)
    if imported:
        parts += ["\nimports\n", _imports(report["imports"])]
        parts += [_failed_import(record) for record in report["imports"] if record["traceback"]]
    outcome = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in report["counts"].items())
    verdict = "conforms" if report["ok"] else "does not conform"
    if report["ok"] and report["untried"]:
        verdict = (
            f"conforms as far as it was tried ({', '.join(report['untried'])} could not be built and run)"
        )
    seconds = f"{report['seconds']:.1f} s"
    parts.append(f"\nit {verdict}: {outcome or 'no check applies'} ({seconds})\n")
    if not imported:
        parts.append("only metadata was looked at; --import imports, builds and runs the components\n")
    return "".join(parts)


def _counts(results: Sequence[Mapping[str, Any]]) -> str:
    statuses = list(dict.fromkeys(result["status"] for result in results))
    subjects = dict.fromkeys(result["subject"] for result in results)
    found = Counter((result["subject"], result["status"]) for result in results)
    rows = [[subject, *(str(found[subject, status]) for status in statuses)] for subject in subjects]
    return table(["subject", *(status.replace("_", " ") for status in statuses)], rows, indent="  ")


def _sections(results: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What did not pass, by how: the reasons, then tracebacks. Checks with one reason share a line."""
    for status in ("crashed", "failed", "unexpected_pass", "known_failure", "skipped"):
        chosen = [result for result in results if result["status"] == status]
        if chosen:
            yield f"\n{status.replace('_', ' ')}\n"
        reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for result in chosen:
            detail = result["detail"] if status in ("crashed", "failed") else ""
            reasons[result["subject"], result["message"], detail].append(result["check"])
        for (subject, message, detail), checks in reasons.items():
            yield f"  {subject} {', '.join(checks)}: {message}\n"
            if detail:
                yield _indented(detail)


def _imports(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in records:
        slowest = ", ".join(f"{name} {own:.2f} s" for name, own in record["slowest"][:4] if own >= 0.005)
        rows.append(
            [record["target"], f"{record['seconds']:.2f}", str(record["modules"]), _traces(record), slowest]
        )
    return table(
        ["target", "seconds", "modules", "left behind", "slowest modules by themselves"], rows, indent="  "
    )


def _traces(record: Mapping[str, Any]) -> str:
    if record["crashed"] or record["error"]:
        return "failed"
    said = ["initialised CUDA"] if record["cuda"] else []
    said += [words for kind, words in _TRACES.items() if record["changes"].get(kind)]
    return "; ".join(said) or "nothing"


def _failed_import(record: Mapping[str, Any]) -> str:
    why = record["crashed"] or record["error"]
    return f"\n{record['target']}: {why}\n{_indented(record['traceback'])}"


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.rstrip().splitlines())
