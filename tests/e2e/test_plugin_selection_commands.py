"""`mm plugin enable` and `mm plugin disable`: what they change in a selection file, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, run_mm
from tests.e2e.plugin_site import Site, full_site


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return full_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("project"))


@pytest.fixture
def site(installed: Site) -> Iterator[Site]:
    yield installed
    installed.clean()


def test_disable_and_enable_keep_the_file_as_it_was(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    text = (
        "# ours\n[plugins]\n# not yet\ndisable = [\n    'mmzoo-plugin-bare', # slow\n]\n\n"
        "[plugins.prefer] # settled on Monday\n\"ae/shared\" = 'mmzoo-plugin-rival'\n"
    )  # fmt: skip
    file.write_text(text, encoding="utf-8")
    off = site.json("plugin", "disable", "MMzoo_Plugin.Acme", "--scope", "project")
    assert (off["distribution"], off["changed"], off["created"], off["takes_part"]) == (
        "mmzoo-plugin-acme",
        True,
        False,
        False,
    )
    assert off["changes"] == ["added mmzoo-plugin-acme to disable"]
    changed = file.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line not in changed.splitlines()] == []
    assert [line for line in changed.splitlines() if line not in text.splitlines()] == [
        '    "mmzoo-plugin-acme",'
    ]
    assert site.json("show", "acme_dit")[0]["status"] == "blocked"
    again = site.json("plugin", "disable", "mmzoo-plugin-acme", "--scope", "project")
    assert (again["changed"], again["changes"], file.read_text(encoding="utf-8")) == (False, [], changed)
    on = site.json("plugin", "enable", "mmzoo-plugin-acme", "--scope", "project")
    assert (on["changed"], on["takes_part"], on["detail"]) == (True, True, "")
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, '[plugins]\ndisable = ["mmzoo-plugin-acme"]\n'),
        ("", '[plugins]\ndisable = ["mmzoo-plugin-acme"]\n'),
        ("[plugins]\r\nallow = ['mmzoo-plugin-acme']\r\n", None),
        ('plugins = { enable = ["mmzoo-plugin-acme"] }\n', None),
        (
            'plugins.disable = ["mmzoo-plugin-bare"]\n',
            'plugins.disable = ["mmzoo-plugin-bare", "mmzoo-plugin-acme"]\n',
        ),
        (
            '[plugins]\nenable = ["MMZOO_plugin_acme"]\n',
            '[plugins]\nenable = []\ndisable = ["mmzoo-plugin-acme"]\n',
        ),
    ],
    ids=["no-file", "empty", "crlf", "inline", "dotted", "enabled"],
)
def test_disable_in_files_of_any_layout(site: Site, text: str | None, expected: str | None) -> None:
    file = site.project / "mmzoo.toml"
    if text is not None:
        file.write_bytes(text.encode())
    done = site.json("plugin", "disable", "mmzoo-plugin-acme", "--scope", "project")
    assert (done["created"], done["changed"], done["takes_part"]) == (text is None, True, False)
    written = file.read_bytes().decode()
    assert expected is None or written == expected
    assert "\r\n" not in (text or "") or written.startswith("[plugins]\r\nallow = ['mmzoo-plugin-acme']\r\n")
    assert site.json("show", "acme_dit")[0]["status"] == "blocked"


def test_enable_says_what_still_keeps_it_out_and_joins_an_allow_list(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    file.write_text('[plugins]\nallow = ["mmzoo-plugin-bare"]\n', encoding="utf-8")
    on = site.json("plugin", "enable", "mmzoo-plugin-acme", "--scope", "project")
    assert on["changes"] == ["added mmzoo-plugin-acme to allow"]
    assert on["takes_part"]
    result = site.mm(
        "plugin", "enable", "mmzoo-plugin-rival", "--scope", "project", MM_PLUGINS="mmzoo-plugin-acme"
    )
    assert result.code == 0
    assert (
        "takes no part, all the same: MM_PLUGINS='mmzoo-plugin-acme' does not list mmzoo-plugin-rival"
        in result.out
    )


def test_the_nearest_project_file_is_edited_through_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "mmzoo.toml").symlink_to(tmp_path / "real.toml")
    (tmp_path / "real.toml").write_text("[plugins]\n", encoding="utf-8")
    (tmp_path / "real.toml").chmod(0o640)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    result = run_mm(
        "plugin", "disable", "mmzoo-plugin-haar", "--scope", "project", cwd=tmp_path / "deep" / "er"
    )
    assert result.code == 0, result.err
    assert (tmp_path / "mmzoo.toml").is_symlink()
    assert "mmzoo-plugin-haar" in (tmp_path / "real.toml").read_text(encoding="utf-8")
    assert (tmp_path / "real.toml").stat().st_mode & 0o777 == 0o640
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("disable", "mmzoo-core"), "is MM Zoo itself and cannot be disabled"),
        (("disable", "MMZOO_registry"), "is MM Zoo itself and cannot be disabled"),
        (("disable", "mmzoo-plugin-acne"), "is not installed; did you mean 'mmzoo-plugin-acme'?"),
        (("disable", "acme"), "is not installed; did you mean 'mmzoo-plugin-acme'?"),
        (("enable", "pip"), "is no plugin"),
        (("disable",), "a distribution is missing"),
        (("disable", "a", "b"), 'unexpected argument "b"'),
        (("enable", "mmzoo-plugin-acme", "--scope", "world"), "write environment or project"),
        (("explain",), "an id is missing"),
        (("explain", "a", "--group", "predictors"), "Did you mean"),
        (("explan",), "did you mean `mm plugin explain`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_change_nothing(site: Site, arguments: tuple[str, ...], said: str) -> None:
    more = (
        ("--scope", "project") if arguments[0] in ("enable", "disable") and "--scope" not in arguments else ()
    )
    result = site.mm("plugin", *arguments, *more)
    assert result.code == 2
    assert said in result.err
    assert not result.out
    assert not list(site.project.iterdir())


def test_a_name_in_the_file_can_be_taken_out_though_it_is_not_installed(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    file.write_text('[plugins]\ndisable = ["mmzoo-plugin-uninstalled"]\n', encoding="utf-8")
    assert site.json("plugin", "enable", "mmzoo-plugin-uninstalled", "--scope", "project")["changed"]
    assert "uninstalled" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["[plugins\n", "[plugins]\ndisable = 3\n", "[plugin]\n"], ids=["toml", "type", "table"]
)
def test_a_damaged_file_is_not_touched(site: Site, text: str) -> None:
    file = site.project / "mmzoo.toml"
    file.write_text(text, encoding="utf-8")
    result = site.mm("plugin", "disable", "mmzoo-plugin-acme", "--scope", "project")
    assert result.code == 2
    assert result.err.startswith("error: mmzoo.toml:")
    assert file.read_text(encoding="utf-8") == text


def test_a_link_that_leads_nowhere_is_not_followed(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    file.symlink_to("nowhere/plugins.toml")
    for command in ("disable", "enable"):
        result = site.mm("plugin", command, "mmzoo-plugin-acme", "--scope", "project")
        assert result.code == 2
        assert "it is a link to nowhere/plugins.toml, which does not exist" in result.err
    assert not (site.project / "nowhere").exists()
    file.unlink()


def test_a_file_that_cannot_be_written_is_said(site: Site) -> None:
    file = site.project / "mmzoo.toml"
    file.write_text("# ours\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mm_core",
        "plugin",
        "disable",
        "mmzoo-plugin-acme",
        "--scope",
        "project",
    ]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command],  # no file may grow; rights do not stop root
        cwd=site.project, env={**ENVIRONMENT, "PYTHONPATH": str(site.root)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {file} cannot be written: ")
    assert file.read_text(encoding="utf-8") == "# ours\n"


def test_commands_at_the_same_time_lose_nothing(site: Site) -> None:
    names = ["mmzoo-plugin-acme", "mmzoo-plugin-bare", "mmzoo-plugin-rival"]
    for _ in range(4):
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: site.json("plugin", "disable", name, "--scope", "project"), names))
        file = site.project / "mmzoo.toml"
        assert sorted(tomllib.loads(file.read_text(encoding="utf-8"))["plugins"]["disable"]) == names
        file.unlink()
