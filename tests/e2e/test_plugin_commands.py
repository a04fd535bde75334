"""`mm show`, `mm doctor` and `mm plugin explain` as a user types them, on plugins whose import would raise."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli.explanations import EXPLANATIONS
from mm_registry import Status
from tests.e2e.conftest import ENVIRONMENT, ROOT, run_mm
from tests.e2e.plugin_site import API, Site, full_site


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return full_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("project"))


@pytest.fixture
def site(installed: Site) -> Iterator[Site]:
    yield installed
    installed.clean()


# What is imported


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "acme_dit"),
        ("show", "nothing_like_it"),
        ("doctor",),
        ("plugin",),
        ("plugin", "explain", "shared"),
        ("plugin", "disable", "mmzoo-plugin-acme", "--scope", "project"),
        ("plugin", "enable", "mmzoo-plugin-acme", "--scope", "project"),
        ("plugin", "lock"),
    ],
    ids=" ".join,
)
def test_neither_a_plugin_nor_torch_nor_pydantic_is_imported(site: Site, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mm_core", *arguments],
        cwd=site.project, env={**ENVIRONMENT, "PYTHONPATH": str(site.root)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "mm_registry" in names
    assert not {name for name in names if name.startswith("mm_plugin_")}
    assert not names & {"torch", "pydantic", "pydantic_core", "transformers", "diffusers", "numpy", "rich"}


# mm show


def test_show_has_what_belongs_to_an_id(site: Site) -> None:
    (shown,) = site.json("show", "acme_dit")
    assert (shown["asked"], shown["id"], shown["role"]) == ("acme_dit", "acme_dit", "predictor")
    assert (shown["distribution"], shown["version"], shown["status"]) == (
        "mmzoo-plugin-acme",
        "1.0",
        "available",
    )
    assert shown["chosen_by"] == "predictor.model_id"
    assert shown["old_ids"] == ["acme_old"]
    assert {companion["group"]: companion["target"] for companion in shown["companions"]} == {
        "mm_core.configs": "mm_plugin_acme:C",
        "mm_core.sharding_policies": "mm_plugin_acme:P",
        "mm_core.weights": "mm_plugin_acme:W",
        "mm_core.examples": "mm_plugin_acme:E",
    }
    assert [hooks["target"] for hooks in shown["hooks"]] == ["mm_plugin_acme"]
    text = site.mm("show", "acme_dit").out
    for word in (
        "predictor of mmzoo-plugin-acme 1.0",
        "mm_plugin_acme:C",
        "mm_plugin_acme:P",
        "acme_old",
        "mmzoo-core>=0.1,<0.2",
    ):
        assert word in text


def test_show_by_an_old_id_a_qualified_id_and_a_companion(site: Site) -> None:
    (old,) = site.json("show", "acme_old")
    assert (old["asked"], old["id"]) == ("acme_old", "acme_dit")
    assert "acme_old, an old id of acme_dit" in site.mm("show", "acme_old").out
    (qualified,) = site.json("show", "mmzoo_plugin_acme/shared")
    assert (qualified["distribution"], qualified["status"]) == ("mmzoo-plugin-acme", "ambiguous")
    (config,) = site.json("show", "predictor/acme_dit", "--group", "config")
    assert (config["group"], config["target"], config["companions"]) == (
        "mm_core.configs",
        "mm_plugin_acme:C",
        [],
    )


def test_show_names_every_claim_and_why_it_cannot_be_used(site: Site) -> None:
    assert [(s["distribution"], s["status"]) for s in site.json("show", "shared")] == [
        ("mmzoo-plugin-acme", "ambiguous"),
        ("mmzoo-plugin-rival", "ambiguous"),
    ]
    (future,) = site.json("show", "future_ae")
    assert future["status"] == "incompatible"
    assert "mmzoo-core >=9" in future["detail"]
    (big,) = site.json("show", "acme_big")
    assert big["status"] == "missing_extra"
    assert "pip install 'mmzoo-plugin-acme[big]'" in big["detail"]
    (bare,) = site.json("show", "bare_dit")
    assert bare["companions"] == bare["required_api"] == []
    assert "config class     none" in site.mm("show", "bare_dit").out


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("acme_dot", "did you mean 'acme_dit' (mmzoo-plugin-acme 1.0)"),
        ("acme_gone", "pip install 'mmzoo-plugin-acme==0.3'"),
        ("zzzz", "`mm list` shows every id"),
        ("mmzoo-plugin-nowhere/acme_dit", "mmzoo-plugin-nowhere is not installed"),
        ("x" * 5000, "`mm list` shows every id"),
    ],
    ids=["near", "dropped", "unlike", "distribution", "long"],
)
def test_show_of_an_unknown_id(site: Site, id: str, said: str) -> None:
    result = site.mm("show", id)
    assert result.code == 2
    assert not result.out
    assert said in result.err
    assert result.err.startswith("error: no installed distribution offers ")
    assert len(result.err.encode()) <= 1100


# mm doctor


def test_doctor_says_what_is_wrong_and_what_is_left_unsaid(site: Site) -> None:
    found = site.mm("doctor", "--format", "json")
    assert found.code == 2
    page = json.loads(found.out)
    assert page["ok"] is False
    by_code: dict[str, list[Any]] = {}
    for problem in page["problems"]:
        by_code.setdefault(problem["code"], []).append(problem)
        assert problem["why"] == EXPLANATIONS[problem["code"]].why
    assert {p["distribution"] for p in by_code["ambiguous"]} == {"mmzoo-plugin-acme", "mmzoo-plugin-rival"}
    assert [p["level"] for p in by_code["incompatible"]] == ["error"]
    assert [(p["level"], p["distribution"]) for p in by_code["missing_extra"]] == [
        ("warning", "mmzoo-plugin-acme")
    ]
    (unsaid,) = by_code["no-api-range"]
    assert unsaid["distribution"] == "mmzoo-plugin-bare"
    assert '"mmzoo-core>=0.1,<0.2" and "mmzoo-registry>=0.1,<0.2"' in unsaid["mend"]
    assert "mmzoo-plugin-bare" in [p["distribution"] for p in by_code["no-config-class"]]
    assert (
        '"predictor/bare_dit"'
        in next(p for p in by_code["no-sharding-policy"] if "bare" in p["distribution"])["mend"]
    )
    levels = [problem["level"] for problem in page["problems"]]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    versions = {each["distribution"]: each["version"] for each in page["versions"]}
    assert versions["torch"].startswith("2.")
    assert {"mmzoo-core", "mmzoo-registry", "pluggy", "pydantic", "diffusers"} <= set(versions)
    statuses = {each["distribution"]: each["statuses"] for each in page["plugins"]}
    assert statuses["mmzoo-plugin-rival"] == {"ambiguous": 2}
    text = site.mm("doctor").out
    assert "error: mmzoo-plugin-future 1.0: the ae 'future_ae'" in text
    assert all(problem["why"] in text for problem in page["problems"])


def test_doctor_is_content_with_what_is_sound(tmp_path: Path) -> None:
    result = run_mm("doctor", "--format", "json", cwd=tmp_path)
    page = json.loads(result.out)
    assert result.code == 0, page["problems"]
    assert page["ok"] is True
    assert not [problem for problem in page["problems"] if problem["level"] == "error"]


def test_doctor_looks_for_modules_without_importing_them(tmp_path: Path) -> None:
    site = Site(tmp_path / "site", tmp_path)
    site.add("mmzoo-plugin-lost", {"mm_core.tasks": {"lost_task": "mm_plugin_lost.gone:Task"}})
    site.add(
        "mmzoo-plugin-typo",
        {"mm_core.tasks": {"typo_task": "mm_plugin_typo.task:Task", "fine": "mm_plugin_typo:T"}},
    )
    (site.root / "mm_plugin_typo" / "task.py").write_text("\n\nclass Task\n    pass\n", encoding="utf-8")
    site.add(
        "mmzoo-plugin-needy",
        {"mm_core.tasks": {"needy": "mm_plugin_needy:T"}},
        requires=(*API, "absent-thing>=2", "pip<1"),
    )
    problems = {(p["distribution"], p["code"]): p for p in site.json("doctor")["problems"]}
    lost = problems["mmzoo-plugin-lost", "missing-target"]
    assert "there is no module 'mm_plugin_lost.gone'" in lost["message"]
    typo = problems["mmzoo-plugin-typo", "syntax-error"]
    assert "the task 'typo_task'" in typo["message"]
    assert "'fine'" not in typo["message"]
    assert "task.py:3" in typo["message"]
    needy = problems["mmzoo-plugin-needy", "missing-requirement"]
    assert needy["mend"] == "Run: pip install 'absent-thing>=2'"
    assert (needy["level"], problems["mmzoo-plugin-needy", "outdated-requirement"]["level"]) == (
        "error",
        "warning",
    )


def test_a_requirement_that_means_nothing_stops_no_command(tmp_path: Path) -> None:
    site = Site(tmp_path / "site", tmp_path)
    odd = """mmzoo-core>=0.1; sys_platform ~= 'linux'"""
    site.add("mmzoo-plugin-odd", {"mm_core.tasks": {"odd": "mm_plugin_odd:T"}}, requires=(odd, "x y z"))
    assert site.json("show", "odd")[0]["status"] == "available"
    (problem,) = [p for p in site.json("doctor")["problems"] if p["code"] == "unreadable-requirement"]
    assert odd in problem["message"]
    assert (problem["level"], problem["distribution"]) == ("warning", "mmzoo-plugin-odd")


def test_doctor_reads_selections_and_survives_a_damaged_one(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    file.write_text('[plugins]\ndisable = ["mmzoo-plugin-rival", "mmzoo-plugin-acne"]\n', encoding="utf-8")
    page = site.json("doctor", MM_PLUGINS="mmzoo-plugin-acme,mmzoo-plugin-rival")
    variable, environment, project = page["selection"]
    assert variable["allow"] == ["mmzoo-plugin-acme", "mmzoo-plugin-rival"]
    assert (environment["scope"], environment["exists"]) == ("environment", False)
    assert project["place"] == str(file)
    assert project["disable"] == ["mmzoo-plugin-acne", "mmzoo-plugin-rival"]
    codes = {(p["distribution"], p["code"]): p for p in page["problems"]}
    assert (
        "did you mean 'mmzoo-plugin-acme'?" in codes["mmzoo-plugin-acne", "selected-not-installed"]["message"]
    )
    assert "mmzoo.toml:2" in codes["mmzoo-plugin-rival", "blocked"]["message"]
    assert codes["mmzoo-plugin-bare", "not_allowlisted"]["level"] == "note"
    assert ("mmzoo-plugin-bare", "no-config-class") not in codes  # what takes no part is not examined

    file.write_text("[plugins\n", encoding="utf-8")
    damaged = site.mm("doctor", "--format", "json")
    assert damaged.code == 2
    page = json.loads(damaged.out)
    assert page["problems"][0]["code"] == "unreadable-selection"
    assert page["problems"][0]["message"].startswith("mmzoo.toml:1: ")
    assert page["selection"][2]["readable"] is False
    assert {each["distribution"] for each in page["plugins"]} >= {"mmzoo-core", "mmzoo-plugin-acme"}


def test_every_kind_of_problem_is_explained() -> None:
    """The codes are those that stand in the registry's source, or in the doctor's own."""
    sources = [
        *(ROOT / "registry/mm_registry").glob("*.py"),
        *(ROOT / f"mm_core/cli/{name}.py" for name in ("devices", "diagnosis", "doctor")),
    ]
    said = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[a-z]+(-[a-z]+)+", node.value)
    }
    codes = {word for word in said if not word.startswith("mmzoo-")} - {
        "requires-dist",
        "egg-info",
        "dist-info",
        "torch-npu",
        "utf-8",
    }
    statuses = {str(status) for status in Status} - {"available", "broken"}
    assert codes | statuses == set(EXPLANATIONS)


# mm plugin explain


def test_explain_tells_claims_selection_and_outcome(site: Site) -> None:
    (told,) = site.json("plugin", "explain", "shared")
    assert [claim["distribution"] for claim in told["claims"]] == ["mmzoo-plugin-acme", "mmzoo-plugin-rival"]
    assert told["chosen"] is None
    assert "is offered by mmzoo-plugin-acme 1.0 and mmzoo-plugin-rival 1.0" in told["outcome"]

    (site.project / "mmzoo.toml").write_text(
        '[plugins.prefer]\n"ae/shared" = "mmzoo-plugin-rival"\n', encoding="utf-8"
    )
    (told,) = site.json("plugin", "explain", "shared")
    assert told["chosen"]["distribution"] == "mmzoo-plugin-rival"
    assert told["selection"] == ["mmzoo.toml:2 prefers mmzoo-plugin-rival for 'ae/shared'"]
    verdicts = {claim["distribution"]: claim["verdict"] for claim in told["claims"]}
    assert verdicts["mmzoo-plugin-rival"] == "chosen"
    assert "mmzoo.toml:2 prefers mmzoo-plugin-rival" in verdicts["mmzoo-plugin-acme"]
    text = site.mm("plugin", "explain", "shared").out
    assert text.startswith("shared: ae, chosen by ae.model_id\n")
    assert all(word in text for word in (*verdicts, told["outcome"], told["selection"][0]))


def test_explain_of_old_and_unknown_ids_is_an_outcome(site: Site) -> None:
    (old,) = site.json("plugin", "explain", "acme_old")
    assert old["alias_of"] == "acme_dit"
    assert old["chosen"]["id"] == "acme_dit"
    for arguments, group in (
        (("acme_dot",), None),
        (("acme_dot", "--group", "predictor"), "mm_core.predictor_models"),
    ):
        result = site.mm("plugin", "explain", *arguments, "--format", "json")
        assert result.code == 0
        (unknown,) = json.loads(result.out)
        assert (unknown["group"], unknown["claims"], unknown["chosen"]) == (group, [], None)
        assert "did you mean 'acme_dit'" in unknown["outcome"]
