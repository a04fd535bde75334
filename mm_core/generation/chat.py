"""A chat model that replies: texts, images and videos in, text out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, TextStreamer

from mm_core.data.chat.protocol import ChatTemplate
from mm_core.data.errors import DataError
from mm_core.random import keyed_seed
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.generation.chat_requests import ChatRequest

_NOT_OF_NETWORK = ("learnt",)
_SAMPLING = ("temperature", "top_p", "top_k")
_MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None: as generation_config.json of the model's folder says.

    Attributes:
        max_new_tokens: of a reply; 512 where the folder says nothing either.
        temperature: logits are divided by it; 0: the likeliest token each time.
        top_p: only the likeliest tokens are drawn from, those that have this share together.
        top_k: only this many are drawn from; 0: all.
        repetition_penalty: logits of tokens that came already are divided by it (Keskar et al., arXiv:1909.05858).
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """Return a copy of the folder's settings with these in it."""
        config = copy.deepcopy(base)
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.temperature == 0:
            given |= {"do_sample": False, **dict.fromkeys(_SAMPLING)}
        elif any(name in given for name in _SAMPLING):
            given["do_sample"] = True
        elif not config.do_sample:  # transformers would warn of what has no effect then
            given |= dict.fromkeys(_SAMPLING)
        if "max_new_tokens" not in given and config.max_new_tokens is None:
            given["max_new_tokens"] = _MAX_NEW_TOKENS
        config.update(**given)
        return config


@dataclass(frozen=True)
class Reply:
    """What was replied.

    Attributes:
        text: without special tokens.
        prompt_tokens, tokens: how many there were of both.
        finished: whether the model ended it; else `max_new_tokens` did.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finished: bool


class Chat:
    """A network and its chat template.

    Args:
        network: of transformers, with its weights, in eval mode.
        template: of the same model.
        settings: generation_config.json of the folder.
        device: where the network is.
    """

    def __init__(
        self, network: nn.Module, template: ChatTemplate, settings: GenerationConfig, device: torch.device
    ) -> None:
        self.network: Any = network
        self.template, self.device = template, device
        self.settings = settings
        tokenizer = template.tokenizer
        if self.settings.eos_token_id is None:
            self.settings.eos_token_id = tokenizer.eos_token_id
        if self.settings.pad_token_id is None:
            self.settings.pad_token_id = tokenizer.pad_token_id
        network.generation_config = self.settings

    def reply(
        self,
        request: ChatRequest,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        index: int = 0,
        enable_thinking: bool | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Reply to a conversation.

        Args:
            seed, index: what is drawn depends on the two alone, not on the requests before.
            enable_thinking: whether the reply begins with thoughts, where the template has them.
            on_text: called with each piece of text as it comes.

        Raises:
            DataError: a picture cannot be read, or the template cannot render the conversation.
            UserError: the conversation is longer than the model reads.
        """
        try:
            text = self.template.render(
                request.messages,
                tools=request.tools,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
            )
            made: Any = self.template.encode([(text, False)], request.images, request.videos)
        except DataError as error:
            raise DataError(f"{request.origin}: {error}") from error
        ids = made["input_ids"]
        settings = (sampling or Sampling()).over(self.settings)
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"{request.origin}: it has {len(ids)} tokens, and the model reads {limit}; shorten it, or give "
                "--image-max-pixels"
            )
        inputs = {
            # Pictures of a conversation have no axis of the batch.
            name: (value if name.startswith(("pixel_", "image_", "video_")) else value[None]).to(self.device)
            for name, value in made.items()
            if name not in _NOT_OF_NETWORK
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        streamer = None if on_text is None else _Streamer(self.template.tokenizer, on_text)
        cpu = self.device.type == "cpu"
        forked: Any = {"devices": []} if cpu else {"devices": [self.device], "device_type": self.device.type}
        # transformers draws from torch's global generators, which are given back as they were.
        with torch.inference_mode(), torch.random.fork_rng(**forked):
            torch.manual_seed(keyed_seed(seed, "reply", index))
            output = self.network.generate(**inputs, generation_config=settings, streamer=streamer)
        new = output[0, len(ids) :].tolist()
        ends = settings.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        decoded: str = self.template.tokenizer.decode(new, skip_special_tokens=True)
        return Reply(decoded, len(ids), len(new), bool(new) and new[-1] in ends)


class _Streamer(TextStreamer):
    """Hands text on as soon as whole words are there."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)
