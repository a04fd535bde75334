"""Odd metadata: what each oddity means, and the one diagnostic that tells how to mend it."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest

from mm_registry import Diagnostic
from mm_registry.discovery import Installed, read_installed
from mm_registry.metadata_files import LIMIT

GROUP = "mm_core.predictor_models"
ENTRY = {GROUP: {"a": "acme:A"}}
TEXT = f"[{GROUP}]\na = acme:A\n"


def read(*roots: Path) -> Installed:
    return read_installed([str(root) for root in roots])


def only(installed: Installed) -> Diagnostic:
    (diagnostic,) = installed.diagnostics
    return diagnostic


class TestEntryPointsFile:
    """Nothing that lies where entry_points.txt should be stops the others."""

    def test_folder(self, site: Any) -> None:
        (site.add("bad") / "entry_points.txt").mkdir()
        self.check(site, "IsADirectoryError")

    def test_loop_of_links(self, site: Any) -> None:
        (site.add("bad") / "entry_points.txt").symlink_to("entry_points.txt")
        self.check(site, "Too many levels of symbolic links")

    def test_larger_than_any_real_one(self, site: Any) -> None:
        with open(site.add("bad") / "entry_points.txt", "wb") as file:
            file.truncate(1 << 33)
        self.check(site, "entry_points.txt is larger than 1 MiB")

    def test_larger_than_any_real_one_and_ours(self, site: Any) -> None:
        (site.add("bad") / "entry_points.txt").write_text(TEXT + "#" * LIMIT)
        self.check(site, "entry_points.txt is larger than 1 MiB")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
    def test_other_encoding(self, site: Any, encoding: str) -> None:
        mark = "\ufeff" if encoding.endswith("be") else ""
        (site.add("bad") / "entry_points.txt").write_bytes((mark + TEXT).encode(encoding))
        self.check(site, "entry_points.txt is UTF-16, not UTF-8")

    def test_line_is_named(self, site: Any) -> None:
        (site.add("bad") / "entry_points.txt").write_text(f"{TEXT}# a comment\nno entry\n")
        self.check(site, "entry_points.txt:4 ('no entry') is not of the form name = package.module:object")

    def test_line_that_is_not_utf8_is_named(self, site: Any) -> None:
        (site.add("bad") / "entry_points.txt").write_bytes(TEXT.encode() + b"b\xe4d = bad:Bad\n")
        self.check(site, "entry_points.txt:3 is not UTF-8")

    def check(self, site: Any, said: str) -> None:
        site.add("good", entries={GROUP: {"good": "good:Good"}})
        installed = read(site.root)
        assert [record.name for record in installed.records] == ["good"]
        diagnostic = only(installed)
        assert (diagnostic.level, diagnostic.code) == ("error", "unreadable-metadata")
        assert diagnostic.distribution == "bad"
        assert diagnostic.path == str(site.root / "bad-1.0.dist-info")
        assert said in diagnostic.message
        assert diagnostic.message.endswith("reinstall or remove it")
        assert installed.version("bad") == "1.0"

    def test_named_pipe_does_not_block(self, site: Any) -> None:
        os.mkfifo(site.add("bad") / "entry_points.txt")
        assert read(site.root).records == ()

    def test_byte_order_mark(self, site: Any) -> None:
        info = site.add("acme")
        (info / "entry_points.txt").write_text(TEXT, encoding="utf-8-sig")
        installed = read(site.root)
        assert installed.records[0].entries == ((GROUP, "a", "acme:A"),)
        assert only(installed).code == "byte-order-mark"
        assert "save it without one" in only(installed).message

    def test_spaces_inside_the_brackets_do_not_go_unnoticed(self, site: Any) -> None:
        (site.add("acme") / "entry_points.txt").write_text(TEXT.replace(GROUP, f" {GROUP} "))
        (diagnostic,) = site.manager().discover().diagnostics
        assert diagnostic.code == "misnamed-entry"
        assert GROUP in diagnostic.message


class TestMetadataFile:
    def test_description_of_any_size_and_encoding(self, site: Any) -> None:
        info = site.add("acme", entries=ENTRY)
        with open(info / "METADATA", "ab") as file:
            file.write(b"caf\xe9 " * LIMIT)
        installed = read(site.root)
        assert installed.records[0].version == "1.0"
        assert installed.diagnostics == ()

    def test_header_without_end(self, site: Any) -> None:
        (site.add("bad", entries=ENTRY) / "METADATA").write_text("Name: bad\n" + "X: y\n" * LIMIT)
        assert "the header of METADATA is larger than 1 MiB" in only(read(site.root)).message

    def test_single_file_of_distutils(self, site: Any) -> None:
        (site.root / "old-2.1-py3.11.egg-info").write_text("Metadata-Version: 1.0\nName: old\nVersion: 2.1\n")
        installed = read(site.root)
        assert installed.version("old") == "2.1"
        assert installed.diagnostics == ()

    def test_name_that_the_folder_cannot_tell(self, site: Any) -> None:
        info = site.add("my-3d-plugin", entries=ENTRY)
        info.rename(site.root / "my-3d-plugin-1.0.dist-info")
        installed = read(site.root)
        record = installed.record("my_3d_plugin")
        assert record is not None
        assert installed.version("my-3d-plugin") == "1.0"

    def test_dashes_in_the_name_of_a_strangers_folder(self, site: Any) -> None:
        site.add("my-stranger", "1.4").rename(site.root / "my-stranger-1.4.dist-info")
        assert read(site.root).version("my_stranger") == "1.4"

    def test_requirements_of_an_egg(self, site: Any) -> None:
        info = site.add("acme", entries=ENTRY, suffix="egg-info")
        (info / "requires.txt").write_text("mmzoo-core<0.2\n\n[fast]\nturbo>=1\n")
        assert read(site.root).records[0].requires == ("mmzoo-core<0.2", 'turbo>=1; extra == "fast"')


class TestSeveralCopies:
    def test_names_that_differ_in_case_and_dashes_are_one(self, make_site: Callable[..., Any]) -> None:
        first, second = make_site("first"), make_site("second")
        first.add("Acme.Wan", "2.0", ENTRY)
        second.add("acme-wan", "1.0", ENTRY)
        installed = read(first.root, second.root)
        assert [record.version for record in installed.records] == ["2.0"]
        assert only(installed).code == "installed-twice"

    def test_in_one_folder_the_newest_counts(self, site: Any) -> None:
        for version in ("1.9", "1.10", "1.11"):
            site.add("acme", version, ENTRY)
        installed = read(site.root)
        assert [record.version for record in installed.records] == ["1.11"]
        assert installed.version("acme") == "1.11"
        assert [diagnostic.code for diagnostic in installed.diagnostics] == ["installed-twice"] * 2
        assert "version 1.9 is on the path too" in installed.diagnostics[1].message

    @pytest.mark.parametrize("stale_first", [True, False])
    def test_stale_egg_info_never_counts(self, make_site: Callable[..., Any], stale_first: bool) -> None:
        source, installed = make_site("source"), make_site("installed")
        source.add("acme", "0.9", {GROUP: {"stale": "acme:Stale"}}, suffix="egg-info")
        installed.add("acme", "1.0", ENTRY)
        roots = [source.root, installed.root] if stale_first else [installed.root, source.root]
        found = read(*roots)
        assert [(record.version, record.origin) for record in found.records] == [("1.0", "wheel")]
        assert only(found).code == "installed-twice"

    def test_link_to_the_same_metadata_folder_is_no_copy(self, make_site: Callable[..., Any]) -> None:
        first, second = make_site("first"), make_site("second")
        info = first.add("acme", "1.0", ENTRY)
        (second.root / info.name).symlink_to(info)
        assert read(second.root, first.root).records[0].path == str(second.root)
        assert read(second.root, first.root).diagnostics == ()


class TestEditable:
    def test_source_that_is_gone(self, site: Any, tmp_path: Path) -> None:
        url = {"url": f"file://{tmp_path}/moved", "dir_info": {"editable": True}}
        site.add("acme", entries=ENTRY, direct_url=url)
        installed = read(site.root)
        assert only(installed).code == "missing-source"
        assert f"{tmp_path}/moved, which does not exist" in only(installed).message
        (tmp_path / "moved").mkdir()
        assert read(site.root).diagnostics == ()

    def test_egg_info_in_its_own_source_is_no_news(self, make_site: Callable[..., Any]) -> None:
        site, source = make_site("site"), make_site("source")
        source.add("acme", "0.9", {GROUP: {"stale": "acme:Stale"}}, suffix="egg-info")
        url = {"url": f"file://{source.root}", "dir_info": {"editable": True}}
        site.add("acme", "1.0", ENTRY, direct_url=url)
        installed = read(source.root, site.root)
        assert [record.version for record in installed.records] == ["1.0"]
        assert installed.diagnostics == ()

    def test_setup_py_develop(self, make_site: Callable[..., Any]) -> None:
        site, source = make_site("site"), make_site("source")
        source.add("acme-wan", entries=ENTRY, suffix="egg-info")
        (site.root / "acme-wan.egg-link").write_text(f"{source.root}\n.")
        (record,) = read(site.root, source.root).records
        assert (record.editable, record.origin, record.path) == (
            True,
            f"editable {source.root}",
            str(source.root),
        )


class TestLeftovers:
    def test_of_a_plugin(self, site: Any) -> None:
        site.add("acme", entries=ENTRY).rename(site.root / "~cme-1.0.dist-info")
        installed = read(site.root)
        assert installed.records == ()
        assert (only(installed).level, only(installed).code) == ("warning", "pip-leftover")
        assert "install the plugin again" in only(installed).message

    def test_of_a_stranger(self, site: Any) -> None:
        site.add("stranger").rename(site.root / "~tranger-1.0.dist-info")
        assert read(site.root).diagnostics == ()


class TestArchives:
    def archive(self, path: Path, inside: str = "", info: str = "acme-1.0.dist-info") -> Path:
        name = "PKG-INFO" if "EGG" in info else "METADATA"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{inside}{info}/{name}", "Metadata-Version: 2.4\nName: acme\nVersion: 1.0\n")
            file.writestr(f"{inside}{info}/entry_points.txt", TEXT)
            file.writestr(f"{inside}stranger-3.dist-info/METADATA", "Name: stranger\nVersion: 3\n")
        return path

    def test_archive(self, tmp_path: Path) -> None:
        archive = self.archive(tmp_path / "plugins.zip")
        installed = read(tmp_path / "absent", archive, archive)
        (record,) = installed.records
        assert (record.name, record.path, record.origin) == ("acme", str(archive), "wheel")
        assert record.info == f"{archive}/acme-1.0.dist-info"
        assert installed.version("stranger") == "3"
        assert installed.diagnostics == ()

    def test_folder_in_an_archive(self, tmp_path: Path) -> None:
        archive = self.archive(tmp_path / "app.pyz", "lib/")
        assert read(archive).records == ()
        assert [record.name for record in read(archive / "lib").records] == ["acme"]

    def test_egg(self, tmp_path: Path) -> None:
        archive = self.archive(tmp_path / "acme-1.0-py3.11.egg", info="EGG-INFO")
        assert [record.name for record in read(archive).records] == ["acme"]

    def test_unpacked_egg(self, tmp_path: Path) -> None:
        info = tmp_path / "acme-1.0-py3.11.egg" / "EGG-INFO"
        info.mkdir(parents=True)
        (info / "PKG-INFO").write_text("Name: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(TEXT)
        (record,) = read(info.parent).records
        assert (record.name, record.path) == ("acme", str(info.parent))

    def test_file_that_is_no_archive(self, tmp_path: Path, site: Any) -> None:
        site.add("good", entries=ENTRY)
        (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
        installed = read(tmp_path / "broken.zip", site.root)
        assert [record.name for record in installed.records] == ["good"]
        assert (only(installed).level, only(installed).code) == ("warning", "unreadable-path")


class TestPath:
    @pytest.mark.parametrize("entry", ["a\0b", "x" * 5000])
    def test_entry_that_is_no_path(self, site: Any, entry: str) -> None:
        site.add("good", entries=ENTRY)
        installed = read_installed([entry, str(site.root)])
        assert [record.name for record in installed.records] == ["good"]
        assert only(installed).code == "unreadable-path"

    def test_working_directory_is_gone(
        self, site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.add("good", entries=ENTRY)
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        installed = read_installed(["", str(site.root)])
        assert [record.name for record in installed.records] == ["good"]
        assert installed.diagnostics == ()


class InMemory(importlib_metadata.Distribution):
    """What a frozen application's finder gives: no file anywhere."""

    def __init__(self, name: str, entry_points: str | None) -> None:
        self._texts = {
            "METADATA": f"Name: {name}\nVersion: 4.2\nRequires-Dist: mmzoo-core>=0.1\n",
            "entry_points.txt": entry_points,
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


class Finder:
    def __init__(self, *distributions: InMemory, fails: bool = False) -> None:
        self.distributions = distributions
        self.fails = fails
        self.asked: list[Sequence[str]] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib_metadata.DistributionFinder.Context
    ) -> Iterator[InMemory]:
        self.asked.append(context.path)
        yield from self.distributions
        if self.fails:
            raise RuntimeError("no archive")


class TestFinders:
    def test_finder_of_its_own(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        finder = Finder(InMemory("acme", TEXT), InMemory("stranger", None))
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
        installed = read(site.root)
        assert finder.asked == [[str(site.root)]]
        (record,) = installed.records
        assert (record.name, record.version, record.requires) == ("acme", "4.2", ("mmzoo-core>=0.1",))
        assert (record.entries, record.info) == (((GROUP, "a", "acme:A"),), "")
        assert installed.version("stranger") == "4.2"
        assert installed.diagnostics == ()

    @pytest.mark.parametrize(("first", "version"), [(True, "4.2"), (False, "1.0")])
    def test_order_is_that_of_imports(
        self, site: Any, monkeypatch: pytest.MonkeyPatch, first: bool, version: str
    ) -> None:
        site.add("acme", "1.0", ENTRY)
        finder = Finder(InMemory("acme", TEXT))
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path] if first else [*sys.meta_path, finder])
        installed = read(site.root)
        assert [record.version for record in installed.records] == [version]
        assert only(installed).code == "installed-twice"

    def test_finder_that_raises(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        site.add("good", entries=ENTRY)
        monkeypatch.setattr(sys, "meta_path", [Finder(InMemory("acme", TEXT), fails=True), *sys.meta_path])
        installed = read(site.root)
        assert [record.name for record in installed.records] == ["acme", "good"]
        assert (only(installed).level, only(installed).code) == ("error", "broken-finder")
        assert "the finder Finder on sys.meta_path" in only(installed).message
        assert "RuntimeError: no archive" in only(installed).message
