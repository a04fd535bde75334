"""What is wrong, or left unsaid, in this environment: discovery's diagnostics, entries that cannot be used, and
what a plugin's import would run into. All of it is read from metadata and source files; nothing is imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mm_core.cli.explanations import EXPLANATIONS, Explanation
from mm_registry import GROUPS, EntrySpec, PluginManager, RegistryError, Status
from mm_registry.discovery import Record
from mm_registry.requirements import API_DISTRIBUTIONS, in_force, unmet
from mm_registry.spec import EXCLUDED, canonical_name

#: Roles whose sections a config class checks, and roles that FSDP shards (transformers models are not trained yet).
WITH_CONFIG = ("diffusion", "predictor", "ae", "text_encoder", "i2v_processor", "dataset")
WITH_POLICY = ("predictor",)

#: From bad to good.
LEVELS = ("error", "warning", "note")
_LEVEL_OF_STATUS = {
    Status.BLOCKED: "note",
    Status.NOT_ALLOWLISTED: "note",
    Status.SHADOWED: "note",
    Status.MISSING_EXTRA: "warning",
    Status.INCOMPATIBLE: "error",
    Status.AMBIGUOUS: "error",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to know.

    Attributes:
        level: `error` (something cannot be used), `warning`, or `note` (as somebody wished).
        code: stable name of its kind, a key of `EXPLANATIONS`.
        distribution: whose; empty if nobody's.
        message: what, with names.
        why: what it costs.
        mend: what to do; empty if the message says it.
        path: where, if it is at one place.
    """

    level: str
    code: str
    distribution: str
    message: str
    why: str = ""
    mend: str = ""
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the seven fields, JSON-able."""
        return asdict(self)


def problem(level: str, code: str, distribution: str, message: str, path: str = "", **words: str) -> Problem:
    """Make a problem with the explanation of its code; `words` fill the blanks of the mending line."""
    known = EXPLANATIONS.get(code, Explanation(""))
    mend = known.mend.format(distribution=distribution or "NAME", **words)
    return Problem(level, code, distribution, message, known.why, mend, path)


def diagnose(manager: PluginManager) -> list[Problem]:
    """Return every problem, the worst first, then by distribution."""
    report = manager.discover()
    found = [
        problem(said.level, said.code, said.distribution, said.message, said.path)
        for said in report.diagnostics
    ]
    # What metadata shows to be broken is a diagnostic already.
    found += _unusable(spec for spec in report.entries if spec.status is not Status.BROKEN)
    entries: dict[str, list[EntrySpec]] = defaultdict(list)
    for spec in report.entries:
        if spec.status not in EXCLUDED:
            entries[canonical_name(spec.distribution)].append(spec)
    for record in manager.distributions():
        claims = entries.get(canonical_name(record.name), [])
        if claims:
            found += _requirements(manager, record)
            found += _targets(claims)
            found += _unsaid(manager, record, claims)
    return sorted(found, key=lambda p: (LEVELS.index(p.level), p.distribution, p.code, p.message))


def _unusable(entries: Iterable[EntrySpec]) -> Iterator[Problem]:
    """A problem for each reason, with all ids of a distribution that share it."""
    alike: dict[tuple[str, Status, str], list[EntrySpec]] = defaultdict(list)
    for spec in entries:
        if spec.status is not Status.AVAILABLE:
            alike[spec.provider, spec.status, spec.detail].append(spec)
    for (provider, status, detail), specs in alike.items():
        first = specs[0]
        if status in EXCLUDED:
            message = f"{provider} takes no part: {detail}"
        elif status is Status.SHADOWED:
            message = f"{provider}: {_named(specs)} is not what the id means: {detail}"
        else:
            message = f"{provider}: {_named(specs)} cannot be used: {detail}"
        yield problem(_LEVEL_OF_STATUS[status], str(status), first.distribution, message, first.path)


def _named(specs: Iterable[EntrySpec]) -> str:
    return ", ".join(f"the {GROUPS[spec.group].noun} {spec.id!r}" for spec in specs)


def _requirements(manager: PluginManager, record: Record) -> Iterator[Problem]:
    for name, requirement, version in unmet(in_force(record.requires), manager.version):
        if name in API_DISTRIBUTIONS and version is not None:
            continue  # its entries are marked `incompatible`
        code = "missing-requirement" if version is None else "outdated-requirement"
        level = "error" if version is None else "warning"
        there = "which is not installed" if version is None else f"and {version} is installed"
        message = f"{record.name} {record.version} needs {requirement}, {there}"
        yield problem(level, code, record.name, message, record.path, requirement=requirement)


def requirements_of_core(manager: PluginManager) -> dict[str, str]:
    """Return MM Zoo's distributions and what they require, each with the range that is wanted."""
    from importlib import metadata

    wanted = dict.fromkeys(sorted(API_DISTRIBUTIONS), "")
    for owner in sorted(API_DISTRIBUTIONS):
        # The registry itself has no entries, so it is not among `manager.distributions()`.
        requires = metadata.requires(owner) if manager.version(owner) is not None else None
        for requirement in in_force(requires or ()):
            name = canonical_name(requirement.name)
            wanted[name] = wanted.get(name) or str(requirement.specifier)
    return wanted


def _targets(claims: Iterable[EntrySpec]) -> Iterator[Problem]:
    """A problem for each module behind the entries that is not there or cannot be parsed."""
    from mm_core.cli.targets import target_problem

    modules: dict[str, list[EntrySpec]] = defaultdict(list)
    for spec in claims:
        if spec.status is not Status.BROKEN and GROUPS[spec.group].has_targets:
            modules[spec.target.partition(":")[0]].append(spec)
    for module, specs in sorted(modules.items()):
        why = target_problem(module)
        if why is not None:
            code = "syntax-error" if "SyntaxError" in why else "missing-target"
            message = f"{specs[0].provider}: {_named(specs)} cannot be imported: {why}"
            yield problem("error", code, specs[0].distribution, message, specs[0].path)


def _unsaid(manager: PluginManager, record: Record, claims: Iterable[EntrySpec]) -> Iterator[Problem]:
    """What a plugin could declare and does not."""
    claims = list(claims)
    if canonical_name(record.name) not in API_DISTRIBUTIONS and not claims[0].required_api:
        ranges = " and ".join(
            f'"{name}{_range(manager.version(name))}"' for name in sorted(API_DISTRIBUTIONS)
        )
        message = f"{record.name} {record.version} declares no range of the plugin API"
        yield problem("warning", "no-api-range", record.name, message, record.path, ranges=ranges)
    for group, roles, code, level in (
        ("mm_core.configs", WITH_CONFIG, "no-config-class", "warning"),
        ("mm_core.sharding_policies", WITH_POLICY, "no-sharding-policy", "note"),
    ):
        bare = [
            spec for spec in claims if GROUPS[spec.group].role in roles and not _has(manager, group, spec)
        ]
        if bare:
            names = ", ".join(f'"{GROUPS[spec.group].role}/{spec.id}"' for spec in bare)
            message = f"{record.name} {record.version}: {_named(bare)} has no {GROUPS[group].noun}"
            yield problem(level, code, record.name, message, record.path, names=names)


def _has(manager: PluginManager, group: str, spec: EntrySpec) -> bool:
    try:
        return manager.find(group, f"{GROUPS[spec.group].role}/{spec.id}", spec.distribution) is not None
    except RegistryError:
        return True  # there is one, and what is wrong with it is told of its own entry


def _range(version: str | None) -> str:
    """The range that a plugin made for this version declares: `>=0.1,<0.2`."""
    from packaging.version import Version

    if version is None:
        return ""
    major, minor = (*Version(version).release, 0)[:2]
    return f">={major}.{minor},<{major}.{minor + 1}" if major == 0 else f">={major}.{minor},<{major + 1}"
