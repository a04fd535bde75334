"""Rows of a file to conversations in transformers' form: roles, pictures, tools and their calls.

Two layouts are common, and `attr` says which keys and roles a file has. ShareGPT's:

    {"conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A cat."}],
     "images": ["cat.jpg"]}

and OpenAI's, whose `content` may also be a list of parts:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_core.config.dataset_huggingface import ConversationKeys
from mm_core.config.document import expanded
from mm_core.data.chat.conversations import PICTURES, Conversation
from mm_core.data.chat.files import existing
from mm_core.data.errors import UnreadableSampleError

PLACEHOLDERS = {f"<{kind}>": kind for kind in PICTURES}
"""What stands for a picture in a text, and its kind."""
_PLACEHOLDER = re.compile("(" + "|".join(PLACEHOLDERS) + ")")


class ConversationReader:
    """Makes conversations of rows.

    Args:
        keys: `attr`.
        folder: `dataset_dir`, where pictures are looked up first; then beside the row's file, then from the working
            directory.
    """

    def __init__(self, keys: ConversationKeys, folder: str) -> None:
        self.keys = keys
        self.folder = expanded(folder)
        roles = {
            keys.system_tag: "system",
            keys.user_tag: "user",
            keys.assistant_tag: "assistant",
            keys.observation_tag: "tool",
            keys.function_tag: "call",
        }
        self.roles = {tag: role for tag, role in roles.items() if tag is not None}

    def __call__(self, row: Any, origin: str, folder: Path) -> Conversation:
        """Return a row's conversation.

        Args:
            row: the value in the file.
            origin: of it, for messages.
            folder: of its file.

        Raises:
            UnreadableSampleError: the row has no such conversation, or a picture does not exist.
        """
        return _Row(self, row, origin, folder).conversation()


class _Row:
    """One row while it is being read."""

    def __init__(self, reader: ConversationReader, row: Any, origin: str, folder: Path) -> None:
        self.keys, self.roles, self.origin = reader.keys, reader.roles, origin
        self.folders = (reader.folder, folder, Path())
        if not isinstance(row, Mapping):
            raise self.bad(f"{_show(row)} is no conversation; expected an object")
        self.row = row
        self.sources: dict[str, list[str | bytes]] = {kind: [] for kind in PICTURES}
        self.listed = {
            kind: iter(self.listing(key))
            for kind, key in zip(PICTURES, (self.keys.images, self.keys.videos), strict=True)
        }

    def bad(self, reason: str) -> UnreadableSampleError:
        return UnreadableSampleError(self.origin, reason)

    def conversation(self) -> Conversation:
        messages = self.in_turns(
            [self.message(number, raw) for number, raw in enumerate(self.raw_messages())]
        )
        for kind, rest in self.listed.items():
            left = sum(1 for _ in rest)
            if left:
                used = len(self.sources[kind])
                raise self.bad(
                    f"it lists {used + left} {kind}{'s' * (used + left != 1)}, but its texts have {used} <{kind}>; "
                    "write one placeholder for each"
                )
        return Conversation(
            tuple(messages),
            tuple(self.sources["image"]),
            tuple(map(str, self.sources["video"])),
            self.tools(),
            self.origin,
        )

    # -- messages ---------------------------------------------------------------------------------------------------

    def raw_messages(self) -> list[Any]:
        key = self.keys.messages
        raw = self.row.get(key) if key is not None else None
        if isinstance(raw, list) and raw:
            return raw
        if raw is not None:
            raise self.bad(f'"{key}" is {_show(raw)}, but must be a list of messages, not an empty one')
        near = next((other for other in ("messages", "conversations") if other in self.row), None)
        mend = (
            f'; it has "{near}": write "messages": "{near}" in attr, and its other keys and roles'
            if near
            else ""
        )
        has = ", ".join(map(_show, list(self.row)[:8]))
        raise self.bad(
            f'it has no "{key}" (attr.messages), only {has}{mend}' if has else "it is an empty object"
        )

    def message(self, number: int, raw: Any) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise self.bad(f"message {number} is {_show(raw)}; expected an object")
        tag_key, key = self.keys.role_tag, self.keys.content_tag
        tag = raw.get(tag_key)
        role = self.roles.get(tag) if isinstance(tag, str) else None
        if role is None:
            if tag_key not in raw:
                raise self.bad(f'message {number} has no "{tag_key}" (attr.role_tag)')
            known = ", ".join(f'"{one}"' for one in self.roles)
            raise self.bad(
                f"message {number} has the {tag_key} {_show(tag)}, which attr gives no role (it knows {known}); "
                f"name it there: {_tag_for(tag)}"
            )
        content, calls = raw.get(key), raw.get("tool_calls")
        if role == "call":
            return {"role": "assistant", "content": "", "tool_calls": self.calls(number, content)}
        if content is None and calls and role == "assistant":
            content = ""
        if content is None:
            raise self.bad(f'message {number} has no "{key}" (attr.content_tag)')
        message: dict[str, Any] = {"role": role, "content": self.content(number, role, content)}
        if role == "assistant":
            if calls:
                message["tool_calls"] = self.calls(number, calls)
            if isinstance(thoughts := raw.get("reasoning_content"), str):
                message["reasoning_content"] = thoughts
        return message

    def content(self, number: int, role: str, content: Any) -> Any:
        """A text as it is; with placeholders, or of several parts, a list of parts."""
        if isinstance(content, str):
            parts = list(self.split(content))
            if all(part["type"] == "text" for part in parts):
                return self.text(number, content)
        elif isinstance(content, list):
            parts = [made for part in content for made in self.part(number, part)]
        else:
            raise self.bad(f"message {number} says {_show(content)}; expected a text or a list of parts")
        if role == "system" and any(part["type"] != "text" for part in parts):
            raise self.bad("the system prompt has an image or a video; put it into the user's first message")
        return parts

    def split(self, text: str) -> Iterator[dict[str, str]]:
        for piece in filter(None, _PLACEHOLDER.split(text)):
            kind = PLACEHOLDERS.get(piece)
            if kind is None:
                yield {"type": "text", "text": piece}
                continue
            source = next(self.listed[kind], None)
            if source is None:
                key = self.keys.images if kind == "image" else self.keys.videos
                listed = len(self.sources[kind])
                why = f'"{key}" lists {listed}' if key else f"attr.{kind}s names no key that would list them"
                raise self.bad(f"its texts have more <{kind}> than there are {kind}s: {why}")
            self.sources[kind].append(source)
            yield {"type": kind}

    def part(self, number: int, part: Any) -> Iterator[dict[str, str]]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from self.split(self.text(number, part["text"]))
            return
        kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
        if kind not in PICTURES:
            raise self.bad(
                f"message {number} has the part {_show(part)}; expected one of type text, image or video"
            )
        source = next((part[key] for key in (kind, f"{kind}_url", "path", "url") if part.get(key)), None)
        if source is None:
            yield from self.split(f"<{kind}>")  # of the row's list
            return
        self.sources[kind].append(self.source(kind, source))
        yield {"type": kind}

    def text(self, number: int, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.bad(
                f"message {number} holds half of a surrogate pair, which is no character"
            ) from None
        return text

    def in_turns(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Check the order of roles, and put the system prompt first."""
        prompt = self.row.get(self.keys.system) if self.keys.system is not None else None
        if prompt is not None and not isinstance(prompt, str):
            raise self.bad(f'"{self.keys.system}" is {_show(prompt)}; expected a text')
        if prompt:
            if messages[0]["role"] == "system":
                if messages[0]["content"] != prompt:
                    raise self.bad(
                        f'"{self.keys.system}" and its first message are two system prompts; keep one'
                    )
            else:
                messages.insert(0, {"role": "system", "content": self.text(0, prompt)})
        roles = [message["role"] for message in messages]
        before = "system"
        for number, role in enumerate(roles):
            if role == "system" and number == 0:
                continue
            follows = {
                "system": ("user",),
                "user": ("assistant",),
                "tool": ("tool", "assistant"),
                "assistant": ("user", "tool"),
            }
            if role not in follows[before]:
                what = (
                    f"{_a(role)} follows {_a(before)}"
                    if number
                    else f"the conversation begins with {_a(role)}"
                )
                raise self.bad(
                    f"its roles are {_shortened(roles)}, but {what}: user (or tool) and assistant must take turns, and the "
                    "user begins"
                )
            before = role
        if before != "assistant":
            raise self.bad(
                f"its roles are {_shortened(roles)}: the last must be assistant, whose reply is learnt"
            )
        return messages

    # -- tools ------------------------------------------------------------------------------------------------------

    def tools(self) -> tuple[Mapping[str, Any], ...] | None:
        key = self.keys.tools
        value = self.row.get(key) if key is not None else None
        if not value:
            return None
        tools = self.parsed(f'"{key}"', value)
        tools = tools if isinstance(tools, list) else [tools]
        for tool in tools:
            if not isinstance(tool, Mapping) or not (
                "name" in tool or isinstance(tool.get("function"), Mapping)
            ):
                raise self.bad(f'"{key}" has {_show(tool)}; expected a function with its name and parameters')
        return (
            tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
            or None
        )

    def calls(self, number: int, value: Any) -> list[dict[str, Any]]:
        value = self.parsed(f"message {number}, a call of a tool,", value)
        calls = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise self.bad(
                    f"message {number} calls {_show(call)}; expected an object with name and arguments"
                )
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):
                arguments = self.parsed(
                    f"message {number}: the arguments of {function['name']}", arguments or "{}"
                )
            calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        return calls

    def parsed(self, what: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise self.bad(f"{what} is {_show(value)}, which is no JSON: {error}") from None

    # -- pictures ---------------------------------------------------------------------------------------------------

    def listing(self, key: str | None) -> Iterator[str | bytes]:
        value = self.row.get(key) if key is not None else None
        kind = "image" if key == self.keys.images else "video"
        for source in [] if value is None else value if isinstance(value, list) else [value]:
            yield self.source(kind, source)

    def source(self, kind: str, source: Any) -> str | bytes:
        """A file that exists, or the bytes of a `data:` address."""
        if isinstance(source, Mapping):
            source = source.get("url") or source.get("path")
        if not isinstance(source, str) or not source or "\0" in source:
            raise self.bad(f"{_show(source)} is no {kind}; expected the path of a file")
        if source.startswith("data:") and kind == "image":
            try:
                return base64.b64decode(source.partition(",")[2], validate=True)
            except ValueError as error:  # binascii's, or that there are other characters than ASCII's
                raise self.bad(f"the {kind} {_show(source)} is no base64: {error}") from None
        source = source.removeprefix("file://")
        if "://" in source:
            raise self.bad(f"the {kind} {_show(source)} is an address; nothing is downloaded, name a file")
        path = expanded(source)
        try:
            found = existing(folder / path for folder in self.folders)
        except OSError as error:
            raise self.bad(f"the {kind} {_show(source)} cannot be looked at: {error.strerror}") from None
        if found is None:
            where = (
                ""
                if path.is_absolute()
                else f" (seen from {', '.join(dict.fromkeys(str(f.absolute()) for f in self.folders))})"
            )
            raise self.bad(f"there is no {kind} {_show(source)}{where}")
        return str(found)


def _tag_for(tag: Any) -> str:
    known = {
        "system": "system_tag", "user": "user_tag", "human": "user_tag", "assistant": "assistant_tag", "gpt": "assistant_tag",
        "observation": "observation_tag", "tool": "observation_tag", "function_call": "function_tag",
    }  # fmt: skip
    key = known.get(tag) if isinstance(tag, str) else None
    return (
        f'"{key}": "{tag}"' if key else "user_tag, assistant_tag, system_tag, observation_tag or function_tag"
    )


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def _shortened(roles: Sequence[str]) -> str:
    return ", ".join(roles) if len(roles) <= 8 else f"{', '.join(roles[:4])}, …, {', '.join(roles[-3:])}"


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
