"""The documentation is true: its plugins work, its files pass, its links lead somewhere, its tables are those
of the config classes.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mm_core.config import read_document
from mm_core.config.keys import Legacy, NoEffect, Only
from mm_core.config.section import markers
from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, Result, run_mm

pytestmark = pytest.mark.timeout(240)

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.glob("*.md")), ROOT / "examples/README.md",
    ROOT / "mm_plugins/wan22/README.md", ROOT / "examples/plugins/mmzoo-plugin-haar/README.md",
]  # fmt: skip
PLUGIN_PAGE, KEYS_PAGE = DOCS / "write-a-plugin.md", DOCS / "configuration.md"
SECTIONS = {"diffusion", "predictor", "ae", "text_encoder"}

_FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TREES = ("docs", "examples", "mm_core", "mm_plugins", "registry", "tests", "benchmarks")
_PATH = re.compile(rf"(?<![\w./-])(?:\./)?((?:{'|'.join(_TREES)})/[\w.$/-]*)")


@dataclass(frozen=True)
class Block:
    """One fenced block of code."""

    page: Path
    language: str
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)} {self.title or self.text[:40]!r}"


def blocks(page: Path) -> list[Block]:
    return [Block(page, *match) for match in _FENCE.findall(page.read_text(encoding="utf-8"))]


def titled(page: Path, title: str) -> str:
    (block,) = (block for block in blocks(page) if block.title == title)
    return block.text


@dataclass(frozen=True)
class Plugins:
    """The plugins of the page: their sources, and a folder with both installed."""

    sources: Path
    site: Path

    def mm(self, *arguments: str | Path, cwd: Path = ROOT) -> Result:
        return run_mm(*arguments, cwd=cwd, PYTHONPATH=str(self.site))


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    """Write the files of write-a-plugin.md and install them with pip."""
    made = Plugins(tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site"))
    for block in blocks(PLUGIN_PAGE):
        if "/" in block.title:
            path = made.sources / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    folders = sorted(made.sources.iterdir())
    assert [folder.name for folder in folders] == ["mmzoo-plugin-minidit", "mmzoo-plugin-minihaar"]
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, made.site, *folders],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def test_the_plugins_of_the_page_are_listed(plugins: Plugins) -> None:
    result = plugins.mm("list", "--format", "json")
    entries = {entry["id"]: entry for entry in json.loads(result.out)}
    for name, group in {"minihaar": "mm_core.ae_models", "minidit": "mm_core.predictor_models"}.items():
        assert entries[name]["group"] == group
        assert entries[name]["distribution"] == f"mmzoo-plugin-{name}"
        assert entries[name]["status"] == "available"
    assert not result.err


def test_the_section_of_a_new_plugin_is_checked(plugins: Plugins, tmp_path: Path) -> None:
    text = titled(PLUGIN_PAGE, "minihaar.json")
    (tmp_path / "model.json").write_text(text, encoding="utf-8")
    assert plugins.mm("check", "model.json", cwd=tmp_path).code == 0
    (tmp_path / "model.json").write_text(text.replace('"levels": 2', '"level": 2'), encoding="utf-8")
    result = plugins.mm("check", "model.json", cwd=tmp_path)
    assert result.code == 2
    assert result.out.splitlines()[0] in PLUGIN_PAGE.read_text(encoding="utf-8")
    (tmp_path / "model.json").write_text(text.replace('"levels": 2', '"levels": 4'), encoding="utf-8")
    assert "levels" in plugins.mm("check", "model.json", cwd=tmp_path).out


def minidit_model(path: Path, **more: Any) -> Path:
    """A model file with both plugins, which fit the tiny data."""
    model = read_document(ROOT / TINY / "model.json").data
    model["predictor"] = {
        "model_id": "minidit", "init": "random", "in_dim": 24, "out_dim": 24, "hidden_size": 32, "text_dim": 64, **more,
    }  # fmt: skip
    model["ae"] = {"model_id": "minihaar"}
    path.write_text(json.dumps(model), encoding="utf-8")
    return path


def test_the_four_kinds_of_keys_and_the_hook_of_the_page(plugins: Plugins, tmp_path: Path) -> None:
    # ffn_dim is required and not written: the hook fills it.
    assert "nothing to say" in plugins.mm("check", minidit_model(tmp_path / "good.json")).out
    wrong = minidit_model(tmp_path / "wrong.json", ffn_dim=64, depth=3, fa_layout="sbh", qk_norm=True)
    out = plugins.mm("check", wrong).out
    assert 'warning: "depth" is an old spelling of "num_layers"' in out
    assert 'note: "fa_layout" has no effect here: attention chooses its own layout' in out
    assert "only false is accepted: the model has no normalised queries" in out
    assert "1 error, 1 warning, 1 note" in out


def test_the_callback_of_the_page_is_found(plugins: Plugins, tmp_path: Path) -> None:
    path = minidit_model(tmp_path / "model.json")
    model = json.loads(path.read_text())
    for name, code in {"smallest_loss": 0, "smalest_loss": 2}.items():
        path.write_text(json.dumps(model | {"callbacks": [name]}), encoding="utf-8")
        result = plugins.mm("check", path)
        assert result.code == code, result.out
    assert (
        "no installed distribution offers the callback 'smalest_loss'. Did you mean 'smallest_loss'"
        in result.out
    )


def test_the_test_of_the_page_passes(plugins: Plugins) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=plugins.sources / "mmzoo-plugin-minihaar", env={**ENVIRONMENT, "PYTHONPATH": str(plugins.site)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.slow
def test_the_predictor_of_the_page_trains_on_two_ranks(plugins: Plugins, tmp_path: Path) -> None:
    model = str(minidit_model(tmp_path / "model.json"))
    flags = ["--mm-model", model, "--mm-data", str(TINY / "data.json"), "--num-workers", "0"]
    data = json.loads(Path(model).read_text())
    Path(model).write_text(json.dumps(data | {"callbacks": ["smallest_loss"]}), encoding="utf-8")
    run = tmp_path / "run"
    result = plugins.mm(
        "train", *flags, "--lr", "1e-3", "--train-iters", "2", "--nproc-per-node", "2", "--save", run
    )
    assert result.code == 0, result.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert re.search(r"smallest loss \d+\.\d{4} at step [12]", (run / "logs/rank-00000.log").read_text())
    (overwrite,) = json.loads((run / "config.json").read_text())["overwrites"]
    assert (overwrite["path"], overwrite["new"]) == ("predictor.ffn_dim", 128)
    (tmp_path / "fsdp2.yaml").write_text("sub_modules_to_wrap:\n  - predictor.block.{*}\n")
    result = plugins.mm(
        "train", *flags, "--fsdp2-config-path", tmp_path / "fsdp2.yaml", "--lr", "1e-3", "--train-iters", "1"
    )
    assert result.code == 2
    assert result.err.strip().replace(f"{tmp_path}/", "") in PLUGIN_PAGE.read_text(encoding="utf-8")


# -- files and findings


def json_blocks() -> Iterator[tuple[Block, str]]:
    """Every JSON block, fragments completed to an object."""
    for page in PAGES:
        for block in blocks(page):
            text = block.text.strip()
            if block.language not in ("json", "jsonc"):
                continue
            if text.startswith("["):
                text = f'"items": {text}'
            yield block, text if text.startswith("{") else f"{{{text}}}"


def test_whole_model_files_on_the_pages_pass(plugins: Plugins, tmp_path: Path) -> None:
    files = []
    for number, (block, text) in enumerate(json_blocks()):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        data = read_document(path).data  # raises if it is not even JSON with comments
        if set(data) >= SECTIONS and not block.title.startswith("wrong"):
            files.append(path)
    assert len(files) >= 4  # both READMEs and two pages
    result = plugins.mm("check", *files, cwd=tmp_path)
    assert result.code == 0, result.out


def test_the_output_on_the_page_is_what_mm_check_prints(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(titled(KEYS_PAGE, "wrong.json"), encoding="utf-8")
    result = run_mm("check", "wrong.json", cwd=tmp_path)
    assert result.code == 2
    assert result.out == titled(KEYS_PAGE, "mm check wrong.json")


# -- links, paths, flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    links = [link for link in _LINK.findall(prose) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    here = re.findall(r"^here=(\S+)$", text, re.MULTILINE)
    for block in blocks(page):
        folder = re.findall(r"^here=(\S+)$", block.text, re.MULTILINE)
        for word in re.findall(r"\$here/([\w./-]+)", block.text):
            missing += [] if folder and (ROOT / folder[0] / word).exists() else [f"$here/{word}"]
    for name in (*_PATH.findall(text), *here):
        if not (ROOT / name.rstrip("./")).exists() and not (page.parent / name.rstrip("./")).exists():
            missing.append(name)
    assert not missing


def test_every_flag_on_the_pages_exists() -> None:
    helps = "".join(run_mm(command, "--help").out for command in ("train", "generate", "check", "list"))
    known = set(re.findall(r"--[a-z][\w-]*", helps)) | {"--help", "--version"}
    known |= {"--logdir"}  # tensorboard's
    for page in PAGES:
        written = re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))
        assert {flag.replace("_", "-") for flag in written} <= known, page


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^  - .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == [page.name for page in sorted(DOCS.glob("*.md"))]


# -- tables of keys

_TABLE = re.compile(r"<!-- keys: ([\w.]+):(\w+) -->\n\n((?:\|.*\n)+)")


def tables() -> dict[type[BaseModel], dict[str, str]]:
    """Config class -> key -> default, as the page has them."""
    found: dict[type[BaseModel], dict[str, str]] = {}
    for module, name, table in _TABLE.findall(KEYS_PAGE.read_text(encoding="utf-8")):
        rows: dict[str, str] = {}
        for line in table.splitlines()[2:]:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            keys = re.findall(r"`(\w+)`", cells[0])
            defaults = re.findall(r"`([^`]*)`", cells[2]) or [cells[2]]
            rows |= dict(zip(keys, defaults * len(keys) if len(defaults) == 1 else defaults, strict=True))
        found[getattr(importlib.import_module(module), name)] = rows
    return found


def written_default(cls: type[BaseModel], name: str) -> str:
    field = cls.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    return "{}" if isinstance(value, BaseModel) else json.dumps(value)


def is_effective(cls: type[BaseModel], name: str) -> bool:
    """Whether a key does something; one that accepts a single value does not."""
    field = cls.model_fields[name]
    choices = [value for mark in markers(field, Only) for value in mark.values if value not in (None, (), {})]
    limited = bool(markers(field, Only)) and len(choices) < 2
    idle = bool(markers(field, NoEffect)) or bool(markers(field, Legacy))
    return not (idle or limited)


@pytest.mark.parametrize(("cls", "rows"), tables().items(), ids=lambda value: getattr(value, "__name__", ""))
def test_tables_have_the_effective_keys_and_their_defaults(
    cls: type[BaseModel], rows: dict[str, str]
) -> None:
    expected = {name: written_default(cls, name) for name in cls.model_fields if is_effective(cls, name)}
    assert rows == expected


def test_every_other_key_is_named_on_the_page() -> None:
    text = KEYS_PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)", text))
    assert len(tables()) >= 14
    for cls in tables():
        assert set(cls.model_fields) <= named, cls.__name__
