"""What a chat model is asked: on the command line, or row by row in a file of JSON Lines. Imports no torch.

A row is `{"prompt": "What is this?", "images": ["cat.jpg"]}`, or has `messages` in place of `prompt`: those of OpenAI's layout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.config.document import closest_path, expanded
from mm_core.config.findings import clip
from mm_registry.errors import UserError
from mm_registry.suggestions import closest

KINDS = ("image", "video")
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("prompt", "messages", "system", "images", "videos", "tools")
_PLACEHOLDER = re.compile("(<image>|<video>)")


@dataclass(frozen=True)
class ChatRequest:
    """One conversation that wants a reply.

    Attributes:
        messages: in transformers' form; contents are lists of parts, without their sources.
        images, videos: paths, in the order of their parts in `messages`.
        tools: JSON schemas of functions that the model may call, or None.
        row: as it was written, to be repeated beside the reply.
        origin: of the row, for messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    row: Mapping[str, Any] | None = None
    origin: str = "the command line"


def request_of(
    prompt: str,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    system: str | None = None,
) -> ChatRequest:
    """Make a request of one prompt. `<image>` and `<video>` in it say where pictures stand; without them, in front.

    Raises:
        UserError: a file does not exist, or there are not as many as placeholders.
    """
    row = {"prompt": prompt, "images": list(images), "videos": list(videos), "system": system}
    return _Row(row, "the command line", Path()).request()


def read_requests(path: str) -> list[ChatRequest]:
    """Read a file of JSON Lines. Pictures are looked up beside the file, then from the working directory.

    Raises:
        UserError: the file cannot be read, has no row, or a row is wrong; it names file and line.
    """
    file = expanded(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # texts may hold U+2028 and the like
    except FileNotFoundError:
        near = closest_path(path) or "Name a file of JSON Lines"
        raise UserError(f"--input {path}: there is no such file. {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: it cannot be read: {error}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{origin}: it holds half of a surrogate pair, which is no character") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{origin}: it is no JSON: {error}; a file of JSON Lines has one object a line"
            ) from error
        requests.append(_Row(row, origin, file.parent).request())
    if not requests:
        raise UserError(f'--input {path}: it has no row; write one object a line, such as {{"prompt": "…"}}')
    return requests


class _Row:
    """One row while it is being read."""

    def __init__(self, row: Any, origin: str, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        if not isinstance(row, Mapping):
            raise self.bad(f"{json.dumps(row)} is no object")
        for key in row:
            near = closest(key, [name for name in _KEYS if name not in row], 1)
            if key not in _KEYS and near:
                raise self.bad(f'unknown key "{key}"; did you mean "{near[0]}"?')
        self.row: Mapping[str, Any] = row
        self.sources: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.listed = {kind: iter(self.listing(f"{kind}s")) for kind in KINDS}

    def bad(self, reason: str) -> UserError:
        return UserError(f"{self.origin}: {reason}")

    def request(self) -> ChatRequest:
        messages = [self.message(one) for one in self.messages()]
        for kind, rest in self.listed.items():
            if left := len(list(rest)):
                used = len(self.sources[kind])
                raise self.bad(f"{used + left} {kind}s are given, but the texts have {used} <{kind}>")
        tools = self.row.get("tools")
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(one, Mapping) for one in tools)
        ):
            raise self.bad('"tools" must be a list of JSON schemas')
        if messages[-1]["role"] == "assistant":
            raise self.bad("the last message is a reply already; end with what the user says")
        return ChatRequest(
            tuple(messages),
            tuple(self.sources["image"]),
            tuple(self.sources["video"]),
            tuple(tools) if tools else None,
            self.row,
            self.origin,
        )

    def messages(self) -> list[Mapping[str, Any]]:
        prompt, messages = self.row.get("prompt"), self.row.get("messages")
        if (prompt is None) == (messages is None):
            raise self.bad('it needs "prompt" or "messages", one of them')
        if messages is not None:
            if not (
                isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages)
            ):
                raise self.bad('"messages" must be a list of objects with role and content')
            if self.row.get("system") is not None:
                raise self.bad('"system" goes with "prompt"; among messages it is one of the role system')
            return messages
        if not isinstance(prompt, str) or not prompt.strip():
            raise self.bad('"prompt" must be a text')
        front = "".join(
            f"<{kind}>" * len(self.listing(f"{kind}s")) for kind in KINDS if f"<{kind}>" not in prompt
        )
        system = self.row.get("system")
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": front + prompt}]

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise self.bad(f"role {json.dumps(role)} is none of {', '.join(_ROLES)}")
        if isinstance(content, str):
            return {**message, "content": list(self.text_parts(content))}
        if content is None and message.get("tool_calls"):
            return {**message, "content": ""}
        if not isinstance(content, list):
            raise self.bad(f"the content of a message of {role} must be a text or a list of parts")
        return {**message, "content": [self.part(one) for one in content]}

    def text_parts(self, text: str) -> Iterator[dict[str, str]]:
        for piece in _PLACEHOLDER.split(text):
            if piece in ("<image>", "<video>"):
                kind = piece[1:-1]
                source = next(self.listed[kind], None)
                if source is None:
                    raise self.bad(f"the texts have more <{kind}> than there are {kind}s")
                yield self.picture(kind, source)
            elif piece:
                yield {"type": "text", "text": piece}

    def part(self, part: Any) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind in KINDS:
            source = part.get(kind) or part.get("path") or next(self.listed[kind], None)
            if isinstance(source, str):
                return self.picture(kind, source)
        raise self.bad(
            f'{json.dumps(part)} is no part of a message; write {{"type": "text", "text": "…"}}, or '
            '{"type": "image", "image": "file"}'
        )

    def picture(self, kind: str, source: str) -> dict[str, str]:
        for place in (self.folder / source, expanded(source)):
            if os.path.isfile(place):  # false, too, for what is too long to be a name
                self.sources[kind].append(str(place))
                return {"type": kind}
        near = closest_path(source)
        mend = f". {near}" if near else ""
        raise self.bad(f"{kind} {clip(source)}: there is no such file{mend}")

    def listing(self, key: str) -> list[str]:
        value = self.row.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self.bad(f'"{key}" must be a list of paths')
        return value
