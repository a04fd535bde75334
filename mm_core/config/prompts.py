"""The prompts of a generation job: a text, several, or a file with one a line."""

from __future__ import annotations

import re
from pathlib import Path

from mm_core.config.cross_checks import missing_path
from mm_core.config.document import Document
from mm_core.config.findings import Finding

_ENDING = re.compile(r"\w\.[A-Za-z]\w{0,4}$", re.ASCII)
"""Of a file, which a sentence of several words has not."""


def read_prompts(value: str | list[str], document: Document) -> tuple[tuple[str, ...], list[Finding]]:
    """Return the prompts. A text that looks like a path must be a file: a mistyped path is never taken for a
    prompt.
    """
    path = ("prompt",)
    origin = document.origin(path)
    if isinstance(value, list):
        texts = [text.strip() for text in value]
    elif looks_like_path(value):
        file = Path(value).expanduser()
        if not file.is_file():
            return (), [missing_path(document, path, value, "file")]
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            text = f'"{value}" cannot be read as UTF-8 text: {error}'
            return (), [Finding.at(origin, "error", "unreadable", text, path=path)]
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            return (), [Finding.at(origin, "error", "no-prompt", f'"{value}" holds no prompt', path=path)]
    else:
        texts = [value.strip()]
    if not all(texts):
        return (), [Finding.at(origin, "error", "no-prompt", "a prompt is empty", path=path)]
    return tuple(texts), []


def looks_like_path(text: str) -> bool:
    """Whether a text is meant as a path: it names a file, ends in .txt, or has no spaces, but slashes or an ending."""
    if "\n" in text or len(text) > 4096:
        return False
    if text.lower().endswith(".txt"):
        return True
    bare = text.strip()
    if " " not in bare and ("/" in bare or _ENDING.search(bare)):
        return True
    try:
        return Path(bare).is_file()
    except (OSError, ValueError):
        return False
