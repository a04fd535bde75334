"""What training and generation jobs share: from sections to checked, patched components."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mm_core.config.component import WITHOUT_SECTION, ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import ConfigError, Finding, has_errors
from mm_core.config.parts import Part, check_part, find_template, resolve
from mm_core.config.plugins import job_selection, named_plugins, path_of, selection_finding
from mm_registry.errors import RegistryError, SelectionError
from mm_registry.manager import PluginManager
from mm_registry.spec import RUNTIME, EntrySpec

if TYPE_CHECKING:
    from mm_core.config.overwrite import Overwrite
    from mm_registry.hooks import ActiveHooks

T = TypeVar("T")


@dataclass
class Assembly:
    """Findings of a job in the making, and the plugins that it uses."""

    manager: PluginManager
    findings: list[Finding] = field(default_factory=list)
    overwrites: list[Overwrite] = field(default_factory=list)
    _hooks: ActiveHooks | None = None

    def attempt(self, call: Callable[[], T]) -> T | None:
        """Return what `call` returns; a ConfigError's findings are kept, and None returned."""
        try:
            return call()
        except ConfigError as error:
            self.findings += error.findings
            return None

    def resolve_all(self, parts: Iterable[Part], document: Document) -> list[Part]:
        """Resolve ids by metadata alone; the parts whose id means something, and the chat templates of datasets."""
        resolved = []
        for part in parts:
            found, findings = resolve(part, document, self.manager)
            self.findings += findings
            if found is None:
                continue
            resolved.append(found)
            if found.role == "dataset" and (template := find_template(found, document, self.manager)):
                resolved += self.resolve_all([template], document)
        return resolved

    def select(self, document: Document | None) -> None:
        """Apply what the file says about which distributions take part. It comes before the first id is resolved.

        Raises:
            ConfigError: a selection file of the project or the environment cannot be used, so that no id can
                be resolved.
        """
        layer, findings = job_selection(document) if document is not None else (None, [])
        self.findings += findings
        try:
            _ = self.manager.selection  # reads the files
            self.manager.select_for_job(layer)
            odd = self.manager.unmatched(layer) if layer is not None else []
        except SelectionError as error:
            finding = Finding("error", "bad-selection", error.problem, error.path or None, error.line)
            raise ConfigError([finding]) from error
        for code, (key, name), message in odd:
            assert document is not None
            path = path_of(document, key, name)
            self.findings.append(selection_finding(document, "warning", code, message, path))

    def activate(self, parts: Iterable[Part], document: Document) -> None:
        """Import the hooks of the distributions in use, and of those that the file names under `plugins`."""
        used = {part.spec.distribution for part in parts if part.spec is not None} - {RUNTIME}
        try:
            self._hooks = self.manager.activate(used)
        except RegistryError as error:
            self.findings.append(Finding("error", "broken-hooks", str(error)))
            return
        named = set()
        for path, name in named_plugins(document):
            try:
                self.manager.activate({name})
                named.add(name)
            except RegistryError as error:
                origin = document.origin(path)
                self.findings.append(Finding.at(origin, "error", "unknown-plugin", str(error), path=path))
        if named:
            self._hooks = self.manager.activate(used | named)

    @property
    def hooks(self) -> ActiveHooks:
        if self._hooks is None:
            self._hooks = self.manager.activate(())
        return self._hooks

    def build(self, parts: Iterable[Part], document: Document) -> tuple[Document, dict[str, ComponentConfig]]:
        """Check each section as written, let hooks overwrite it, check the merged whole.

        A key that is missing may be filled by a hook, so only the second check complains about it.
        """
        components: dict[str, ComponentConfig] = {}
        for part in parts:
            if part.role in WITHOUT_SECTION:
                assert part.spec is not None
                components[part.name] = ComponentConfig(part.role, part.id, part.spec, path=part.path)
                continue
            component, findings = check_part(part, document, self.manager)
            if not has_errors(finding for finding in findings if finding.code != "missing-key"):
                patched = self._overwrite(part, document)
                if patched is not document:
                    document = patched
                    component, merged = check_part(part, document, self.manager)
                    findings = [f for f in findings if f.level != "error"] + merged
            self.findings += findings
            if component is not None:
                components[part.name] = component
        return document, components

    def _overwrite(self, part: Part, document: Document) -> Document:
        if not self.hooks.sources:
            return document
        from mm_core.config.overwrite import apply_patches
        from mm_registry.hooks import collect_patches

        assert part.spec is not None
        section: Mapping[str, Any] = document.value(part.path)
        try:
            patches = collect_patches(self.hooks, part.role, part.spec.id, section)
        except RegistryError as error:
            origin = document.key_origin(part.path)
            self.findings.append(Finding.at(origin, "error", "broken-hook", str(error), path=part.path))
            return document
        document, trace, findings = apply_patches(document, part, patches)
        self.overwrites += trace
        self.findings += findings
        return document


def used_plugins(
    components: Iterable[ComponentConfig], hooks: ActiveHooks, callbacks: Iterable[EntrySpec] = ()
) -> tuple[tuple[str, str], ...]:
    """Return (distribution, version) of everything that a job uses."""
    specs = [component.spec for component in components] + [*hooks.sources.values(), *callbacks]
    return tuple(sorted({(spec.distribution, spec.version) for spec in specs}))
