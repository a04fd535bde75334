"""The chat template `tokenizer`: a folder's own template and tokenizer, texts alone. Those of families with pictures build on
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch

from mm_core.config.document import expanded
from mm_core.data.chat.protocol import ChatInputs, ChatTemplate
from mm_core.data.errors import DataError
from mm_registry.manager import default_manager

if TYPE_CHECKING:
    from mm_core.data.chat.protocol import ImageSource, Message, Segment, VideoSource

GROUP = "mm_core.chat_templates"


def build_template(name: str, folder: str | Path, **parameters: Any) -> ChatTemplate:
    """Build the chat template of an id for a folder.

    Args:
        name: id in `CHAT_TEMPLATE_MAPPINGS`.
        folder: `model_name_or_path`.
        parameters: the other `preprocess_parameters`.

    Raises:
        RegistryError: nothing is registered for the id, or it cannot be imported.
        DataError: what the template says about the folder.
    """
    manager = default_manager()
    cls: Any = manager.load(manager.resolve(GROUP, name))
    made: ChatTemplate = cls(folder, **parameters)
    return made


class TokenizerTemplate:
    """The folder's own chat template and tokenizer, for models that read texts alone.

    Args:
        folder: with tokenizer.json and a chat template (chat_template.jinja, or inside another file).
        use_fast_tokenizer: without effect; the tokenizer written in Rust is always used, for it tells where in the text a
            token begins.
        split_special_tokens: only false; the template's own tokens would be split too.
        limits: of images and videos, of which there are none.

    Raises:
        DataError: the folder is missing, or holds no fast tokenizer or no chat template; `split_special_tokens`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        use_fast_tokenizer: bool | None = None,
        split_special_tokens: bool | None = None,
        **limits: Any,
    ) -> None:
        if split_special_tokens:
            raise DataError(
                "preprocess_parameters.split_special_tokens: only false is supported: the tokens that the chat template "
                "itself writes would be split too"
            )
        self.folder = expanded(str(folder))
        if not self.folder.is_dir():
            raise DataError(
                f"preprocess_parameters.model_name_or_path: there is no folder {self.folder}; give the local folder "
                f"of the model (seen from the working directory {Path.cwd()})"
            )
        self.tokenizer = _load_tokenizer(self.folder)
        self.tokenizer.chat_template = _chat_template(self.folder, self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of tokenizer, chat template and whatever else decides the tensors of a sample."""
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(part.encode())
            digest.update(b"\0")
        return digest.hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return the text of a conversation; see `ChatTemplate`."""
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._messages(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **thinking,
            )
        # A template is a program in a file of somebody else: besides Jinja's own errors it meets values it was not made for.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise DataError(f"the chat template of {self.folder} cannot render this: {reason}") from error
        return text

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> ChatInputs:
        """Return `input_ids` and `learnt`; see `ChatTemplate`.

        Raises:
            DataError: there are images or videos.
        """
        self._refuse(images, videos)
        ids, learnt = self.tokenise(segments)
        return {"input_ids": torch.from_numpy(ids), "learnt": torch.from_numpy(learnt)}

    def length(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> int:
        """Return the number of tokens that `encode` gives."""
        self._refuse(images, videos)
        return len(self.tokenise(segments)[0])

    def tokenise(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a text at once, as if it were not in pieces.

        Returns:
            ids int64 `[S]`, and whether the segment in which a token begins is learnt, bool `[S]`.

        Raises:
            DataError: the text cannot be written as UTF-8.
        """
        whole = "".join(text for text, _ in segments)
        try:
            whole.encode()
        except UnicodeEncodeError:  # JSON can write it, in whatever a template takes from a row
            raise DataError("its text holds half of a surrogate pair, which is no character") from None
        encoded = self.tokenizer(
            whole,
            add_special_tokens=False,  # a template writes those itself
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # it would warn of texts beyond model_max_length, which cutoff_len decides
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64).reshape(-1)
        begins = np.asarray([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)
        ends = np.cumsum([len(text) for text, _ in segments])
        flags = np.asarray([*(flag for _, flag in segments), False], dtype=bool)
        return ids, flags[np.searchsorted(ends, begins, side="right")]

    def _messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template takes them: here, contents that are texts."""
        return [
            {**message, "content": _joined(message["content"])}
            if isinstance(message.get("content"), list | tuple)
            else message
            for message in messages
        ]

    def _identity(self) -> Iterable[str]:
        yield type(self).__qualname__
        self.tokenise(
            [("", False)]
        )  # a file may ask for truncation or padding, which the first call takes out
        yield self.tokenizer.backend_tokenizer.to_str()
        yield json.dumps(self.tokenizer.chat_template, sort_keys=True)

    def _refuse(self, images: Sequence[Any], videos: Sequence[Any]) -> None:
        if images or videos:
            raise DataError(_NO_PICTURES)


_NO_PICTURES = (
    "the chat template `tokenizer` takes texts alone, but there are images or videos; name the model's own template "
    "in basic_parameters.template (`mm list` shows all)"
)


def _joined(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            raise DataError(_NO_PICTURES)
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"the folder {folder} holds no tokenizer that can be read: {reason}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {folder} is not a fast one (tokenizer.json), which tells where in a text a token begins"
        )
    return tokenizer


def _chat_template(folder: Path, tokenizer: Any) -> str | dict[str, str]:
    """The folder's template. transformers' tokenizer reads it from chat_template.jinja or its own files; older folders have
    that of their processor in chat_template.json.
    """
    file = folder / "chat_template.json"
    if file.is_file() and not (folder / "chat_template.jinja").is_file():
        try:
            template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} holds no chat template that can be read: {error}") from error
    else:
        template = tokenizer.chat_template
    if not template:
        raise DataError(
            f"the folder {folder} has no chat template (chat_template.jinja); copy tokenizer and template of the model's "
            "published folder into it, or name a folder that has them"
        )
    made: str | dict[str, str] = template
    return made
