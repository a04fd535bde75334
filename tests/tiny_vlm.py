"""Tiny Qwen3-VL networks, dense and of experts, with tokenizer, chat template and image settings: folders as the hub has
them, and batches of texts, images and videos.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""The first ids, in this order."""
END, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = range(7)
VOCABULARY = 512
PATCH, MERGE, TEMPORAL = 16, 2, 2
"""Pixels of a patch's side, patches of a merged one's side, frames of a patch: the published models' numbers."""
VALUES = 3 * TEMPORAL * PATCH * PATCH
"""Numbers of a patch, as the processor makes it."""
IGNORED = -100

# A licence is a text of some length that nobody edits, so the tokenizer stays as it is.
_TEXT = Path(__file__).parents[1] / "mm_plugins" / "qwen3vl" / "LICENSE"
_SENTENCES = (
    "Describe this image in one sentence.",
    "What is shown in this picture? A cat sits on a chair. A red ball rolls over the green grass.",
    "You are a helpful assistant. What happens in the video? The dog runs to the left, then it jumps.",
    "system user assistant tool <0.5 seconds> <1.0 seconds> <12.3 seconds>",
)

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content or [] -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- parts(messages[0].content) + '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + parts(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + parts(message.content) + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + parts(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{{- function.arguments if function.arguments is string else function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + parts(message.content) + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
"""Turns as Qwen3-VL writes them, tools in fewer words."""

_TEXT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
# No side of an expert's matrix is as long as another: transformers tells them apart by their lengths.
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}


def tiny_qwen3_vl(
    moe: bool = False, layers: int = 2, *, vision: Mapping[str, Any] | None = None, **text: Any
) -> Any:
    """The configuration of a network of some 0.2 million parameters.

    Args:
        moe: whether layers have 8 experts, of which 2 see each token.
        layers: of the text model, at least as many as the vision tower has deepstack mergers (2).
        vision: other values of `vision_config`.
        text: other values of `text_config`, such as `hidden_size` or `mlp_only_layers`.
    """
    text_config = {
        **_TEXT_SIZES,
        **(_EXPERTS if moe else {}),
        "num_hidden_layers": layers,
        "bos_token_id": END,
        "eos_token_id": IM_END,
        **text,
    }
    vision_config = {**_VISION, "out_hidden_size": text_config["hidden_size"], **(vision or {})}
    cls = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    config: Any = cls(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=text_config["tie_word_embeddings"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    config.architectures = [_network_class(config).__name__]
    return config


def network_of(config: Any, seed: int | None = 0, **options: Any) -> Any:
    """transformers' own network of a configuration, in fp32 and in training mode.

    Args:
        seed: of its random weights; None: torch's global generator goes on.
        options: of `_from_config`, such as `attn_implementation`; its default here is `sdpa`.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network: nn.Module = _network_class(config)._from_config(
            config, **{"attn_implementation": "sdpa", **options}
        )
    return network.train()


def _network_class(config: Any) -> Any:
    moe = isinstance(config, Qwen3VLMoeConfig)
    return Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration


@functools.cache
def tokenizer() -> Any:
    """Byte-level BPE of at most `VOCABULARY` entries; `SPECIAL_TOKENS` are the first. One object for all: do not change it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*_SENTENCES, *_TEXT.read_text().splitlines()], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL_TOKENS[END],
        eos_token=SPECIAL_TOKENS[IM_END],
        model_max_length=4096,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def preprocessor_config(**changes: Any) -> dict[str, Any]:
    """What preprocessor_config.json says: images of 32 × 32 to 128 × 128 pixels, that is 1 to 16 tokens."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        **changes,
    }


def video_preprocessor_config(**changes: Any) -> dict[str, Any]:
    """What video_preprocessor_config.json says: 2 frames a second, 4 to 8 of them."""
    return {
        "video_processor_type": "Qwen3VLVideoProcessor",
        **{k: v for k, v in preprocessor_config().items() if k != "image_processor_type"},
        "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64},
        "fps": 2,
        "min_frames": 4,
        "max_frames": 8,
        **changes,
    }


def folder(
    path: Path,
    *,
    moe: bool = False,
    layers: int = 2,
    weights: bool = False,
    chat: bool = True,
    seed: int = 0,
    config: Any = None,
    **text: Any,
) -> Path:
    """Write a folder as the hub has it, and return its path.

    Args:
        weights: random ones too, of `seed`, in fp32.
        chat: tokenizer, chat template and settings of images and videos too.
        config: of `tiny_qwen3_vl`; made of the other arguments if None.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = config if config is not None else tiny_qwen3_vl(moe, layers, **text)
    if weights:
        network_of(config, seed).save_pretrained(path)
    else:
        config.save_pretrained(path)
    if chat:
        tokenizer().save_pretrained(path)
        for name, values in (
            ("preprocessor_config", preprocessor_config()),
            ("video_preprocessor_config", video_preprocessor_config()),
            ("generation_config", {"eos_token_id": [IM_END, END], "pad_token_id": END, "do_sample": False}),
        ):
            (path / f"{name}.json").write_text(json.dumps(values))
    return path


# -- batches ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[tuple[str, tuple[int, int, int]], ...]] = {
    "text": (),
    "image": (("image", (1, 4, 4)),),
    "two_images": (("image", (1, 2, 4)), ("image", (1, 4, 2))),
    "video": (("video", (2, 4, 4)),),
}
"""Kind of a sample -> its images and videos: grids of patches (frames, rows, columns)."""


def sample(kind: str = "text", texts: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """One sample: a few tokens, the images or videos of its kind, and `texts` tokens that are learnt.

    Returns:
        `input_ids`, `labels`, `mm_token_type_ids` `[S]`; `pixel_values` `[P, VALUES]` fp32, `image_grid_thw` `[n, 3]` and the
        same two of videos where it has any.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (count,), generator=generator).tolist()

    ids, types = [IM_START, *words(3)], [0] * 4
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for medium, (frames, rows, columns) in KINDS[kind]:
        pad, type = (IMAGE, 1) if medium == "image" else (VIDEO, 2)
        tokens = rows * columns // MERGE**2
        for _ in range(frames):  # a time before each frame of a video, as the processor writes it
            before = words(2) if medium == "video" else []
            ids += [*before, VISION_START, *[pad] * tokens, VISION_END]
            types += [0] * (len(before) + 1) + [type] * tokens + [0]
        grids[medium].append((frames, rows, columns))
    learnt = [*words(texts - 1), IM_END]
    made = {
        "input_ids": torch.tensor(ids + learnt),
        "labels": torch.tensor([IGNORED] * len(ids) + learnt),
        "mm_token_type_ids": torch.tensor(types + [0] * len(learnt)),
    }
    for medium, values, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[medium]:
            made[grid] = torch.tensor(grids[medium])
            patches = int(made[grid].prod(1).sum())
            made[values] = torch.randn(patches, VALUES, generator=generator)
    return made


def collate(
    samples: Iterable[Mapping[str, torch.Tensor]], length: int | None = None
) -> dict[str, torch.Tensor]:
    """A batch as the language task takes it: sequences padded on the right (to `length`), images and videos one after
    another.
    """
    samples = list(samples)
    length = length or max(len(one["input_ids"]) for one in samples)
    made: dict[str, torch.Tensor] = {}
    for name, fill in (("input_ids", END), ("labels", IGNORED), ("mm_token_type_ids", 0)):
        rows = [
            torch.nn.functional.pad(one[name], (0, length - len(one[name])), value=fill) for one in samples
        ]
        made[name] = torch.stack(rows)
    lengths = torch.tensor([len(one["input_ids"]) for one in samples])
    made["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if parts := [one[name] for one in samples if name in one]:
            made[name] = torch.cat(parts)
    made["sample_index"] = torch.arange(len(samples))
    return made


def batch(*kinds: str, seed: int = 0, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of one sample of each kind (`text`, `image`, `two_images`, `video`; all four without), of different
    lengths.
    """
    kinds = kinds or tuple(KINDS)
    return collate((sample(kind, 5 + 2 * i, 1000 * seed + i) for i, kind in enumerate(kinds)), length)
