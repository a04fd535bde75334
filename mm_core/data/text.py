"""Captions: cleaning and tokenisation, for training and generation alike: a prompt means the same in both."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.config.document import expanded
from mm_core.data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def basic_clean(text: str) -> str:
    """Repair wrongly decoded characters, resolve HTML entities twice, strip: what diffusers' Wan pipeline does to prompts."""
    import ftfy  # its tables take a while to load, and only some jobs clean

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """Replace each run of whitespace by one space, and strip."""
    return re.sub(r"\s+", " ", text).strip()


def lowercase(text: str) -> str:
    """Lower case, stripped."""
    return text.lower().strip()


TEXT_METHODS: Mapping[str, Callable[[str], str]] = {
    "basic_clean": basic_clean,
    "whitespace_clean": whitespace_clean,
    "lower": lowercase,
    "lowercase": lowercase,
}
"""What `text_preprocess_methods` may name (`TextMethodName` in `mm_core.config.text` has the same names).

None of them removes a script: Chinese and Japanese text stays.
"""


def clean_text(text: str, methods: Sequence[str]) -> str:
    """Apply the methods, names from `TEXT_METHODS`, in their order.

    Raises:
        DataError: a name is unknown.
    """
    for name in methods:
        method = TEXT_METHODS.get(name)
        if method is None:
            known = ", ".join(TEXT_METHODS)
            raise DataError(
                f"text_preprocess_methods: there is no method {name!r}; the known ones are {known}"
            )
        text = method(text)
    return text


class PromptTokenizer:
    """A Hugging Face tokenizer read from a local folder; no network, no code from the folder.

    Args:
        folder: `tokenizer_config.from_pretrained`, a folder with tokenizer.json or spiece.model.
        max_length: tokens of every prompt; longer ones are cut, shorter ones padded.
        methods: cleaning done first.
        class_name: `autotokenizer_name`: AutoTokenizer, or the class that the folder must hold.

    Raises:
        DataError: the folder is missing, holds no tokenizer, or its tokenizer has no padding token.
    """

    def __init__(
        self,
        folder: str | Path,
        max_length: int = 512,
        methods: Sequence[str] = (),
        class_name: str = "AutoTokenizer",
    ) -> None:
        clean_text("", methods)
        self.folder = expanded(str(folder))
        self.max_length = max_length
        self.methods = tuple(methods)
        if not self.folder.is_dir():
            raise DataError(
                f"tokenizer_config.from_pretrained: there is no folder {self.folder}; give the local folder "
                f"of the tokenizer (seen from the working directory {Path.cwd()})"
            )
        self._tokenizer = self._load()
        classes = {cls.__name__ for cls in type(self._tokenizer).__mro__} | {"PreTrainedTokenizer"}
        if class_name not in {"AutoTokenizer", *classes, *(f"{name}Fast" for name in classes)}:
            raise DataError(
                f"tokenizer_config.autotokenizer_name is {class_name}, but the folder {self.folder} holds a "
                f"{type(self._tokenizer).__name__}; write AutoTokenizer"
            )
        if self._tokenizer.pad_token_id is None:
            raise DataError(
                f"the tokenizer in {self.folder} has no padding token, which prompts of equal length need"
            )

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        """Return a prompt's ids and mask (1 for a token, 0 for padding), both int64 `[max_length]`."""
        encoded = self._tokenizer(
            clean_text(text, self.methods),
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"][0], encoded["attention_mask"][0]

    def count(self, text: str) -> int:
        """Return how many tokens a prompt has before it is cut to `max_length`, the special ones included."""
        return len(
            self._tokenizer(clean_text(text, self.methods), add_special_tokens=True, verbose=False)[
                "input_ids"
            ]
        )

    def __len__(self) -> int:
        """Number of ids, the least vocabulary size that a text encoder must have."""
        return len(self._tokenizer)

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the folder {self.folder} holds no tokenizer that can be read: {reason}"
            ) from error
