"""What metadata alone can tell: nothing of the plugin is imported."""

from __future__ import annotations

import re
from email.message import Message
from email.parser import Parser
from pathlib import Path

from mm_core.testing.case import Case, Plugin
from mm_core.testing.check import CheckFailed, CheckSkipped, check, require
from mm_core.testing.probes import build_folders, modules_after_discovery, recorded_files
from mm_registry.groups import BY_ROLE, GROUPS, HOOKS, ROLES
from mm_registry.requirements import API_DISTRIBUTIONS, api_conflict, required_api
from mm_registry.spec import Status, canonical_name
from mm_registry.suggestions import closest

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_TARGET = re.compile(r"\s*[A-Za-z_][\w.]*\s*(:\s*[A-Za-z_][\w.]*\s*)?(\[[^\]]*\]\s*)?")


@check("discovery finds it and imports none of it", stage="metadata", whole_plugin=True)
def found_without_import(plugin: Plugin) -> None:
    """In a fresh process the registries are listed, asked and printed; then no module of the plugin, and no heavy one, may
    be imported. What a `.pth` file of the plugin imports when Python starts counts.
    """
    modules = modules_after_discovery(plugin)
    require(not modules, f"listing the ids imports {', '.join(modules[:5])}")


@check("nothing about its metadata is odd", stage="metadata", whole_plugin=True)
def metadata_is_sound(plugin: Plugin) -> None:
    """What `mm doctor` would say of the distribution: unreadable or contradictory metadata, two installed copies, …"""
    wanted = canonical_name(plugin.distribution)
    leftovers = build_folders(plugin)
    odd = [
        diagnostic.message
        for diagnostic in plugin.manager.discover().diagnostics
        if canonical_name(diagnostic.distribution) == wanted and diagnostic.level in ("error", "warning")
        if not (diagnostic.code == "installed-twice" and str(Path(diagnostic.path).parent) in leftovers)
    ]
    require(not odd, "; ".join(odd))


@check("every group exists and every name follows its grammar", stage="metadata", whole_plugin=True)
def names_follow_the_grammar(plugin: Plugin) -> None:
    """Ids consist of letters, digits and `_ . + -`; companions are named `role/id`. Others cannot be asked for."""
    for group, name, _ in plugin.record.entries:
        if group not in GROUPS:
            near = closest(group, GROUPS, 1)
            raise CheckFailed(f"there is no group {group}" + (f"; did it mean {near[0]}?" if near else ""))
        role, slash, id = name.partition("/")
        if group in BY_ROLE:
            require(
                slash and role in ROLES and _ID.fullmatch(id),
                f"{name!r} in {group} is not of the form role/id",
            )
        else:
            require(
                _ID.fullmatch(name),
                f"{name!r} in {group} is not an id: letters, digits and _ . + - are allowed",
            )


@check("every value has the form of its group", stage="metadata", whole_plugin=True)
def targets_have_their_form(plugin: Plugin) -> None:
    """`package.module:object`; a module without an object for hooks only."""
    for group, name, value in plugin.record.entries:
        if group not in GROUPS or not GROUPS[group].has_targets:
            continue
        require(
            _TARGET.fullmatch(value) and (":" in value or group == HOOKS),
            f"the target {value!r} of {name!r} in {group} is not of the form package.module:object",
        )


@check("every companion belongs to a component", stage="metadata", whole_plugin=True)
def companions_have_components(plugin: Plugin) -> None:
    """A policy, weights adapter or example for an id that nothing offers is a misspelling. So is a config class whose id
    is close to a component's; another one announces a component: its sections can be checked, nothing is built.
    """
    own = {f"{role}/{spec.id}" for role, group in ROLES.items() for spec in plugin.specs(group.name)}
    for group in ("mm_core.configs", "mm_core.sharding_policies", "mm_core.weights", "mm_core.examples"):
        for spec in plugin.specs(group):
            role, _, id = spec.id.partition("/")
            if spec.id in own or plugin.manager.offers(ROLES[role].name, id):
                continue
            near = closest(spec.id, own, 1)
            if group == "mm_core.configs" and not near:
                continue
            mend = f"; did it mean {near[0]!r}?" if near else ""
            raise CheckFailed(f"the {GROUPS[group].noun} {spec.id!r} belongs to no installed component{mend}")


@check("old ids lead to ids of its own", stage="metadata", whole_plugin=True)
def aliases_lead_somewhere(plugin: Plugin) -> None:
    """The value of an alias is a component of the same role in the same distribution; its name is none."""
    specs = plugin.specs("mm_core.aliases")
    if not specs:
        raise CheckSkipped("it declares no old ids")
    for spec in specs:
        role, _, old = spec.id.partition("/")
        own = {other.id for other in plugin.specs(ROLES[role].name)}
        require(
            spec.target in own,
            f"the alias {spec.id!r} leads to {spec.target!r}, which is no {role} of its own",
        )
        require(old not in own, f"{old!r} is an alias and a {role} of its own at once")


@check("dropped ids name the last version that had them", stage="metadata", whole_plugin=True)
def farewells_name_versions(plugin: Plugin) -> None:
    """The value is a version (PEP 440) before this one; an id that is still offered was not dropped."""
    from packaging.version import InvalidVersion, Version

    specs = plugin.specs("mm_core.farewells")
    if not specs:
        raise CheckSkipped("it declares no dropped ids")
    for spec in specs:
        role, _, dropped = spec.id.partition("/")
        try:
            last = Version(spec.target)
        except InvalidVersion:
            raise CheckFailed(
                f"the farewell to {spec.id!r} names {spec.target!r}, which is no version"
            ) from None
        require(
            last < Version(plugin.version),
            f"the farewell to {spec.id!r} names {spec.target}, but this is {plugin.version}: it must be an earlier one",
        )
        own = {other.id for other in plugin.specs(ROLES[role].name)}
        require(dropped not in own, f"{spec.id!r} is dropped and still offered")


@check("the range of the plugin API is declared and holds", stage="metadata", whole_plugin=True)
def declares_its_api_range(plugin: Plugin) -> None:
    """The ranges of mmzoo-core and mmzoo-registry in `Requires-Dist` are what the plugin was made for."""
    ranges, unreadable = required_api(plugin.record.requires)
    require(not unreadable, f"the requirement {', '.join(map(repr, unreadable))} cannot be parsed")
    if all(text in API_DISTRIBUTIONS for text in ranges):  # named, without a range
        raise CheckSkipped('it declares no range; add "mmzoo-core>=0.1,<0.2" to its dependencies')
    conflict = api_conflict(ranges, plugin.manager.version)
    require(conflict is None, str(conflict))


@check("a summary and a README come with it", stage="metadata", whole_plugin=True)
def readme_is_included(plugin: Plugin) -> None:
    """Summary and description of the distribution's metadata: what people see before they install it."""
    fields = _metadata(plugin)
    require(
        (fields.get("Summary") or "").strip(),
        'its metadata has no summary; set "description" in pyproject.toml',
    )
    text = fields.get("Description") or fields.get_payload()
    require(str(text).strip(), 'its metadata has no description; set "readme" in pyproject.toml')


@check("its licence is stated", stage="metadata", whole_plugin=True)
def licence_is_stated(plugin: Plugin) -> None:
    """A licence expression (PEP 639), the older field, or a classifier."""
    fields = _metadata(plugin)
    classifiers = [text for text in fields.get_all("Classifier", []) if text.startswith("License ::")]
    stated = fields.get("License-Expression") or fields.get("License") or classifiers
    require(stated, 'its metadata states no licence; set "license" in pyproject.toml')


@check("nothing of it runs when Python starts", stage="metadata", whole_plugin=True)
def nothing_runs_at_start_up(plugin: Plugin) -> None:
    """No `.pth` file and no `sitecustomize` among its files; those of an editable install belong to the installer."""
    files = recorded_files(plugin)
    if not files:
        raise CheckSkipped("its metadata has no RECORD of its files")
    for name in files:
        file = Path(name)
        editable = plugin.record.editable and file.name.startswith("__editable__")
        runs = file.suffix == ".pth" or (
            len(file.parts) == 1 and file.stem in ("sitecustomize", "usercustomize")
        )
        require(editable or not runs, f"{name} runs in every process of this environment")


@check("the id can be used as it is", stage="metadata")
def can_be_used(case: Case) -> None:
    """Nothing stands in its way: its distribution is selected, its API range and extras hold, no other claims the id."""
    require(case.spec.status is Status.AVAILABLE, f"it is {case.spec.status}: {case.spec.detail}")


@check("its companions can be used", stage="metadata")
def companions_can_be_used(case: Case) -> None:
    """Config class, sharding policy, weights adapter and example are declared once, and well."""
    for group in ("mm_core.configs", "mm_core.sharding_policies", "mm_core.weights", "mm_core.examples"):
        for spec in case.plugin.specs(group):
            if spec.id == case.subject:
                noun = GROUPS[group].noun
                require(spec.status is Status.AVAILABLE, f"its {noun} is {spec.status}: {spec.detail}")


def _metadata(plugin: Plugin) -> Message:
    info = Path(plugin.record.info)
    for name in ("METADATA", "PKG-INFO"):
        if (info / name).is_file():
            return Parser().parsestr((info / name).read_text(encoding="utf-8"))
    if info.is_file():
        return Parser().parsestr(info.read_text(encoding="utf-8"))
    raise CheckSkipped("its metadata is not in a folder")
