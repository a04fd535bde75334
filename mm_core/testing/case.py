"""What a check is given: one component of a plugin (`Case`), or the plugin as a whole (`Plugin`). Torch-free."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckCrashed, CheckFailed, CheckSkipped
from mm_core.testing.example import Example
from mm_registry.groups import GROUPS, HOOKS, ROLES
from mm_registry.spec import EntrySpec, canonical_name

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mm_core.config.component import ComponentConfig
    from mm_core.config.document import Document
    from mm_core.config.findings import Finding
    from mm_core.config.parts import Part
    from mm_core.testing.survey import Survey
    from mm_registry.discovery import Record
    from mm_registry.manager import PluginManager

_CONFIGS, _POLICIES, _WEIGHTS = "mm_core.configs", "mm_core.sharding_policies", "mm_core.weights"
_EXAMPLES = "mm_core.examples"
# Where the sections of these roles stand in a job's files; the others are named like their role.
_PLACES = {
    "dataset": ("dataset_param", "dataset_type"),
    "pipeline": ("pipeline_config", "pipeline_class"),
    "i2v_processor": ("i2v_processor", "processor_id"),
}
_WITHOUT_SECTION = frozenset({"task", "callback", "chat_template"})


@dataclass(frozen=True)
class Plugin:
    """One installed distribution.

    Attributes:
        manager: the plugin manager of this process.
        record: what discovery read of it.
        folder: an empty folder for files of checks; removed afterwards.
        time_limit: seconds that one import may take.
        crashed: (group, id) of what ended a process when it was imported -> how. It must not be imported again.
    """

    manager: PluginManager
    record: Record
    folder: Path
    time_limit: float = 120.0
    crashed: dict[tuple[str, str], str] = field(default_factory=dict, compare=False)
    _cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    _makers: dict[str, Callable[[], Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def distribution(self) -> str:
        return self.record.name

    @property
    def version(self) -> str:
        return self.record.version

    @property
    def subject(self) -> str:
        """How results name it: the distribution."""
        return self.record.name

    def specs(self, group: str) -> tuple[EntrySpec, ...]:
        """Its own entries in a group, usable or not."""
        wanted = canonical_name(self.distribution)
        return tuple(s for s in self.manager.specs(group) if canonical_name(s.distribution) == wanted)

    @cached_property
    def components(self) -> tuple[EntrySpec, ...]:
        """Its components, by role and id."""
        return tuple(spec for group in ROLES.values() for spec in self.specs(group.name))

    @property
    def light_imports(self) -> Survey:
        """What importing its light targets did, each in a process of its own."""
        from mm_core.testing.survey import survey_light

        found: Survey = self.once("light imports", lambda: survey_light(self))
        return found

    @property
    def component_imports(self) -> Survey:
        """What importing its components did; the worker fills it in while it imports them into itself."""
        from mm_core.testing.survey import survey_components

        found: Survey = self.once("component imports", lambda: survey_components(self))
        return found

    def must_not_crash(self, *specs: EntrySpec | None) -> None:
        """Raise unless these entries can be imported without ending this process.

        Raises:
            CheckCrashed: one of them ended a process before.
        """
        for spec in specs:
            ended = self.crashed.get((spec.group, spec.id)) if spec is not None else None
            if spec is not None and ended is not None:
                raise CheckCrashed(f"importing {spec.target}: {ended}")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make()` returned the first time that `name` was asked for; for what is costly."""
        if name not in self._cache:
            self._cache[name] = self._makers.get(name, make)()
        return self._cache[name]

    def later(self, name: str, make: Callable[[], Any]) -> None:
        """Have `once(name, …)` take `make` instead of what it is given."""
        self._makers[name] = make


@dataclass(frozen=True)
class Case:
    """One component of a plugin, and the example by which it is tried out.

    Attributes:
        manager: the plugin manager of this process.
        spec: the component's entry.
        role: `predictor`.
        id: `wandit`.
        example: what the plugin declares for it; None if it declares none (`section` then holds the defaults).
        folder: an empty folder for files of checks; removed afterwards.
        plugin: the distribution that it belongs to.
    """

    manager: PluginManager
    spec: EntrySpec
    role: str
    id: str
    example: Example | None
    folder: Path
    plugin: Plugin

    @property
    def subject(self) -> str:
        """How results name it: `predictor/wandit`."""
        return f"{self.role}/{self.id}"

    @property
    def distribution(self) -> str:
        return self.spec.distribution

    @property
    def label(self) -> str:
        """What messages call it: `predictor (wandit)`."""
        return f"{self.role} ({self.id})"

    @property
    def policy_spec(self) -> EntrySpec | None:
        """The entry of its sharding policy, or None."""
        return self._companion(_POLICIES)

    @property
    def config_spec(self) -> EntrySpec | None:
        """The entry of its config class, or None."""
        return self._companion(_CONFIGS)

    @property
    def weights_spec(self) -> EntrySpec | None:
        """The entry of its weights adapter, or None."""
        return self._companion(_WEIGHTS)

    @property
    def example_spec(self) -> EntrySpec | None:
        """The entry of its example, or None."""
        return self._companion(_EXAMPLES)

    def _companion(self, group: str) -> EntrySpec | None:
        if group not in GROUPS:
            return None
        return self.manager.find(group, self.subject, self.spec.distribution)

    @property
    def target(self) -> Any:
        """The component itself, imported: a class, or a function that builds one.

        Raises:
            BrokenPluginError: it cannot be imported.
            CheckCrashed: importing it ends the process.
        """
        self.plugin.must_not_crash(self.spec)
        return self.manager.load(self.spec)

    @property
    def config_class(self) -> type[BaseModel] | None:
        """Its pydantic class, imported; None if it registers none.

        Raises:
            RegistryError: it cannot be imported or is no pydantic class.
        """
        from mm_core.config.parts import config_class

        self.plugin.must_not_crash(self.config_spec)
        return config_class(self.part, self.manager)

    # Its section, as the core reads it

    @property
    def section(self) -> dict[str, Any]:
        """A section as a user writes it, without the id: the example's, or nothing but `init: random`."""
        if self.example is not None:
            return copy.deepcopy(dict(self.example.section))
        from mm_core.config.component import WITH_WEIGHTS

        return {"init": "random"} if self.role in WITH_WEIGHTS else {}

    @property
    def part(self) -> Part:
        """Its place in a configuration file."""
        from mm_core.config.parts import Part

        key, id_key = _PLACES.get(self.role, (self.role, "model_id"))
        return Part(key, self.role, (key,), (key, id_key), self.id, self.spec)

    def document(self, section: Mapping[str, Any] | None = None) -> Document:
        """A file that holds one section (by default its own) with its id, as the reader returns it."""
        from mm_core.config.document import Document

        key, id_key = self.part.id_path
        return Document.from_data(
            {str(key): {id_key: self.id, **(self.section if section is None else section)}}
        )

    def read(
        self, section: Mapping[str, Any] | None = None
    ) -> tuple[ComponentConfig | None, tuple[Finding, ...]]:
        """Check a section (by default its own) as `mm train` does, hooks included, and return what it means and
        what was found.

        Raises:
            CheckCrashed: importing the config class or the hooks ends the process.
        """
        from mm_core.config.assemble import Assembly
        from mm_core.config.component import ComponentConfig

        self.plugin.must_not_crash(self.config_spec, *self.plugin.specs(HOOKS))
        if self.role in _WITHOUT_SECTION:
            return ComponentConfig(self.role, self.id, self.spec, fields=self.section), ()
        if self.role == "transformers_model":
            return self._read_network(section)
        assembly = Assembly(self.manager)
        document, part = self.document(section), self.part
        assembly.activate([part], document)
        _, components = assembly.build([part], document)
        return components.get(part.name), tuple(assembly.findings)

    def _read_network(
        self, section: Mapping[str, Any] | None
    ) -> tuple[ComponentConfig | None, tuple[Finding, ...]]:
        """As `read`, of the file of a transformers model, whose section is the whole of it."""
        from mm_core.config.assemble import Assembly
        from mm_core.config.document import Document
        from mm_core.config.transformers_check import NAME, check_transformers_model

        if self.example is None or not self.example.config:
            raise CheckSkipped(
                "it declares no example, and its defaults do not do: the example's config.json describes the network"
            )
        written = self.section if section is None else section
        document = Document.from_data(
            {"model_id": self.id, "init": "random", "init_from_hf_path": self._network_folder(), **written}
        )
        assembly = Assembly(self.manager)
        draft = check_transformers_model(document, assembly)
        assembly.activate(draft.parts, document)
        return draft.components.get(NAME), tuple(assembly.findings)

    def _network_folder(self) -> str:
        """A folder with the example's config.json, the same at every call."""
        assert self.example is not None
        folder = self.plugin.folder / f"network-{self.id}"
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=self.plugin.folder))
            (made / "config.json").write_text(json.dumps(dict(self.example.config)), encoding="utf-8")
            with contextlib.suppress(OSError):  # another rank was first
                made.rename(folder)
        return str(folder)

    @property
    def component(self) -> ComponentConfig:
        """Its section, checked; what the factories of `mm_core` build from.

        Raises:
            CheckFailed: the section has errors.
            CheckSkipped: it has no example, and needs keys that have no default.
        """
        component, findings = self.read()
        errors = [finding.text for finding in findings if finding.level == "error"]
        missing = all(finding.code == "missing-key" for finding in findings if finding.level == "error")
        if errors and missing and self.example is None:
            raise CheckSkipped(f"it declares no example, and its defaults do not do: {'; '.join(errors)}")
        if component is None or errors:
            what = "its example" if self.example is not None else "a section of defaults"
            raise CheckFailed(f"{what} is refused: {'; '.join(errors) or 'nothing can be made of it'}")
        return component
