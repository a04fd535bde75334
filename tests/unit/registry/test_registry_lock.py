"""The lock: what it holds, and each way in which an installation can drift from it."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_registry.lock import (
    Lock,
    LockError,
    changed_files,
    compare,
    current_lock,
    read_lock,
    require_lock,
    write_lock,
)

PREDICTORS, CONFIGS = "mm_core.predictor_models", "mm_core.configs"
ENTRIES = {PREDICTORS: {"dit": "acme_dit.model:DiT"}, CONFIGS: {"predictor/dit": "acme_dit.config:Config"}}
MODULES = {"acme_dit/__init__.py": "", "acme_dit/model.py": "raise RuntimeError('imported')\n"}


def record_of(root: Path, info: Path, *more: str) -> None:
    """Write RECORD as pip does, for everything of the distribution that lies there."""
    files = [
        file for folder in (info, root / "acme_dit") for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    lines = []
    for file in files:
        name, content = file.relative_to(root).as_posix(), file.read_bytes()
        if name.endswith("/RECORD"):
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(content)}")
    name = info.relative_to(root).as_posix()
    (info / "RECORD").write_text("\n".join([*lines, *more, f"{name}/RECORD,,", ""]))


@pytest.fixture
def acme(make_site: Callable[..., Any]) -> Callable[..., Any]:
    """Make a site with one installed plugin."""

    def make(name: str, version: str = "1.0", *lines: str, **changes: Any) -> Any:
        site = make_site(name)
        arguments = {"entries": ENTRIES, "modules": MODULES, **changes}
        info = site.add("acme-dit", version, **arguments)
        if "direct_url" not in changes:
            record_of(site.root, info, *lines)
        site.info = info
        return site

    return make


def differences(before: Any, after: Any) -> list[tuple[str, str]]:
    drift = compare(current_lock(before.manager()), current_lock(after.manager()))
    return [(found.kind, found.message) for found in drift]


def test_what_a_lock_holds_and_that_nothing_is_imported(acme: Callable[..., Any]) -> None:
    site = acme("one")
    content = json.loads(current_lock(site.manager()).to_text())
    (entry,) = content["distributions"]
    assert content["format"] == 1
    assert (entry["name"], entry["version"], entry["editable"], entry["selected"]) == (
        "acme-dit",
        "1.0",
        False,
        True,
    )
    assert entry["contents"]["of"] == "RECORD"
    assert len(entry["contents"]["sha256"]) == 64
    assert entry["ids"] == {
        CONFIGS: {"predictor/dit": "acme_dit.config:Config"},
        PREDICTORS: {"dit": "acme_dit.model:DiT"},
    }
    assert "acme_dit" not in sys.modules


def test_one_wheel_gives_one_lock_wherever_and_by_whatever_it_is_installed(acme: Callable[..., Any]) -> None:
    one = acme(
        "one", "1.0", "../../../bin/acme,sha256=AAAA,10", "acme_dit/__pycache__/model.cpython-311.pyc,,"
    )
    two = acme("two")
    (two.info / "INSTALLER").write_text("another installer\n")
    record_of(two.root, two.info)
    texts = {current_lock(site.manager()).to_text().replace(str(site.root), "") for site in (one, two)}
    assert len(texts) == 1
    assert differences(one, two) == []


def test_a_lock_comes_back_from_its_file(acme: Callable[..., Any], tmp_path: Path) -> None:
    now = current_lock(acme("one").manager())
    write_lock(tmp_path / "mmzoo.lock", now)
    again = read_lock(tmp_path / "mmzoo.lock")
    assert again == now
    assert again.to_text() == now.to_text()
    assert [path.name for path in tmp_path.glob("*lock*")] == ["mmzoo.lock"]


def test_another_version_is_told_once_with_the_line_that_mends_it(acme: Callable[..., Any]) -> None:
    drift = compare(current_lock(acme("one").manager()), current_lock(acme("two", "2.0").manager()))
    assert [found.kind for found in drift] == ["version"]
    assert str(drift[0]) == "acme-dit is 2.0, the lock says 1.0; run: pip install 'acme-dit==1.0'"


def test_missing_and_added(acme: Callable[..., Any], make_site: Callable[..., Any]) -> None:
    site, empty = acme("one"), make_site("empty")
    assert differences(site, empty) == [("missing", "acme-dit 1.0 is not installed, the lock has it")]
    assert differences(empty, site) == [("added", "acme-dit 1.0 is installed, the lock does not have it")]


def test_other_files_under_the_same_version(acme: Callable[..., Any]) -> None:
    one, two = acme("one"), acme("two", modules={**MODULES, "acme_dit/model.py": "DiT = 1\n"})
    assert differences(one, two) == [
        ("contents", "acme-dit 1.0 has other files than the lock says (RECORD differs)")
    ]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            {PREDICTORS: ENTRIES[PREDICTORS]},
            "acme-dit does not offer the config class predictor/dit, the lock has it",
        ),
        (
            {**ENTRIES, PREDICTORS: {**ENTRIES[PREDICTORS], "dit2": "acme_dit.model:Two"}},
            "acme-dit offers the predictor dit2, the lock does not have it",
        ),
        (
            {**ENTRIES, PREDICTORS: {"dit": "acme_dit.other:DiT"}},
            "the predictor dit of acme-dit is acme_dit.other:DiT, the lock says acme_dit.model:DiT",
        ),
    ],
)
def test_ids_that_changed(acme: Callable[..., Any], entries: Any, said: str) -> None:
    assert ("ids", said) in differences(acme("one"), acme("two", entries=entries))


def editable(path: Path) -> dict[str, Any]:
    return {"url": path.as_uri(), "dir_info": {"editable": True}}


def test_the_source_of_an_editable_install_is_locked(acme: Callable[..., Any], tmp_path: Path) -> None:
    site = acme("one", direct_url=editable(tmp_path / "one"))
    before = current_lock(site.manager())
    (entry,) = json.loads(before.to_text())["distributions"]
    assert (entry["editable"], entry["contents"]["of"]) == (True, "files")
    (site.root / "acme_dit" / "__pycache__").mkdir()
    (site.root / "acme_dit" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"compiled")
    assert compare(before, current_lock(site.manager())) == ()
    for change in (
        lambda: (site.root / "acme_dit" / "model.py").write_text("DiT = 2\n"),
        lambda: (site.root / "acme_dit" / "table.json").write_text("{}"),
        lambda: (site.root / "acme_dit" / "table.json").rename(site.root / "acme_dit" / "other.json"),
    ):
        change()
        now = current_lock(site.manager())
        (drift,) = compare(before, now)
        assert drift.kind == "contents"
        assert drift.message == f"the source files of acme-dit 1.0 (editable {tmp_path}/one) were changed"
        before = now
    assert "acme_dit" not in sys.modules


def test_an_editable_install_in_place_of_a_package(acme: Callable[..., Any], tmp_path: Path) -> None:
    one, two = acme("one"), acme("two", direct_url=editable(tmp_path / "two"))
    assert differences(one, two) == [
        ("editable", "acme-dit 1.0 is an editable install, the lock has a package")
    ]
    drift = compare(current_lock(two.manager()), current_lock(one.manager()))
    assert str(drift[0]).endswith(f"the lock has an editable install; run: pip install -e {tmp_path}/two")


def test_a_distribution_that_is_left_out_now(acme: Callable[..., Any]) -> None:
    site = acme("one")
    with_all, without = current_lock(site.manager()), current_lock(site.manager(MM_PLUGINS=""))
    (drift,) = compare(with_all, without)
    assert drift.kind == "selection"
    assert drift.message == "acme-dit is left out by MM_PLUGINS or a selection file, the lock has it in use"
    assert [found.message for found in compare(without, with_all)] == [
        "acme-dit takes part, the lock has it left out"
    ]


def test_a_choice_between_the_same_distributions_that_changed(
    acme: Callable[..., Any], tmp_path: Path
) -> None:
    from mm_registry import PluginManager

    site = acme("one")
    site.add("rival", entries={PREDICTORS: {"dit": "rival:DiT"}}, modules={"rival.py": ""})

    def lock(preferred: str) -> Lock:
        folder = tmp_path / preferred
        folder.mkdir()
        (folder / "mmzoo.toml").write_text(f'[plugins.prefer]\n"predictor/dit" = "{preferred}"\n')
        return current_lock(
            PluginManager([str(site.root)], environ={}, project_folder=folder, environment_file=None)
        )

    (drift,) = compare(lock("acme-dit"), lock("rival"))
    assert drift.kind == "meaning"
    assert "ids mean something else" in drift.message


def test_files_against_record(acme: Callable[..., Any]) -> None:
    site = acme("one", "1.0", "../bin/acme,,", "acme_dit/gone.py,sha256=AAAA,1")
    assert [drift.message for drift in changed_files(site.manager())] == [
        "acme-dit 1.0: acme_dit/gone.py cannot be read (No such file or directory)"
    ]
    record_of(site.root, site.info)
    assert changed_files(site.manager()) == ()
    (site.root / "acme_dit" / "model.py").write_text("DiT = 3\n")
    (site.root / "acme_dit" / "evil.py").write_text("")
    assert [drift.message for drift in changed_files(site.manager())] == [
        "acme-dit 1.0: acme_dit/evil.py was not installed with it",
        "acme-dit 1.0: acme_dit/model.py was changed after it was installed",
    ]
    assert compare(current_lock(site.manager()), current_lock(site.manager())) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such lock file; write it with `mm plugin lock --output"),
        ("{", "is no lock file: it is not JSON"),
        ("[1]", "its format is None, and this version reads 1"),
        ('{"format": 2}', "its format is 2, and this version reads 1"),
        ('{"format": 1}', "KeyError"),
        ('{"format": 1, "fingerprint": "", "distributions": [7]}', "TypeError"),
        ('{"format": 1, "fingerprint": "", "distributions": [{"name": "x"}]}', "KeyError"),
    ],
)
def test_a_missing_or_garbled_lock(
    acme: Callable[..., Any], tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "a.lock"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LockError) as caught:
        require_lock(path, acme("one").manager())
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_lock_is_required(acme: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mmzoo.lock"
    site = acme("one")
    write_lock(path, current_lock(site.manager()))
    require_lock(path, site.manager())
    with pytest.raises(LockError) as caught:
        require_lock(path, acme("two", "2.0").manager())
    assert str(caught.value) == (
        f"--locked: the installed plugins are not those of {path}:\n"
        "  acme-dit is 2.0, the lock says 1.0; run: pip install 'acme-dit==1.0'\n"
        f"Put them back, or accept what is installed: mm plugin lock --output {path}"
    )


def test_a_lock_in_a_folder_that_is_not_there(acme: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(LockError, match=r"cannot be written \(No such file or directory\)"):
        write_lock(tmp_path / "absent" / "mmzoo.lock", current_lock(acme("one").manager()))
