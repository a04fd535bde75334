"""The documentation is true: its files pass, its links lead somewhere, its flags exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_core.cli.main import COMMANDS
from mm_core.cli.plugin import COMMANDS as PLUGIN_COMMANDS
from mm_core.config import read_document
from tests.e2e.conftest import ROOT, run_mm
from tests.e2e.pages import FENCE, Block, blocks, titled

pytestmark = pytest.mark.timeout(240)

DOCS = ROOT / "docs"
CONFIGURATION = DOCS / "configuration.md"
PAGES = [
    ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.glob("*.md")), ROOT / "examples/README.md",
    ROOT / "mm_plugins/wan22/README.md", ROOT / "mm_plugins/qwen3vl/README.md",
    ROOT / "examples/plugins/mmzoo-plugin-haar/README.md",
    ROOT / "examples/plugins/mmzoo-plugin-ltx/README.md",
]  # fmt: skip
#: Model files of these pages name plugins that their readers write; `test_docs_plugins` follows them.
OWN_PLUGINS = {DOCS / "write-a-plugin.md", DOCS / "port-a-predictor.md"}
SECTIONS = {"diffusion", "predictor", "ae", "text_encoder"}

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TREES = ("docs", "examples", "mm_core", "mm_plugins", "registry", "tests", "benchmarks")
_PATH = re.compile(rf"(?<![\w./-])(?:\./)?((?:{'|'.join(_TREES)})/[\w.$/-]*)")


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


def test_whole_model_files_on_the_pages_pass(tmp_path: Path) -> None:
    files = []
    for number, (block, text) in enumerate(json_blocks()):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        data = read_document(path).data  # raises if it is not even JSON with comments
        wrong = block.title.startswith("wrong") or block.page in OWN_PLUGINS
        if set(data) >= SECTIONS and not wrong:
            files.append(path)
    assert len(files) >= 3  # both READMEs and a page
    result = run_mm("check", *files, cwd=tmp_path)
    assert result.code == 0, result.out


def test_the_output_on_the_page_is_what_mm_check_prints(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(titled(CONFIGURATION, "wrong.json"), encoding="utf-8")
    result = run_mm("check", "wrong.json", cwd=tmp_path)
    assert result.code == 2
    assert result.out == titled(CONFIGURATION, "mm check wrong.json")


# -- links, paths, flags


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    links = [link for link in _LINK.findall(prose) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    for link in set(links) - set(missing):
        file, _, anchor = link.partition("#")
        if anchor and anchor not in anchors(page.parent / file):
            missing.append(link)
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
    commands = [[name] for name in COMMANDS] + [["plugin", name] for name in PLUGIN_COMMANDS]
    helps = "".join(run_mm(*command, "--help").out for command in commands)
    known = set(re.findall(r"--[a-z][\w-]*", helps)) | {"--help", "--version"}
    known |= {"--logdir"}  # tensorboard's
    known |= {"--force-reinstall", "--no-deps"}  # pip's
    known |= {"--ranks", "--size", "--steps", "--json"}  # those of benchmarks/sharding.py
    known |= {"--shape", "--attention", "--recompute", "--profile", "--peak"}  # of benchmarks/wan_step.py
    for page in PAGES:
        written = re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))
        assert {flag.replace("_", "-") for flag in written} <= known, page


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^  - .*: ([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == [page.name for page in sorted(DOCS.glob("*.md"))]
