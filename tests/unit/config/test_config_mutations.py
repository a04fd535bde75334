"""Random mistakes in correct files: they never crash, never pass silently, and are found where they were
made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_core.config import check_file, read_document
from mm_core.config.origin import KeyPath

pytestmark = pytest.mark.timeout(280)
_SETTINGS = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = ("model.json", "data.json", "tools.json", "inference.json")
#: Subtrees that a component or a foreign tool may fill as it likes.
FREE = ("sorafeature",)


def leaves(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    return [path]


def members(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    found: list[KeyPath] = []
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in items:
        if isinstance(key, str):
            found.append((*path, key))
        found += members(item, (*path, key))
    return found


def errors(path: Path) -> list[tuple[int | None, int | None, str]]:
    return [(f.line, f.column, str(f)) for f in check_file(str(path)) if f.level == "error"]


def get(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


@_SETTINGS
@given(data=st.data())
def test_a_dropped_comma_is_found_where_it_belongs(files: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    text = (files.folder / name).read_text()
    commas = [match.start() for match in re.finditer(r",(?=\n)", text)]
    at = data.draw(st.sampled_from(commas))
    path = files.folder / "spoilt.json"
    path.write_text(text[:at] + text[at + 1 :])
    before = text[:at]
    (found,) = errors(path)
    assert found[:2] == (before.count("\n") + 1, at - before.rfind("\n"))
    assert "missing ','" in found[2]


@_SETTINGS
@given(data=st.data())
def test_a_misspelt_key_is_found_at_the_key(files: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = json.loads((files.folder / name).read_text())
    path = data.draw(st.sampled_from([m for m in members(content) if m[0] not in FREE or len(m) == 1]))
    key = str(path[-1])
    where = data.draw(st.integers(0, len(key) - 1))
    typo = data.draw(
        st.sampled_from([key[:where] + key[where + 1 :], key[:where] + "q" + key[where:], key + key[-1]])
    )
    parent = get(content, path[:-1])
    if not typo or typo in parent:
        return
    renamed = {typo if k == key else k: v for k, v in parent.items()}
    parent.clear()
    parent.update(renamed)
    spoilt = files.folder / "spoilt.json"
    spoilt.write_text(json.dumps(content, indent=4))
    origin = read_document(spoilt).key_origin((*path[:-1], typo))
    found = errors(spoilt)
    assert found, f"{path} -> {typo} passed silently"
    named = [text for line, column, text in found if (line, column) == (origin.line, origin.column)]
    assert named or key in ("model_id", "dataset_type", "pipeline_class", "trans_type"), (path, typo, found)


@_SETTINGS
@given(data=st.data())
def test_a_swapped_type_is_found_at_the_value(files: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = json.loads((files.folder / name).read_text())
    path = data.draw(st.sampled_from([leaf for leaf in leaves(content) if leaf[0] not in FREE]))
    value = get(content, path)
    wrong: list[Any] = [{"x": 1}]
    if isinstance(value, bool):
        wrong += ["true", 1, [True]]
    elif isinstance(value, int | float):
        wrong += [str(value), [[]], True]
    elif isinstance(value, str):
        wrong += [7, True]
    swapped = data.draw(st.sampled_from(wrong))
    get(content, path[:-1])[path[-1]] = swapped
    spoilt = files.folder / "spoilt.json"
    spoilt.write_text(json.dumps(content, indent=4))
    origin = read_document(spoilt).origin(path)
    found = errors(spoilt)
    assert origin.line is not None
    lines = range(origin.line, origin.line + 4)  # the value itself, or what was put inside
    assert any(line in lines for line, _, _ in found), (path, swapped, found)


@_SETTINGS
@given(st.binary(max_size=60), st.sampled_from([".json", ".yaml"]))
def test_no_content_crashes_the_check(files: Any, content: bytes, suffix: str) -> None:
    path = files.folder / f"any{suffix}"
    path.write_bytes(content)
    assert errors(path), "no such bytes are a configuration"


@pytest.mark.parametrize("name", FILES)
def test_huge_texts_and_numbers_are_errors_not_crashes(files: Any, name: str) -> None:
    text = (files.folder / name).read_text()
    path = files.folder / "spoilt.json"
    path.write_text(text.replace("{", '{"' + "k" * 1_000_000 + '": 1,', 1))
    assert any("unknown key" in message and len(message) < 2000 for *_, message in errors(path))
    path.write_text(text.replace("{", '{"n": ' + "9" * 10_000 + ",", 1))
    assert errors(path)
