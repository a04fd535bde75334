"""`plugins` of a job: which distributions take part, whose claims count, and old ids wherever an id stands."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import ConfigError, load_generation_job, load_training_job
from mm_core.config.file_check import check_file
from mm_registry import PluginManager

HOOKS = """
from mm_registry import ConfigPatch, hookimpl

@hookimpl
def overwrite_config(role, model_id, config):
    if role == "diffusion" and model_id in ("new", "wan_flow_match_scheduler"):
        return ConfigPatch({"shift": 7.5}, reason="asked for %s" % model_id)
"""


class Plugins:
    """Distributions in a folder of their own, beside the real ones."""

    def __init__(self, root: Path, project: Path) -> None:
        self.root, self.project = root, project
        self.real = PluginManager(environ={}, environment_file=None, project_folder=None)

    def add(self, name: str, entries: Mapping[str, Mapping[str, str]], modules: Mapping[str, str]) -> None:
        info = self.root / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [
            line
            for group, ids in entries.items()
            for line in (f"[mm_core.{group}]", *(f"{id} = {value}" for id, value in ids.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (self.root / f"{module}.py").write_text(source)

    def target(self, group: str, id: str) -> str:
        """What a real entry names, so that ours is as good."""
        return self.real.resolve(f"mm_core.{group}", id).target

    def add_renamed(self, name: str) -> None:
        """A distribution whose every component was renamed once, with hooks."""
        config = {f"{role}/new": self.target("configs", f"{role}/{id}") for _, role, id in _REAL}
        entries = {group: {"new": self.target(group, id)} for group, _, id in _REAL}
        aliases = {f"{role}/old": "new" for _, role, _ in _REAL}
        self.add(
            name,
            {**entries, "configs": config, "aliases": aliases, "hooks": {"hooks": f"{name}_hooks"}},
            {f"{name}_hooks": HOOKS},
        )

    def manager(self) -> PluginManager:
        return PluginManager(
            [str(self.root), *sys.path], environ={}, environment_file=None, project_folder=self.project
        )


_REAL = (
    ("diffusion_models", "diffusion", "wan_flow_match_scheduler"),
    ("datasets", "dataset", "t2v"),
    ("pipelines", "pipeline", "WanPipeline"),
)


@pytest.fixture
def plugins(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    made = Plugins(tmp_path / "site", tmp_path)
    made.root.mkdir()
    monkeypatch.syspath_prepend(str(made.root))
    for name in ("renamed", "rival"):
        monkeypatch.delitem(sys.modules, f"{name}_hooks", raising=False)
    return made


def job_of(files: Any, plugins: Plugins) -> Any:
    files.write()
    return load_training_job(files.flags(), manager=plugins.manager())


def errors_of(files: Any, plugins: Plugins) -> str:
    with pytest.raises(ConfigError) as raised:
        job_of(files, plugins)
    return str(raised.value)


def told(job: Any, code: str) -> list[str]:
    return [str(finding) for finding in job.findings if finding.code == code]


def test_old_ids_work_everywhere_and_are_warnings(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    files.model["diffusion"]["model_id"] = "old"
    files.model["diffusion"].pop("shift")
    files.data["dataset_param"]["dataset_type"] = "renamed/old"
    job = job_of(files, plugins)
    where = files.find('"diffusion": {\n        "model_id": ^"old"')
    dataset = files.find('"dataset_type": ^"renamed/old"')
    assert told(job, "old-id") == [
        f'{where} warning: "old" is an old id of "new". Write "new" instead',
        f'{dataset} warning: "renamed/old" is an old id of "renamed/new". Write "renamed/new" instead',
    ]
    component = job.components["diffusion"]
    assert (component.spec.id, component.spec.distribution, component.fields["shift"]) == (
        "new",
        "renamed",
        7.5,
    )
    assert job.resolved()["overwrites"][0]["reason"] == "asked for new", "hooks meet the id that there is"
    assert ("renamed", "1.2") in job.plugins


def test_old_id_in_an_inference_file(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    files.inference["pipeline_class"] = "old"
    files.write()
    job = load_generation_job("inference.json", manager=plugins.manager())
    assert told(job, "old-id") == [
        'inference.json:2:23 warning: "old" is an old id of "new". Write "new" instead'
    ]
    assert job.components["pipeline"].spec.distribution == "renamed"
    assert "old-id" in {finding.code for finding in check_file("inference.json", manager=plugins.manager())}


def test_job_prefers_and_disables(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    plugins.add_renamed("rival")
    files.model["diffusion"]["model_id"] = "new"
    files.model["diffusion"].pop("shift")
    text = errors_of(files, plugins)
    assert (
        "the diffusion model 'new' is offered by renamed 1.2 and rival 1.2; write the one that you mean"
        in text
    )
    assert '"diffusion/new" = "renamed" (or "rival") under [plugins.prefer] in mmzoo.toml' in text

    files.model["plugins"] = {"prefer": {"diffusion/new": "rival"}}
    job = job_of(files, plugins)
    assert job.components["diffusion"].spec.distribution == "rival"
    assert job.components["diffusion"].config is not None, "its own config class"
    assert {name for name, _ in job.plugins} >= {"rival"}
    assert "renamed" not in {name for name, _ in job.plugins}
    assert "renamed_hooks" not in sys.modules, "hooks only of distributions in use"
    assert job.model.plugins.prefer == {"diffusion/new": "rival"}
    assert job.resolved()["values"]["model"]["plugins"]["prefer"] == {"diffusion/new": "rival"}

    files.model["plugins"] = {"disable": ["rival"], "use": ["renamed"]}
    assert job_of(files, plugins).components["diffusion"].spec.distribution == "renamed"
    files.model["plugins"] = {"disable": ["rival"], "use": ["rival"]}
    assert "the hooks of rival 1.2 cannot be used: model.json:" in errors_of(files, plugins)


def test_hooks_of_a_distribution_that_the_object_form_names(files: Any, plugins: Plugins) -> None:
    plugins.add("shifty", {"hooks": {"hooks": "renamed_hooks"}}, {"renamed_hooks": HOOKS})
    files.model["diffusion"].pop("shift")
    files.model["plugins"] = {"use": ["shifty"]}
    assert job_of(files, plugins).components["diffusion"].fields["shift"] == 7.5
    files.model["plugins"] = {"use": ["shifty", "shitfy", "pydantic"]}
    text = errors_of(files, plugins)
    place = files.find('^"shitfy"')
    assert f"{place}: the distribution 'shitfy' is not installed; did you mean 'shifty'?" in text
    assert "the distribution 'pydantic' declares no entry point of MM Zoo" in text


def test_one_job_does_not_select_for_the_next(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    manager = plugins.manager()
    files.model["plugins"] = {"disable": ["mmzoo-plugin-wan22"]}
    files.write()
    with pytest.raises(ConfigError, match=r"model\.json:\d+ disables mmzoo-plugin-wan22"):
        load_training_job(files.flags(), manager=manager)
    files.model.pop("plugins")
    files.write()
    assert load_training_job(files.flags(), manager=manager).components


@pytest.mark.parametrize(
    ("written", "snippet", "said"),
    [
        (
            {"disable": ["acme", "Acme"], "enable": ["acme"]},
            '"enable": [\n            ^"acme"',
            "acme is listed under both enable and disable; keep one of them",
        ),
        ({"disable": ["mmzoo-core"]}, '^"mmzoo-core"', "mmzoo-core is MM Zoo itself and cannot be disabled"),
        (
            {"prefer": {"predictr/x": "acme"}},
            '"predictr/x": ^"acme"',
            "'predictr/x' under prefer is not of the form role/id, such as predictor/wandit; "
            "did you mean 'predictor'?",
        ),
        ({"disabled": []}, '^"disabled"', 'unknown key "disabled"'),
        ({"use": "acme"}, '"use": ^"acme"', '"use" is "acme", expected a list'),
        ({"allow": [3]}, "^3\n", "is 3, expected a text in quotes"),
    ],
)
def test_what_is_wrong_with_it_is_said_at_its_place(
    files: Any, plugins: Plugins, written: Any, snippet: str, said: str
) -> None:
    files.model["plugins"] = written
    text = errors_of(files, plugins)
    assert f"{files.find(snippet)}: " in text
    assert said in text
    assert [f.code for f in check_file("model.json", manager=plugins.manager()) if f.level == "error"]


def test_neither_list_nor_object(files: Any, plugins: Plugins) -> None:
    files.model["plugins"] = 3
    assert '"plugins" is 3, expected' in errors_of(files, plugins)
    files.model["plugins"] = [3]
    assert "is 3, expected a text in quotes" in errors_of(files, plugins)


def test_names_that_are_not_installed_are_warnings(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    files.model["plugins"] = {"disable": ["renamde"], "prefer": {"ae/new": "renamed"}}
    job = job_of(files, plugins)
    place, line = files.find('^"renamde"'), files.find('^"renamde"').split(":")[1]
    assert told(job, "selected-not-installed") == [
        f"{place} warning: model.json:{line} disables 'renamde', which is not installed; did you mean 'renamed'?"
    ]
    (said,) = told(job, "preferred-without-claim")
    assert "prefers 'renamed' for 'ae/new', which it does not offer" in said


def test_a_selection_file_that_cannot_be_used_is_the_only_finding(files: Any, plugins: Plugins) -> None:
    (plugins.project / "mmzoo.toml").write_text("[plugins]\nx = \n")
    assert errors_of(files, plugins) == "mmzoo.toml:2: this is no TOML: Invalid value"
    for name in ("model.json", "data.json", "inference.json"):
        findings = check_file(name, manager=plugins.manager())
        assert [str(f) for f in findings if f.level == "error"] == [
            "mmzoo.toml:2 error: this is no TOML: Invalid value"
        ]


def test_project_file_decides_for_jobs(files: Any, plugins: Plugins) -> None:
    plugins.add_renamed("renamed")
    plugins.add_renamed("rival")
    files.model["diffusion"]["model_id"] = "new"
    files.model["diffusion"].pop("shift")
    (plugins.project / "mmzoo.toml").write_text('[plugins.prefer]\n"diffusion/new" = "rival"\n')
    assert job_of(files, plugins).components["diffusion"].spec.distribution == "rival"
