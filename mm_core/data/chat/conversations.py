"""A conversation in transformers' form, with its pictures and tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PICTURES = ("image", "video")
"""Kinds of pictures."""


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: in transformers' form. The system prompt may be first; then prompts (`user`, or results of `tool`s) and
            replies (`assistant`) take turns, and a reply is last.
        images, videos: their sources, in the order of their placeholders in `messages`.
        tools: JSON schemas of the functions that the model may call, or None.
        origin: file, line and number of the row.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str | bytes, ...]
    videos: tuple[str, ...]
    tools: tuple[Mapping[str, Any], ...] | None
    origin: str

    @cached_property
    def replies(self) -> tuple[int, ...]:
        """Places of the replies in `messages`."""
        return tuple(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    def part(self, first: int, end: int) -> Conversation:
        """Return the turns from `first` until before `end`, with the system prompt."""
        begin = self.replies[first - 1] + 1 if first else 0
        system = self.messages[:1] if begin and self.messages[0]["role"] == "system" else ()
        last = self.replies[end - 1] + 1
        kept: dict[str, tuple[Any, ...]] = {}
        for kind, sources in (("image", self.images), ("video", self.videos)):
            before, inside = (
                count_pictures(part, kind) for part in (self.messages[:begin], self.messages[begin:last])
            )
            kept[kind] = sources[before : before + inside]
        return Conversation(
            (*system, *self.messages[begin:last]), kept["image"], kept["video"], self.tools, self.origin
        )


def count_pictures(messages: Sequence[Mapping[str, Any]], kind: str | None = None) -> int:
    """Return how many images or videos (`kind`; None: both) messages have."""
    parts = (
        part for message in messages if isinstance(message["content"], list) for part in message["content"]
    )
    return sum(part["type"] == kind if kind else part["type"] in PICTURES for part in parts)
