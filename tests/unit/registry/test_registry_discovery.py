"""What is found on the path: provenance, oddities, and that no stranger's mistake is anyone else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_registry import DiscoveryReport, EntrySpec, PluginManager, Status
from mm_registry.discovery import read_installed

GROUP = "mm_core.predictor_models"


def only(report: DiscoveryReport) -> EntrySpec:
    (spec,) = report.entries
    return spec


def codes(report: DiscoveryReport) -> list[str]:
    return [diagnostic.code for diagnostic in report.diagnostics]


def test_entry_has_its_provenance(site: Any) -> None:
    site.add("mmzoo-core", "0.1.3")
    site.add(
        "Acme_Wan",
        "1.2",
        {GROUP: {"acme": "acme.models:Acme.inner"}},
        requires=["mmzoo-core<0.2,>=0.1", "numpy"],
    )
    assert only(site.manager().discover()) == EntrySpec(
        id="acme",
        group=GROUP,
        target="acme.models:Acme.inner",
        distribution="Acme_Wan",
        version="1.2",
        path=str(site.root),
        editable=False,
        origin="wheel",
        extras=(),
        required_api=("mmzoo-core>=0.1,<0.2",),
        status=Status.AVAILABLE,
        detail="",
    )


@pytest.mark.parametrize(
    ("direct_url", "origin", "editable"),
    [
        ({"url": "file:///src/my%20plugin", "dir_info": {"editable": True}}, "editable /src/my plugin", True),
        ({"url": "file:///src/plugin", "dir_info": {}}, "local /src/plugin", False),
        ({"url": "file:///tmp/a-1-py3.whl", "archive_info": {}}, "wheel /tmp/a-1-py3.whl", False),
        ({"url": "file:///tmp/a-1.0.tar.gz", "archive_info": {}}, "archive /tmp/a-1.0.tar.gz", False),
        (
            {
                "url": "https://me:secret@git.example/a.git",
                "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"},
            },
            "git+https://git.example/a.git@0123456789ab",
            False,
        ),
    ],
)
def test_origin(site: Any, direct_url: dict[str, Any], origin: str, editable: bool) -> None:
    site.add("acme", entries={GROUP: {"a": "acme:A"}}, direct_url=direct_url)
    spec = only(site.manager().discover())
    assert (spec.origin, spec.editable) == (origin, editable)
    assert spec.path == ("/src/my plugin" if editable else str(site.root))


def test_unreadable_direct_url_costs_only_the_origin(site: Any) -> None:
    info = site.add("acme", entries={GROUP: {"a": "acme:A"}})
    (info / "direct_url.json").write_text("{")
    report = site.manager().discover()
    assert (only(report).origin, only(report).status) == ("unknown", Status.AVAILABLE)
    assert codes(report) == ["unreadable-origin"]


def break_encoding_of_entry_points(info: Path) -> None:
    (info / "entry_points.txt").write_bytes(b"[mm_core.predictor_models]\nb\xe4d = bad:Bad\n")


def break_grammar_of_entry_points(info: Path) -> None:
    (info / "entry_points.txt").write_text("[mm_core.predictor_models]\nthis line is no entry\n")


def break_encoding_of_metadata(info: Path) -> None:
    (info / "METADATA").write_bytes(b"Name: bad\nVersion: 1.0\nSummary: \xe4\n")


def drop_metadata(info: Path) -> None:
    (info / "METADATA").unlink()


def drop_name(info: Path) -> None:
    (info / "METADATA").write_text("Metadata-Version: 2.4\nVersion: 1.0\n")


def drop_version(info: Path) -> None:
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: bad\n")


@pytest.mark.parametrize(
    "damage",
    [
        break_encoding_of_entry_points,
        break_grammar_of_entry_points,
        break_encoding_of_metadata,
        drop_metadata,
        drop_name,
        drop_version,
    ],
)
def test_damaged_distribution_is_one_diagnostic(site: Any, damage: Callable[[Path], None]) -> None:
    damage(site.add("bad", entries={GROUP: {"bad": "bad:Bad"}}))
    site.add("good", entries={GROUP: {"good": "good:Good"}})
    report = site.manager().discover()
    assert only(report).id == "good"
    (diagnostic,) = report.diagnostics
    assert (diagnostic.level, diagnostic.code, diagnostic.distribution) == (
        "error",
        "unreadable-metadata",
        "bad",
    )
    assert "bad-1.0.dist-info" in diagnostic.message


def test_damage_of_a_stranger_without_entries_of_ours_is_not_looked_at(site: Any) -> None:
    info = site.add("stranger", entries={"console_scripts": {"run": "stranger:main"}})
    (info / "METADATA").write_bytes(b"\xff\xfe")
    site.add("good", entries={GROUP: {"good": "good:Good"}})
    report = site.manager().discover()
    assert only(report).id == "good"
    assert report.diagnostics == ()


def test_same_distribution_twice_the_first_on_the_path_counts(make_site: Callable[..., Any]) -> None:
    first, second = make_site("first"), make_site("second")
    first.add("acme", "2.0", {GROUP: {"new": "acme:New"}})
    second.add("acme", "1.0", {GROUP: {"old": "acme:Old"}})
    report = PluginManager([str(first.root), str(second.root)], environ={}).discover()
    assert (only(report).id, only(report).version) == ("new", "2.0")
    (diagnostic,) = report.diagnostics
    assert diagnostic.code == "installed-twice"
    assert "acme 2.0" in diagnostic.message
    assert "version 1.0" in diagnostic.message

    report = PluginManager([str(second.root), str(first.root)], environ={}).discover()
    assert (only(report).id, only(report).version) == ("old", "1.0")


def test_first_copy_counts_even_if_only_the_second_has_entries(make_site: Callable[..., Any]) -> None:
    first, second = make_site("first"), make_site("second")
    first.add("acme", "2.0")
    second.add("acme", "1.0", {GROUP: {"old": "acme:Old"}})
    report = PluginManager([str(first.root), str(second.root)], environ={}).discover()
    assert report.entries == ()
    assert codes(report) == ["installed-twice"]


def test_same_version_twice_is_no_news(make_site: Callable[..., Any]) -> None:
    first, second = make_site("first"), make_site("second")
    for place in (first, second):
        place.add("acme", "1.0", {GROUP: {"a": "acme:A"}})
    report = PluginManager([str(first.root), str(second.root), str(first.root)], environ={}).discover()
    assert only(report).path == str(first.root)
    assert report.diagnostics == ()


def test_installed_metadata_counts_before_a_build_leftover(make_site: Callable[..., Any]) -> None:
    source, installed = make_site("source"), make_site("installed")
    source.add("acme", "0.9", {GROUP: {"stale": "acme:Stale"}}, suffix="egg-info")
    installed.add("acme", "1.0", {GROUP: {"a": "acme:A"}})
    report = PluginManager([str(source.root), str(installed.root)], environ={}).discover()
    assert only(report).id == "a"
    assert codes(report) == ["installed-twice"]


def test_a_readable_copy_stands_in_for_a_damaged_one(make_site: Callable[..., Any]) -> None:
    first, second = make_site("first"), make_site("second")
    drop_version(first.add("acme", "2.0", {GROUP: {"new": "acme:New"}}))
    second.add("acme", "1.0", {GROUP: {"old": "acme:Old"}})
    report = PluginManager([str(first.root), str(second.root)], environ={}).discover()
    assert only(report).id == "old"
    assert codes(report) == ["unreadable-metadata"]


def test_egg_info_beside_its_code_is_found(site: Any) -> None:
    site.add("acme", "1.0", {GROUP: {"a": "acme:A"}}, suffix="egg-info")
    assert only(site.manager().discover()).origin == f"source {site.root}"


def test_the_same_folder_spelt_twice_is_one(site: Any, tmp_path: Path) -> None:
    site.add("acme", entries={GROUP: {"a": "acme:A"}})
    (tmp_path / "link").symlink_to(site.root)
    report = PluginManager([str(tmp_path / "link"), str(site.root), f"{site.root}/"], environ={}).discover()
    assert only(report).id == "a"
    assert report.diagnostics == ()


def test_record_tells_the_metadata_folder(site: Any) -> None:
    info = site.add("Acme_Wan", "1.2", {GROUP: {"a": "acme:A"}, "console_scripts": {"run": "acme:main"}})
    site.add("stranger", "3")
    installed = read_installed([str(site.root)])
    record = installed.record("acme.wan")
    assert record is not None
    assert (record.name, record.version, record.info) == ("Acme_Wan", "1.2", str(info))
    assert record.entries == ((GROUP, "a", "acme:A"),)
    assert installed.records == (record,)
    assert installed.record("stranger") is None
    assert (installed.version("Stranger"), installed.version("absent")) == ("3", None)


@pytest.mark.parametrize(
    ("group", "id", "said"),
    [
        ("mm_core.predictors", "a", "did it mean 'mm_core.predictor_models'?"),
        (GROUP, "a/b", "is not an id"),
        ("mm_core.configs", "wandit", "is not of the form role/id"),
        ("mm_core.configs", "predictr/wandit", "is not of the form role/id"),
    ],
)
def test_misnamed_entry_is_reported_and_left_out(site: Any, group: str, id: str, said: str) -> None:
    site.add("acme", entries={group: {id: "acme:A"}, "mm_core.ae_models": {"fine": "acme:B"}})
    report = site.manager().discover()
    assert only(report).id == "fine"
    (diagnostic,) = report.diagnostics
    assert diagnostic.code == "misnamed-entry"
    assert said in diagnostic.message
    assert "acme 1.0" in diagnostic.message


@pytest.mark.parametrize("target", ["acme", "acme-models:A", "acme:", "acme.:A", "acme:A B"])
def test_malformed_target_is_present_and_broken(site: Any, target: str) -> None:
    site.add("acme", entries={GROUP: {"a": target}})
    report = site.manager().discover()
    assert only(report).status is Status.BROKEN
    assert codes(report) == ["malformed-target"]


def test_entry_declared_twice_by_one_distribution(site: Any) -> None:
    info = site.add("acme", entries={GROUP: {"a": "acme:A"}})
    text = (info / "entry_points.txt").read_text()
    (info / "entry_points.txt").write_text(text + "a = acme:A\n")
    assert only(site.manager().discover()).status is Status.AVAILABLE
    (info / "entry_points.txt").write_text(text + "a = acme:Other\n")
    report = site.manager().discover()
    assert only(report).status is Status.BROKEN
    assert codes(report) == ["declared-twice"]


def test_report_does_not_show_the_order_of_the_path(make_site: Callable[..., Any]) -> None:
    places = [make_site(name) for name in ("one", "two", "three")]
    for number, place in enumerate(places):
        place.add(
            f"acme-{number}",
            entries={GROUP: {"shared": "a:A", f"own{number}": "a:B"}, "mm_core.odd": {"x": "a:C"}},
        )
    forwards = PluginManager([str(place.root) for place in places], environ={})
    backwards = PluginManager([str(place.root) for place in reversed(places)], environ={})
    assert forwards.discover() == backwards.discover()
    assert forwards.fingerprint() == backwards.fingerprint()


def test_fingerprint_tells_versions_targets_and_selection_apart(make_site: Callable[..., Any]) -> None:
    prints = set()
    for number, (version, target) in enumerate([("1.0", "a:A"), ("1.1", "a:A"), ("1.0", "a:B")]):
        place = make_site(f"site{number}")
        place.add("acme", version, {GROUP: {"a": target}})
        prints.add(place.manager().fingerprint())
    prints.add(place.manager(MM_PLUGINS="other").fingerprint())
    assert len(prints) == 4


def test_fingerprint_does_not_depend_on_the_folder(make_site: Callable[..., Any]) -> None:
    places = [make_site(name) for name in ("one", "two")]
    for place in places:
        place.add("acme", entries={GROUP: {"a": "a:A"}})
    assert places[0].manager().fingerprint() == places[1].manager().fingerprint()
