"""Embeddings that know the mean of their prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_registry.errors import UserError


class ToyText(nn.Module):
    """Ids below `vocab_size` to embeddings `[B, L, width]`."""

    def __init__(self, *, vocab_size: int = 16, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)

    @classmethod
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype | None = None, **fields: Any) -> ToyText:
        if not Path(folder).is_dir():
            raise UserError(f"toy_text: {folder} is no folder")
        return cls(**fields).to(dtype or torch.float32)

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.table(input_ids)
        keep = attention_mask.unsqueeze(-1).to(words.dtype)
        mean = (words * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
        return self.mix(words + mean), attention_mask
