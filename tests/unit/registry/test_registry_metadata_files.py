"""Our reading of metadata files against importlib_metadata's, of requirements against packaging's, of URLs
against urllib's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import importlib_metadata
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement

from mm_registry.metadata_files import MetadataError, MetadataFolder, decode, parse_entry_points
from mm_registry.origin import place_of
from mm_registry.requirements import api_conflict, required_api

SPACE = st.sampled_from(["", "", "", " ", "\t", "  "])
LINE_END = st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", "\n\n", " \n", "\f", "\x1c", "\u2028"])
WORD = st.text("ab[]#=:'\"/\\.-_ ;é☃\x0b\x85\xa0", max_size=6)
ENTRY_LINE = st.one_of(
    st.builds("{}[mm_core.{}]{}".format, SPACE, WORD, SPACE),
    st.builds("{}{}{}={}{}".format, SPACE, WORD, SPACE, SPACE, WORD),
    st.builds("{} = {}.models:{} [{}]".format, WORD, WORD, WORD, WORD),
    st.builds("{}#{}".format, SPACE, WORD),
    WORD,
)
ENTRY_POINTS = st.lists(st.tuples(ENTRY_LINE, LINE_END), max_size=8).map(
    lambda lines: "".join(map("".join, lines))
)

FIELD = st.sampled_from(
    [
        "Name",
        "name",
        "VERSION",
        "Version",
        "Requires-Dist",
        "Summary",
        "License",
        "Classifier",
        "X_Y",
        "",
        "a b",
    ]
)
HEADER_LINE = st.one_of(
    st.builds("{}:{}{}".format, FIELD, SPACE, WORD),
    st.builds(
        "{}: {}".format, FIELD, st.sampled_from(["acme", "1.0", "mmzoo-core>=0.1,<0.2", "x; extra == 'y'"])
    ),
    st.builds("{}{}".format, st.sampled_from([" ", "\t", "        |", ""]), WORD),
    st.sampled_from(["", "From me", ">From: x"]),
)
HEADER = st.lists(st.tuples(HEADER_LINE, LINE_END), max_size=10).map(
    lambda lines: "".join(map("".join, lines))
)
REQUIRES_TXT = st.sampled_from([None, "", "numpy\n", "a>=1\n\n[x]\nb\n\n[:python_version < '4']\nc\n"])


@pytest.fixture(scope="module")
def info() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acme-1.0.dist-info"
        path.mkdir()
        yield path


@given(text=ENTRY_POINTS)
@example(
    text="above = ignored\n[g]\n'a/b:c' = m:o [x, y] # not a comment\n[]\n[h]]\n  indented : odd = m\nlast="
)
@example(text="[g]\nno entry\n")
@example(text="no entry and no section\n")
def test_entry_points_are_those_of_importlib_metadata(info: Path, text: str) -> None:
    data = text.encode()
    (info / "entry_points.txt").write_bytes(data)
    try:
        entries = importlib_metadata.Distribution.at(info).entry_points
    except (TypeError, ValueError):
        with pytest.raises(MetadataError):
            parse_entry_points(decode("entry_points.txt", data))
        return
    expected = [(entry.group, entry.name, entry.value) for entry in entries]
    assert parse_entry_points(decode("entry_points.txt", data)) == expected


@given(text=HEADER, requires=REQUIRES_TXT)
@example(text="Name: acme\nVersion: 1\nLicense: one\n  two\nRequires-Dist: x\n\nName: body\n", requires=None)
@example(text="Name: acme\nVersion: 1\nRequires-Dist: x;\n  extra == 'y'\n", requires=None)
@example(text="Name: acme\nno header\nVersion: 1\n", requires=None)
@example(text="\nName: acme\n", requires=None)
@example(text="Name: acme\n \nVersion: 1\n\t\nRequires-Dist: x", requires="numpy\n")
def test_fields_are_those_of_importlib_metadata(info: Path, text: str, requires: str | None) -> None:
    (info / "METADATA").write_bytes(text.encode())
    file = info / "requires.txt"
    file.unlink(missing_ok=True)
    if requires is not None:
        file.write_text(requires)
    reference = importlib_metadata.Distribution.at(info)
    folder = MetadataFolder(str(info), str(info.parent))
    if not text:
        with pytest.raises(MetadataError, match="no METADATA"):
            folder.fields()
        return
    metadata: Any = reference.metadata
    fields = folder.fields()
    assert fields.name == (metadata.get("Name") or "")
    assert fields.version == (metadata.get("Version") or "")
    assert fields.requires == tuple(reference.requires or ())


VERSION = st.sampled_from(
    [
        "0",
        "0.1",
        "0.1.0",
        "0.2",
        "0.10",
        "1",
        "1.0.0",
        "01",
        "0.1rc1",
        "0.2.dev0",
        "0.1.post1",
        "0.1+local",
        "1!0",
        "1.*",
        "no version",
    ]
)
BOUND = st.builds(
    "{}{}{}".format, st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "~=", "===", "="]), SPACE, VERSION
)
REQUIREMENT = st.builds(
    "{}{}{}{}{}{}{}".format,
    SPACE,
    st.sampled_from(["mmzoo-core", "MMZoo_Core", "mmzoo.registry", "mmzoo-core[x]"]),
    SPACE,
    st.sampled_from(["", "", "("]),
    st.lists(BOUND, max_size=3).flatmap(
        lambda bounds: st.sampled_from([",".join(bounds), " , ".join(bounds)])
    ),
    st.sampled_from(["", "", "", ")", ","]),
    st.sampled_from(["", "", "", "; extra == 'x'", "; python_version > '3'"]),
)


@given(line=REQUIREMENT, installed=VERSION)
@example(line="mmzoo-core>=0.1,<0.2", installed="0.1.5")
@example(line="mmzoo-core>=0.1,<0.2", installed="0.2.0")
@example(line="mmzoo-core<0.2", installed="0.2.dev0")
@example(line="mmzoo-core==0.1", installed="0.1.0")
@example(line="mmzoo-core>=1,>=1.0", installed="1")
def test_ranges_mean_what_packaging_says(line: str, installed: str) -> None:
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        assert required_api([line]) == ((), [line])
        return
    ranges, unreadable = required_api([line])
    assert not unreadable
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        assert ranges == ()
        return
    bounds = sorted(map(str, requirement.specifier), key=lambda bound: (bound.startswith("<"), bound))
    name = requirement.name.lower().replace("_", "-").replace(".", "-")
    assert ranges == (f"{name}{','.join(bounds)}",)
    fits = requirement.specifier.contains(installed, prereleases=True)
    asked: list[str] = []

    def version_of(distribution: str) -> str:
        asked.append(distribution)
        return installed

    conflict = api_conflict(ranges, version_of)
    assert (conflict is None) == fits
    assert asked == [name]
    if conflict is not None:
        assert conflict.startswith(f"it needs {name} {','.join(bounds)} and {installed} is installed;")


@given(path=st.text("ab/ %2.é?#;+@=~\t", max_size=12))
@example(path="src/my%20plugin")
def test_file_urls_mean_what_urllib_says(path: str) -> None:
    url = f"file:///{path}"
    assert place_of(url) == url2pathname(urlsplit(url).path)


def test_password_is_not_told() -> None:
    assert place_of("https://me:secret@git.example/a.git") == "https://git.example/a.git"
    assert os.sep == "/" or place_of("file:///C:/x") == "C:\\x"
