"""What of a conversation is learnt, and what of one that is too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_core.data.chat.conversations import Conversation, count_pictures
from mm_core.data.chat.protocol import ChatTemplate, Segment
from mm_core.data.errors import DataError, UnreadableSampleError

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not learnt, as in transformers."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a conversation a sequence has room for.

    Attributes:
        first, end: the turns (a prompt and its reply) from `first` until before `end`.
        length: tokens; those of the last reply that go beyond are cut.
    """

    first: int
    end: int
    length: int


class ChatEncoder:
    """Conversations to samples: text of the chat template, tokens, labels.

    Learnt is what the model has to say: each reply after the template's beginning of one, with the end of the turn, which the
    model has to say as well. The prompts (system, user, results of tools) are not, nor is what stands for pictures.

    A conversation that is longer than `cutoff` loses whole turns at its end (with `mask_history` at its beginning, for the
    last reply is what is learnt), until at most its last reply sticks out, which is cut. Prompts are never cut: half a
    picture, or half a question, teaches nothing.

    Args:
        template: of the chat.
        cutoff: tokens of a sequence, at most.
        train_on_prompt: prompts are learnt too.
        mask_history: only the last reply is learnt.
        enable_thinking: whether replies begin with thoughts; None: as the template does. Empty thoughts that the template
            puts before a reply are part of the prompt.
    """

    def __init__(
        self,
        template: ChatTemplate,
        cutoff: int,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        enable_thinking: bool | None = None,
    ) -> None:
        self.template, self.cutoff = template, cutoff
        self.train_on_prompt, self.mask_history = train_on_prompt, mask_history
        self.enable_thinking = enable_thinking
        self._told = False

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Return the pieces of the rendered text, in order, each with whether it is learnt.

        Raises:
            UnreadableSampleError: the template cannot render it, or writes a reply otherwise once others follow it.
        """
        messages, replies = conversation.messages, conversation.replies
        pieces: list[Segment] = []
        done = ""  # what the template writes of the messages so far
        for number, reply in enumerate(replies[-1:] if self.mask_history else replies):
            if number and not self._render(conversation, messages[:reply]).startswith(done):
                raise UnreadableSampleError(
                    conversation.origin,
                    f"the chat template writes reply {number} otherwise once others follow it (it may take thoughts out of "
                    'earlier replies), so only the last one can be learnt as it will be written: set "mask_history": true',
                )
            prompt = self._render(conversation, messages[:reply], begin_reply=True)
            whole = self._render(conversation, messages[: reply + 1])
            said = whole.removeprefix(prompt)
            if len(said) == len(whole):
                # The template puts empty thoughts before a reply that it does not write into one that is there.
                said = whole.removeprefix(
                    self._render(conversation, messages[:reply], begin_reply=True, as_is=True)
                )
            if len(said) == len(whole) or not prompt.startswith(done):
                raise UnreadableSampleError(
                    conversation.origin,
                    f"the chat template begins reply {number + 1} otherwise than it asks for one (add_generation_prompt), so it "
                    "cannot be told what is learnt; use another template",
                )
            pieces += [(prompt.removeprefix(done), self.train_on_prompt), (said, True)]
            done = whole
        return [piece for piece in pieces if piece[0]]

    def _render(
        self,
        conversation: Conversation,
        messages: Sequence[Any],
        *,
        begin_reply: bool = False,
        as_is: bool = False,
    ) -> str:
        try:
            return self.template.render(
                messages,
                tools=conversation.tools,
                add_generation_prompt=begin_reply,
                enable_thinking=None if as_is else self.enable_thinking,
            )
        except UnreadableSampleError:
            raise
        except DataError as error:
            raise UnreadableSampleError(conversation.origin, str(error)) from error

    def fit(self, conversation: Conversation) -> Kept:
        """Return what of a conversation there is room for; no pixel is read.

        Raises:
            UnreadableSampleError: its first prompt alone is too long, or it cannot be encoded.
        """
        turns = len(conversation.replies)
        whole = length = self._length(conversation, self.segments(conversation))
        for left in range(turns, 0, -1):
            first, end = (turns - left, turns) if self.mask_history else (0, left)
            part = conversation.part(first, end)
            segments = self.segments(part)
            if left < turns:
                length = self._length(part, segments)
            if length <= self.cutoff:
                return Kept(first, end, length)
            if not count_pictures(part.messages[-1:]) and self._length(part, segments[:-1]) < self.cutoff:
                return Kept(first, end, self.cutoff)
        raise UnreadableSampleError(
            conversation.origin,
            f"it has {whole} tokens, and the {'last' if self.mask_history else 'first'} prompt alone fills the sequence "
            f"of {self.cutoff}; raise --seq-length, or lower the limits of pixels",
        )

    def _length(self, conversation: Conversation, segments: Sequence[Segment]) -> int:
        with _Named(conversation.origin):
            return self.template.length(segments, conversation.images, conversation.videos)

    def encode(self, conversation: Conversation, kept: Kept | None = None) -> dict[str, Tensor]:
        """Return one sample.

        Args:
            kept: what `fit` said of it, if that was asked before.

        Returns:
            `input_ids`, `labels` int64 `[S]` (the ids, or -100), and what `ChatInputs` has of pictures.

        Raises:
            UnreadableSampleError: a picture cannot be read, nothing of it is learnt, or it does not fit.
        """
        if kept is None:
            inputs = self._encode(conversation)
            if len(inputs["input_ids"]) > self.cutoff:
                if not self._told:
                    self._told = True  # once a process
                    log.warning(
                        "%s: it has %d tokens and is shortened to %d (--seq-length); longer ones that follow are not reported",
                        conversation.origin, len(inputs["input_ids"]), self.cutoff,
                    )  # fmt: skip
                kept = self.fit(conversation)
                inputs = self._encode(conversation.part(kept.first, kept.end))
        else:
            inputs = self._encode(conversation.part(kept.first, kept.end))
        return self._labelled(conversation, inputs)

    def prepare(self, conversation: Conversation) -> tuple[Kept, dict[str, Tensor] | None]:
        """Return what `fit` says and, of a conversation without pictures, the sample that `encode` returns.

        Raises:
            UnreadableSampleError: as both.
        """
        if conversation.images or conversation.videos:
            return self.fit(conversation), None
        inputs = self._encode(conversation)
        length = len(inputs["input_ids"])
        if length <= self.cutoff:
            return Kept(0, len(conversation.replies), length), self._labelled(conversation, inputs)
        kept = self.fit(conversation)
        return kept, self.encode(conversation, kept)

    def _labelled(self, conversation: Conversation, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs.pop("input_ids")[: self.cutoff]
        learnt = inputs.pop("learnt")[: self.cutoff]
        labels = torch.where(learnt, ids, IGNORED)
        labels[:1] = IGNORED  # nothing stands before it, and in a packed sequence another sample does
        if not bool((labels != IGNORED).any()):
            raise UnreadableSampleError(
                conversation.origin, "none of its tokens is learnt: its replies are empty"
            )
        sample = {"input_ids": ids, "labels": labels, **inputs}
        if "mm_token_type_ids" in sample:
            kinds, beyond = sample["mm_token_type_ids"].tensor_split([self.cutoff])
            if bool(beyond.any()):
                raise UnreadableSampleError(
                    conversation.origin,
                    "its pictures are larger than when it was prepared; set overwrite_cache: true",
                )
            sample["mm_token_type_ids"] = kinds
        return sample

    def _encode(self, conversation: Conversation) -> dict[str, Tensor]:
        segments = self.segments(conversation)
        with _Named(conversation.origin):
            return dict(self.template.encode(segments, conversation.images, conversation.videos))


class _Named:
    """Puts the row's file and number before what a template says of its pictures."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DataError):
            raise UnreadableSampleError(self.origin, str(error)) from error
