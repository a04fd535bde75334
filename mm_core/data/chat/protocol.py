"""What a chat template promises: from a conversation to text, from text with its pictures to the tensors of one sample.

Templates are entries of `mm_core.chat_templates`, chosen by `basic_parameters.template`. A structural type: a template
needs no base class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Video:
    """Frames that were taken of a video.

    Attributes:
        frames: uint8 RGB `[T, 3, H, W]`.
        indices: which frames of the file they are, ascending, `T` of them.
        fps: frame rate of the file in Hz, so that `indices[i] / fps` is the second at which frame i is shown.
    """

    frames: Tensor
    indices: tuple[int, ...]
    fps: float


Message: TypeAlias = Mapping[str, Any]
"""One message in transformers' form: `role` (`system`, `user`, `assistant`, `tool`), `content` (a text, or a list of parts
`{"type": "text", "text": …}`, `{"type": "image"}`, `{"type": "video"}`), and perhaps `tool_calls`, `reasoning_content`.
"""

Segment: TypeAlias = tuple[str, bool]
"""A piece of a rendered text, and whether it is learnt."""

# Strings: what they name is imported for type checking alone.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image"
"""An image: a path, the bytes of a file, or a decoded one."""
VideoSource: TypeAlias = "str | os.PathLike[str] | Video"
"""A video: a path, or its frames, which are taken as they are."""


class ChatInputs(TypedDict):
    """One sample: S tokens, and for pictures P patches of V values.

    Without pictures the keys of pictures are absent, those of videos without videos.
    """

    input_ids: Tensor  # int64 [S]
    learnt: Tensor  # bool [S]: whether the loss counts the token
    mm_token_type_ids: NotRequired[Tensor]  # int64 [S]: 0 text, 1 image, 2 video
    pixel_values: NotRequired[Tensor]  # fp32 [P, V], of all images one after another
    image_grid_thw: NotRequired[Tensor]  # int64 [images, 3]: patches in time, height, width
    pixel_values_videos: NotRequired[Tensor]  # fp32 [P, V]
    video_grid_thw: NotRequired[Tensor]  # int64 [videos, 3]


@runtime_checkable
class ChatTemplate(Protocol):
    """`CHAT_TEMPLATE_MAPPINGS[id](folder, **preprocess_parameters)`, those without `model_name_or_path`.

    A parameter that is not given or None means what the folder's own files say. An instance can be pickled and is the
    same in every process.
    """

    tokenizer: Any
    """transformers' fast tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides what `render` and `encode` return: tokenizer, template, limits."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return the text of the folder's own chat template, with one placeholder for each image and video.

        Args:
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: whether the text ends with the beginning of a reply.
            enable_thinking: whether replies begin with thoughts, where the template has them; None: as the template does.

        Raises:
            DataError: the template cannot render these messages.
        """
        ...

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> ChatInputs:
        """Return the tensors of one sample.

        Placeholders are expanded within their segments, the whole text is tokenised at once, and a token is learnt if it
        begins in a learnt segment. What stands for pictures is never learnt.

        Args:
            segments: pieces of a rendered text, in order; without anything between them.
            images: one for each placeholder of an image, in order.
            videos: one for each placeholder of a video, in order.

        Raises:
            UnreadableSampleError: an image or a video cannot be read; it names the file.
            DataError: as many pictures as placeholders are needed, or the model takes none.
        """
        ...

    def length(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> int:
        """Return the number of tokens that `encode` gives, from the headers of pictures: no pixel is decoded but the first
        frame of a video.

        Raises:
            UnreadableSampleError, DataError: as `encode`, as far as headers tell.
        """
        ...
