"""Qwen3-VL's chat templates: texts, images and videos to the tensors of one sample, as transformers' `Qwen3VLProcessor` makes
them, and without torchvision, which that class needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm_core.data.chat.media import image_size, name_of, read_image
from mm_core.data.chat.protocol import ChatInputs
from mm_core.data.chat.template import TokenizerTemplate
from mm_core.data.errors import DataError, UnreadableSampleError
from mm_plugin_qwen3vl.video import VideoSettings

if TYPE_CHECKING:
    from mm_core.data.chat.protocol import ImageSource, Message, Segment, VideoSource

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_PLACEHOLDER = re.compile(f"({re.escape(IMAGE)}|{re.escape(VIDEO)})")
_TYPES = {IMAGE: 1, VIDEO: 2}

THINK = "<think>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT = re.compile(r"<think>.*?</think>\n*", re.DOTALL)


class _Qwen3VLTemplate(TokenizerTemplate):
    """The folder's own chat template and processor settings.

    Args:
        folder: tokenizer, chat template and preprocessor_config.json.
        image_max_pixels, image_min_pixels: area of an image; default: the folder's.
        video_max_pixels, video_min_pixels: area of one frame; default: the folder's, of all frames together.
        video_fps: frames a second that are taken of a video; default: the folder's.
        video_maxlen: most frames that are taken of a video; default: the folder's.
        options: of `TokenizerTemplate`.

    Raises:
        DataError: as `TokenizerTemplate`; the tokenizer lacks Qwen3-VL's tokens, the settings of images cannot be read, or
            patches are not of the size that the folder's network has.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_max_pixels: int | None = None,
        image_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_min_pixels: int | None = None,
        video_fps: float | None = None,
        video_maxlen: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(folder, **options)
        for name, most in (("image_max_pixels", image_max_pixels), ("video_max_pixels", video_max_pixels)):
            if most is not None and most < 1:
                raise DataError(
                    f"preprocess_parameters.{name} is {most}; the largest area must be at least 1 pixel"
                )
        self._ids = {token: self._special(token) for token in (IMAGE, VIDEO)}
        for token in (VISION_START, VISION_END):
            self._special(token)
        self.images = _image_processor(self.folder, image_min_pixels, image_max_pixels)
        self.videos = VideoSettings.of(
            self.folder,
            min_pixels=video_min_pixels,
            max_pixels=video_max_pixels,
            fps=video_fps,
            max_frames=video_maxlen,
        )
        self._agree_with_network()

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> ChatInputs:
        """Return the tensors of one sample; see `ChatTemplate`."""
        _agree(segments, images, videos)
        pictures = [self._patches(source) for source in images]
        films = [self.videos.read(source) for source in videos]
        grids = [grid for _, grid in pictures]
        ids, learnt, types = self._tokens(segments, grids, [(grid, seconds) for _, grid, seconds in films])
        made: ChatInputs = {
            "input_ids": torch.from_numpy(ids),
            "learnt": torch.from_numpy(learnt & (types == 0)),
        }
        if images or videos:
            made["mm_token_type_ids"] = torch.from_numpy(types)
        if images:
            made["pixel_values"] = torch.cat([values for values, _ in pictures])
            made["image_grid_thw"] = torch.tensor(grids)
        if videos:
            made["pixel_values_videos"] = torch.cat([values for values, _, _ in films])
            made["video_grid_thw"] = torch.tensor([grid for _, grid, _ in films])
        return made

    def length(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> int:
        """Return the number of tokens that `encode` gives, without decoding pictures."""
        _agree(segments, images, videos)
        grids = [self._grid(source) for source in images]
        text, counts = self._expanded(segments, grids, [self.videos.describe(source) for source in videos])
        return len(self.tokenise(text)[0]) + sum(count - 1 for pads in counts.values() for count in pads)

    def _messages(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages)

    def _identity(self) -> Iterator[str]:
        yield from super()._identity()
        yield json.dumps(self.images.to_dict(), sort_keys=True, default=str)
        yield json.dumps(asdict(self.videos), sort_keys=True)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _tokens(
        self,
        segments: Sequence[Segment],
        grids: Sequence[tuple[int, int, int]],
        videos: Sequence[tuple[tuple[int, int, int], list[float]]],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, whether learnt, and kinds (0 text, 1 image, 2 video), `[S]` each."""
        text, counts = self._expanded(segments, grids, videos)
        ids, learnt = self.tokenise(text)
        types, repeats = np.zeros_like(ids), np.ones_like(ids)
        for token, id in self._ids.items():
            places = np.flatnonzero(ids == id)
            if len(places) != len(counts[token]):  # never, for the placeholder is a token of its own
                raise DataError(f"the tokenizer of {self.folder} does not keep {token} whole")
            types[places], repeats[places] = _TYPES[token], counts[token]
        return np.repeat(ids, repeats), np.repeat(learnt, repeats), np.repeat(types, repeats)

    def _expanded(
        self,
        segments: Sequence[Segment],
        grids: Sequence[tuple[int, int, int]],
        videos: Sequence[tuple[tuple[int, int, int], list[float]]],
    ) -> tuple[list[Segment], dict[str, list[int]]]:
        """Segments with the seconds of videos written out, and how often each placeholder in them is repeated: it stays a
        single one, for a run of thousands takes the tokenizer long.
        """
        merged = self.images.merge_size**2
        counts: dict[str, list[int]] = {
            IMAGE: [rows * columns // merged for _, rows, columns in grids],
            VIDEO: [],
        }
        remaining = iter(videos)

        def expand(piece: str) -> str:
            if piece != VIDEO:
                return piece
            (_, rows, columns), seconds = next(remaining)
            counts[VIDEO] += [rows * columns // self.videos.merge_size**2] * len(seconds)
            return "".join(f"<{second:.1f} seconds>{VISION_START}{VIDEO}{VISION_END}" for second in seconds)

        return [("".join(map(expand, _PLACEHOLDER.split(text))), learnt) for text, learnt in segments], counts

    # -- images --------------------------------------------------------------------------------------------------------

    def _patches(self, source: ImageSource) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """fp32 `[P, V]` of an image, and its grid."""
        image = read_image(source)
        made = _guarded(source, lambda: self.images.preprocess(images=[image], return_tensors="pt"))
        time, rows, columns = made["image_grid_thw"][0].tolist()
        return made["pixel_values"], (time, rows, columns)

    def _grid(self, source: ImageSource) -> tuple[int, int, int]:
        height, width = image_size(source)
        patches: int = _guarded(source, lambda: self.images.get_number_of_image_patches(height, width))
        return 1, patches, 1  # its rows times its columns is all that counts here

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _special(self, token: str) -> int:
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise DataError(
                f"the tokenizer of {self.folder} has no token {token}; name a folder of a Qwen3-VL in "
                "preprocess_parameters.model_name_or_path"
            )
        return int(ids[0])

    def _agree_with_network(self) -> None:
        """Patches of another size than the network's would train, on nonsense."""
        file = self.folder / "config.json"
        if not file.is_file():
            return
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            vision: Mapping[str, Any] = config.get("vision_config") or {}
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        for what, settings in (("images", self.images), ("videos", self.videos)):
            for ours, theirs in (
                ("patch_size", "patch_size"),
                ("merge_size", "spatial_merge_size"),
                ("temporal_patch_size", "temporal_patch_size"),
            ):
                value, real = getattr(settings, ours), vision.get(theirs)
                if real is not None and value != real:
                    raise DataError(
                        f"{file} has vision_config.{theirs} {real}, but the settings of {what} in the same folder have "
                        f"{ours} {value}; take both from one published model"
                    )
        for token, key in ((IMAGE, "image_token_id"), (VIDEO, "video_token_id")):
            if key in config and config[key] != self._ids[token]:
                raise DataError(
                    f"{file} has {key} {config[key]}, but {token} is {self._ids[token]} in the tokenizer of the same "
                    "folder; take both from one published model"
                )


class Qwen3VLTemplate(_Qwen3VLTemplate):
    """`qwen3_vl_nothink`: for models that reply at once. `enable_thinking` has no effect."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return the text of a conversation; see `ChatTemplate`."""
        return super().render(messages, tools=tools, add_generation_prompt=add_generation_prompt)


class Qwen3VLThinkingTemplate(_Qwen3VLTemplate):
    """`qwen3_vl`: for models that think before they reply.

    With `enable_thinking` true, a reply without thoughts gets empty ones, which are part of the reply. With false, thoughts
    are taken out of every reply, and the empty ones in their place belong to the prompt: a generation prompt ends with them.
    With None, replies stay as they are written.
    """

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return the text of a conversation; see `ChatTemplate`."""
        if enable_thinking is not None:
            messages = [_thoughtful(one, keep=enable_thinking) for one in messages]
        text = super().render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )
        if add_generation_prompt and enable_thinking is False and not text.endswith(NO_THOUGHT):
            # Where the folder's template begins a thought itself, it is ended; otherwise it is written.
            begun = text.endswith(THINK)
            text += NO_THOUGHT[len(THINK) :] if begun else NO_THOUGHT
        return text


def _thoughtful(message: Message, *, keep: bool) -> Message:
    """A reply that has thoughts, perhaps empty ones; other messages as they are."""
    if message.get("role") != "assistant":
        return message
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if not keep:
        message = {key: value for key, value in message.items() if key != "reasoning_content"}
        parts = [
            {**part, "text": _THOUGHT.sub("", part["text"])} if isinstance(part.get("text"), str) else part
            for part in parts
        ]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if not message.get("reasoning_content") and not any("</think>" in text for text in texts):
        parts = [{"type": "text", "text": NO_THOUGHT}, *parts]
        texts = [NO_THOUGHT, *texts]
    # A template that looks for thoughts in a reply does so in a text, not in a list of parts.
    return {**message, "content": "".join(texts) if len(texts) == len(parts) else parts}


def _agree(segments: Sequence[Segment], images: Sequence[Any], videos: Sequence[Any]) -> None:
    """Raise DataError unless there is a placeholder for each picture."""
    text = "".join(piece for piece, _ in segments)
    for what, token, given in (("image", IMAGE, images), ("video", VIDEO, videos)):
        wanted = text.count(token)
        if wanted != len(given):
            raise DataError(
                f"the text has {_some(wanted, f'placeholder of {what}s', f'placeholders of {what}s')} ({token}), and "
                f"there {'is' if len(given) == 1 else 'are'} {_some(len(given), what, f'{what}s')}; each needs the other"
            )


def _some(count: int, one: str, many: str) -> str:
    return f"{count or 'no'} {one if count == 1 else many}"


def _guarded(source: ImageSource, call: Callable[[], Any]) -> Any:
    """Call transformers' image processor; a shape that it refuses is the image's fault."""
    try:
        return call()
    except ValueError as error:
        raise UnreadableSampleError(name_of(source), str(error)) from error


def _image_processor(folder: Path, least: int | None, most: int | None) -> Any:
    """transformers' processor of images on Pillow and numpy, which needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        made = Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the folder {folder} has no settings of images (preprocessor_config.json): {reason}"
        ) from error
    if least is not None or most is not None:
        # Of two limits that contradict each other, the one that is given counts.
        lower = least if least is not None else made.size["shortest_edge"]
        upper = most if most is not None else max(made.size["longest_edge"], lower)
        made.size = type(made.size)(shortest_edge=max(1, min(lower, upper)), longest_edge=upper)
    return made
