"""The configuration files of MindSpeed-MM's examples (tests/corpus), as users bring them: each loads and is checked
unchanged, its mistakes are found, and nothing is said that is not so.

The files lie where they lie in a checkout of MindSpeed-MM (`examples/wan2.2`, …), because their paths are meant from
there. `corpus_findings.txt` is what `mm check FILE` prints for each; read its diff when you change it:

    MM_UPDATE_GOLDEN=1 python -m pytest tests/unit/config/test_corpus.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_core.cli.check import findings_text
from mm_core.config import Finding, check_file, read_document
from mm_core.config.together import check_files_together

CORPUS = Path(__file__).resolve().parents[2] / "corpus"
GOLDEN = Path(__file__).with_name("corpus_findings.txt")
#: Folder of the corpus -> where its files are in a checkout of MindSpeed-MM.
PLACES = {"wan2.2": "examples/wan2.2", "qwen3vl": "examples/qwen3vl", "qwen3vl_yaml": "examples/qwen3vl"}
TOOLS = "mindspeed_mm/tools/tools.json"
WAN = "examples/wan2.2"


def _names() -> list[str]:
    """The configuration files, by their place in a checkout."""
    found = [TOOLS]
    for folder, place in PLACES.items():
        files = (path for path in (CORPUS / folder).rglob("*") if path.suffix in (".json", ".yaml"))
        found += [f"{place}/{path.relative_to(CORPUS / folder)}" for path in files]
    return sorted(found)


NAMES = _names()
#: Files that are checked together because they are of one job: training of both experts, and inference.
JOBS = {
    folder: [name for name in NAMES if name.startswith(f"{folder}/") and name.endswith(".json")]
    for folder in (f"{WAN}/A14B/t2v", f"{WAN}/A14B/i2v", f"{WAN}/5B/t2v", f"{WAN}/5B/ti2v")
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the files in their places, and no variable that changes what is found."""
    folder = tmp_path_factory.mktemp("checkout")
    for source, place in PLACES.items():
        shutil.copytree(CORPUS / source, folder / place, dirs_exist_ok=True)
    (folder / TOOLS).parent.mkdir(parents=True)
    shutil.copyfile(CORPUS / "tools.json", folder / TOOLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in list(os.environ):
            if name.startswith("MM_") or name in ("RANK", "WORLD_SIZE"):
                patch.delenv(name)
        yield folder


@pytest.fixture(scope="module")
def found(checkout: Path) -> dict[str, tuple[Finding, ...]]:
    return {name: check_file(name) for name in NAMES}


def at(findings: tuple[Finding, ...], place: str) -> list[Finding]:
    return [finding for finding in findings if f"{finding.line}:{finding.column}" == place]


def place_of(name: str, snippet: str) -> str:
    """`line:column` of the `^` in a piece of text that stands in a file once."""
    text, wanted = Path(name).read_text(encoding="utf-8"), snippet.replace("^", "")
    assert text.count(wanted) == 1, (name, snippet)
    before = text[: text.index(wanted) + snippet.index("^")]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def test_the_corpus_is_whole() -> None:
    assert len(NAMES) == 25


@pytest.mark.parametrize("name", NAMES)
def test_every_file_loads_with_a_place_for_every_value(checkout: Path, name: str) -> None:
    document = read_document(name)
    assert document.data
    for path, origin in document.origins.items():
        assert document.has(path)
        assert origin.line is not None
    if name.endswith(".json"):
        assert document.data == json.loads(Path(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_correct_files_have_no_error(found: dict[str, tuple[Finding, ...]], name: str) -> None:
    errors = [finding for finding in found[name] if finding.level == "error"]
    if "A14B/i2v/pretrain_model" in name:  # has one, see below
        errors = [finding for finding in errors if "i2v_vae_encod_tiling" not in finding.message]
    assert errors == []


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_misspelt_key_is_found_and_mended(found: dict[str, tuple[Finding, ...]], expert: str) -> None:
    name = f"{WAN}/A14B/i2v/pretrain_model_{expert}.json"
    place = place_of(name, '^"i2v_vae_encod_tiling"')
    (finding,) = [f for f in at(found[name], place) if "i2v_vae_encod_tiling" in f.message]
    assert finding.level in ("error", "warning")
    assert "i2v_vae_encode_tiling" in finding.text


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("inference_model.json")])
def test_the_schedulers_old_key_is_a_warning(found: dict[str, tuple[Finding, ...]], name: str) -> None:
    (finding,) = at(found[name], place_of(name, '^"num_train_steps"'))
    assert finding.level == "warning"
    assert finding.code == "legacy-key"
    assert '"num_train_timesteps": 1000' in finding.suggestion


def test_the_boundary_of_inference_that_is_not_the_trained_one_is_found(checkout: Path) -> None:
    folder = f"{WAN}/A14B/i2v"
    together = check_files_together(JOBS[folder])
    name = f"{folder}/inference_model.json"
    places = [place_of(name, '^"boundary_ratio"'), place_of(name, '"boundary_ratio": ^0.875')]
    told = [f for f in together if f.file == name and f"{f.line}:{f.column}" in places]
    assert [f.level for f in told] == ["warning"]
    assert "0.875" in told[0].message
    assert "0.9" in told[0].text
    other = check_files_together(JOBS[f"{WAN}/A14B/t2v"])
    assert [f for f in other if "boundary" in f.message] == [], "0.875 is what text to video was trained with"


def test_what_is_said_is_what_was_agreed(
    checkout: Path, found: dict[str, tuple[Finding, ...]], request: pytest.FixtureRequest
) -> None:
    parts = [f"$ mm check {name}\n{findings_text(found[name])}" for name in NAMES]
    for folder, names in JOBS.items():
        together = findings_text(check_files_together(names))
        parts.append(f"$ mm check {folder}/*.json    (what is said of the files together)\n{together}")
    text = re.sub(r"(The folder /(?:data|weights))\b\S* does", r"\1 does", "\n".join(parts))
    if UPDATE:
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


UPDATE = os.environ.get("MM_UPDATE_GOLDEN") == "1"
