"""Tiny parts that several files use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_wan_parts import TINY_WAN


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def upstream_wan() -> Callable[..., torch.nn.Module]:
    """Builds diffusers' own class from our field names, by a mapping written down a second time."""
    from diffusers import WanTransformer3DModel

    def build(**changes: Any) -> torch.nn.Module:
        fields = {**TINY_WAN, **changes}
        kind = fields.get("model_type", "t2v")
        embedded = kind in ("i2v", "flf2v")
        return WanTransformer3DModel(
            patch_size=fields["patch_size"],
            num_attention_heads=fields["num_heads"],
            attention_head_dim=fields["hidden_size"] // fields["num_heads"],
            in_channels=fields["in_dim"],
            out_channels=fields["out_dim"],
            text_dim=fields["text_dim"],
            freq_dim=fields["freq_dim"],
            ffn_dim=fields["ffn_dim"],
            num_layers=fields["num_layers"],
            cross_attn_norm=fields.get("cross_attn_norm", True),
            rope_max_seq_len=fields["max_seq_len"],
            image_dim=fields["img_dim"] if embedded else None,
            added_kv_proj_dim=fields["hidden_size"] if embedded else None,
            pos_embed_seq_len=2 * 257 if kind == "flf2v" else None,
        )

    return build


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A word-level tokenizer of 64 entries, saved as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted(
        {
            *["a", "red", "ball", "rolls", "over", "the", "green", "grass"],
            *["two", "cats", "watch", "it", "from", "an", "old", "tree"],
        }
    )
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    ).save_pretrained(folder)
    return folder
