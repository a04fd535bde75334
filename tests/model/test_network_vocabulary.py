"""A tokenizer with ids that the network has no embedding for."""

from __future__ import annotations

import pytest
import torch

from mm_core.models.transformers_model import TransformersModel
from mm_core.models.vocabulary import check_network_vocabulary
from mm_registry.errors import UserError
from tests import tiny_vlm


def test_too_many_ids() -> None:
    with torch.device("meta"):
        model = TransformersModel(tiny_vlm.network_of(tiny_vlm.tiny_qwen3_vl(), seed=None))
    check_network_vocabulary(model, tiny_vlm.VOCABULARY)
    with pytest.raises(UserError, match=r"has 512 embeddings .* has 513 ids; name the same folder in both"):
        check_network_vocabulary(model, tiny_vlm.VOCABULARY + 1)
