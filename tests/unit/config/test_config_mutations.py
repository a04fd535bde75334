"""2,000 mistakes in correct files: none crashes the check, none passes silently, each is found where it was made.

The files are those of MindSpeed-MM's examples (tests/corpus) and our own; the mistakes are drawn at random, the same
ones in each run. A case says where the file was spoilt; the check must have something to say about that line or that
path. What is right in spite of the change (null where a key may be left out, any text for a prompt) is told in
`ALLOWED`, with the reason.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistakes import MISTAKES, Case, Mutation, Original

from mm_core.config import ConfigError, Finding, check_file, read_document
from mm_core.config.origin import dotted

pytestmark = pytest.mark.timeout(280)
ROOT = Path(__file__).resolve().parents[3]
#: Folder of the repository -> where its files lie in the working directory of the tests.
SOURCES = {
    "tests/corpus/wan2.2": "examples/wan2.2",
    "tests/corpus/qwen3vl": "examples/qwen3vl",
    "tests/corpus/qwen3vl_yaml": "examples/qwen3vl_yaml",
    "examples/tiny/wan22-t2v": "tiny",
}
SKIPPED = ("tokenizer", "bunny.json", "tower.json")
CASES_OF_A_TEST = 20


# -- what is no mistake -----------------------------------------------------------------------------------------

#: Kind of mistake -> keys for which it is none.
ALLOWED: dict[str, set[str]] = {
    # Numbers, words and a name for the whole; what the schema is for editors.
    "another_type": {"sharding_size", "$schema"},
    # Prompts, names of columns and of what others define, and paths of files that are still to be written.
    "long_text": {
        "$schema", "assistant_tag", "autotokenizer_name", "content_tag", "dataset", "function_tag", "images",
        "messages", "model_name", "observation_tag", "prompt", "role_tag", "save_path", "system_tag", "tool_format",
        "user_tag", "videos",
    },
    "unknown_word": {
        "$schema", "assistant_tag", "autotokenizer_name", "cache_dir", "content_tag", "dataset", "dataset_dir",
        "function_tag", "images", "messages", "model_name", "model_name_or_path", "observation_tag", "prompt", "role_tag", "save",
        "save_path",
        "system_tag", "tool_format", "user_tag", "videos",
    },
    # Any number has a meaning here, or the library that takes it does not say which have none.
    "out_of_range": {"beta_end", "beta_start", "dynamic_thresholding_ratio", "mean", "std", "steps_offset"},
}  # fmt: skip


def is_allowed(kind: str, case: Case, original: Original, path: Path) -> bool:
    """Whether the spoilt file says the same as before, or something else that is right."""
    if case.key in ALLOWED.get(kind, ()):
        return True
    try:
        document = read_document(path.name)
    except ConfigError:
        return False
    if document.data == original.document.data:
        return True
    place = next((path for path in document.keys if dotted(path) == case.path), None)
    if place is None:
        return False
    parent, value = document.value(place[:-1]), document.value(place)
    if "gpt_args" in place and value == str(original.document.value(place)):
        return True  # flags are text: "4" is 4
    if value is not None:
        return False
    # null is the same as nothing, and right where a key may be left out.
    if path.suffix == ".json":
        del parent[place[-1]]
        path.write_text(json.dumps(document.data), encoding="utf-8")
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
        path.write_text("\n".join(lines[: case.first - 1] + lines[case.first :]), encoding="utf-8")
    return not any(finding.level == "error" for finding in check_file(path.name))


# -- the check --------------------------------------------------------------------------------------------------


@cache
def originals(folder: Path) -> tuple[Original, ...]:
    """The files without an error, in a working directory in which they find each other."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix not in (".json", ".yaml") or any(word in name for word in SKIPPED):
            continue
        findings = check_file(name)
        if not any(finding.level == "error" for finding in findings):
            text = path.read_text(encoding="utf-8")
            found.append(Original(name, text, read_document(name), findings))
    assert len(found) > 20
    return tuple(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mutations")
    for source, place in SOURCES.items():
        shutil.copytree(ROOT / source, folder / place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in list(os.environ):
            if name.startswith("MM_") or name in ("RANK", "WORLD_SIZE"):
                patch.delenv(name)
        yield folder


def problem(kind: str, case: Case, original: Original, folder: Path) -> str | None:
    """Return what is wrong with the check of a case, None if nothing is."""
    path = folder / original.name.replace("/", "-")
    raw = case.content if isinstance(case.content, bytes) else case.content.encode()
    path.write_bytes(raw)
    findings = check_file(path.name)
    told = [str(finding) for finding in findings]
    if any(len(text) > 2500 or "\n" in text or not text.isprintable() for text in told):
        return "a finding floods the terminal or spoils it"
    if len(told) > 100:
        return f"{len(told)} findings"
    before = {
        finding.message for finding in original.findings if finding.code not in ("no-effect", "not-available")
    }
    here = [finding for finding in findings if is_at(case, finding) and finding.message not in before]
    if here or is_allowed(kind, case, original, path):
        return None
    errors = [str(finding) for finding in findings if finding.level == "error"]
    return (
        f"not told at lines {case.first} to {case.last} ({case.path[:80]}): {errors or 'it passed silently'}"
    )


def is_at(case: Case, finding: Finding) -> bool:
    """Whether a finding is where the mistake is: in its lines, at its path, or an error of the section that lacks what
    was spoilt.
    """
    section = _around(case.path)
    lacks = finding.code in ("missing-key", "no-weights") and section in (finding.path, _around(finding.path))
    if case.first <= (finding.line or 0) <= case.last:
        return True
    return bool(case.path) and (finding.path == case.path or lacks)


def _around(path: str) -> str:
    return ".".join(path.split(".")[:-1])


def cases(kind: str, mutation: Mutation, chunk: int, folder: Path) -> Iterator[tuple[Case, Original]]:
    rng = random.Random(f"{kind} {chunk}")
    files = originals(folder)
    left = CASES_OF_A_TEST
    while left:
        original = rng.choice(files)
        case = mutation(original, rng)
        if case is not None and case.content != original.text:
            left -= 1
            yield case, original


CHUNKS = [
    pytest.param(mutation.__name__, mutation, chunk, id=f"{mutation.__name__}-{chunk}")
    for mutation, count in MISTAKES.items()
    for chunk in range(count // CASES_OF_A_TEST)
]


def test_there_are_two_thousand_cases() -> None:
    assert len(CHUNKS) * CASES_OF_A_TEST >= 2000


@pytest.mark.parametrize(("kind", "mutation", "chunk"), CHUNKS)
def test_a_mistake_is_found_where_it_was_made(
    kind: str, mutation: Mutation, chunk: int, folder: Path
) -> None:
    problems = []
    for case, original in cases(kind, mutation, chunk, folder):
        text = problem(kind, case, original, folder)
        if text is not None:
            problems.append(f"{original.name}: {text}")
    assert not problems, "\n".join(problems)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=60), st.sampled_from([".json", ".yaml"]))
def test_no_content_crashes_the_check(folder: Path, content: bytes, suffix: str) -> None:
    (folder / f"any{suffix}").write_bytes(content)
    found = check_file(f"any{suffix}")
    assert any(finding.level == "error" for finding in found), "no such bytes are a configuration"
