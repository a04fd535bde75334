"""Text encoders against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from tiny_wan_parts import TINY_T5

from mm_core.models import text_encoder_config, text_encoders
from mm_core.models.protocols import TextEncoder
from mm_registry.errors import UserError

TINY_CLIP: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "projection_dim": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "eos_token_id": 1,
}
T5_FAMILY = [
    ("T5", transformers.T5EncoderModel, transformers.T5Config),
    ("MT5", transformers.MT5EncoderModel, transformers.MT5Config),
    ("UMT5", transformers.UMT5EncoderModel, transformers.UMT5Config),
]


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    ids[0, 5:], mask[0, 5:] = 0, 0
    ids[0, 4], ids[1, 8] = 1, 1
    return ids, mask


def same_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    theirs.load_state_dict(ours.model.state_dict(), strict=True)


@torch.no_grad()
@pytest.mark.parametrize(("name", "model_class", "config_class"), T5_FAMILY)
def test_t5_family_equals_transformers(
    name: str, model_class: Any, config_class: Any, tokens: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ours = getattr(text_encoders, name)(config=TINY_T5).eval()
    theirs = model_class(config_class(**TINY_T5)).eval()
    same_weights(theirs, ours)
    embeddings, mask = ours.encode(*tokens)
    expected = theirs(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state
    assert embeddings.shape == (2, 9, 24)
    assert torch.equal(embeddings, expected)
    assert torch.equal(mask, tokens[1])
    assert isinstance(ours, TextEncoder)


@torch.no_grad()
def test_mask_and_hidden_states(tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours = text_encoders.UMT5(config=TINY_T5, output_key="hidden_states", hidden_state_skip_layer=1).eval()
    theirs = ours.model(input_ids=tokens[0], attention_mask=tokens[1], output_hidden_states=True)
    assert torch.equal(ours.encode(*tokens)[0], theirs.hidden_states[-2])
    ours.use_attention_mask = False
    blind = ours.model(input_ids=tokens[0], output_hidden_states=True)
    assert torch.equal(ours.encode(*tokens)[0], blind.hidden_states[-2])
    assert not torch.equal(blind.hidden_states[-2], theirs.hidden_states[-2])
    ours.hidden_state_skip_layer = 3
    with pytest.raises(UserError, match="there are 3"):
        ours.encode(*tokens)


@torch.no_grad()
def test_clip_and_its_pooled_outputs(tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    clip = text_encoders.CLIP(config=TINY_CLIP).eval()
    theirs = clip.model(input_ids=tokens[0], attention_mask=tokens[1])
    assert torch.equal(clip.encode(*tokens)[0], theirs.last_hidden_state)
    clip.output_key = "pooler_output"
    embeddings, mask = clip.encode(*tokens)
    assert torch.equal(embeddings, theirs.pooler_output.unsqueeze(1))
    assert mask.tolist() == [[1], [1]]
    projected = text_encoders.CLIPWithProjection(config=TINY_CLIP, output_key="text_embeds").eval()
    expected = projected.model(input_ids=tokens[0], attention_mask=tokens[1]).text_embeds
    assert torch.equal(projected(*tokens)[0], expected.unsqueeze(1))
    assert projected(*tokens)[0].shape == (2, 1, 12)


def test_pretrained_folder(tmp_path: Path, tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    source = text_encoders.UMT5(config=TINY_T5).eval()
    source.model.save_pretrained(tmp_path)
    loaded = text_encoders.UMT5.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(*tokens)[0], source.encode(*tokens)[0])
    assert loaded.dtype is torch.float32
    assert text_encoders.UMT5.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype is torch.bfloat16
    with pytest.raises(UserError, match="remove config"):
        text_encoders.UMT5.from_pretrained(tmp_path, config=TINY_T5)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    text_encoders.UMT5(config=TINY_T5).model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("SelfAttention.q.weight"))
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=lost.replace(".", r"\.")):
        text_encoders.UMT5.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "config"),
        ({"config": TINY_T5, "output_key": "text_embeds"}, "text_embeds"),
        ({"config": TINY_T5, "output_key": "hidden_states"}, "hidden_state_skip_layer"),
        ({"config": TINY_T5, "ucg_rate": 0.1}, "ucg_rate"),
    ],
)
def test_what_it_cannot_do_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        text_encoders.UMT5(**fields)


def test_config_fields_are_transformers_fields() -> None:
    """The torch-free classes cannot go stale: every field is one of every config class that it stands for."""
    t5 = set(text_encoder_config.T5NetworkConfig.model_fields)
    for _, _, config_class in T5_FAMILY:
        assert t5 <= set(config_class().to_dict()), config_class
    assert set(text_encoder_config.CLIPTextNetworkConfig.model_fields) <= set(
        transformers.CLIPTextConfig().to_dict()
    )
    assert text_encoder_config.T5NetworkConfig.model_validate(TINY_T5).effective().items() >= TINY_T5.items()
    assert (
        text_encoder_config.CLIPTextNetworkConfig.model_validate(TINY_CLIP).effective().items()
        >= TINY_CLIP.items()
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"output_key": "hidden_states"}, "belong together"),
        ({"hidden_state_skip_layer": 1}, "belong together"),
        ({"ucg_rate": 0.1}, "dropped where they are read"),
        ({"config": {"d_modle": 3}}, "d_modle"),
        ({"output_key": "pooler_output"}, "last_hidden_state"),
    ],
)
def test_config_refuses(config: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        text_encoder_config.T5Config.model_validate(config)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused() -> None:
    small = text_encoders.UMT5(config={**TINY_T5, "vocab_size": 40})
    clip = text_encoders.CLIP(config=TINY_CLIP)
    text_encoders.check_vocabulary(small, 40)
    text_encoders.check_vocabulary(torch.nn.Linear(1, 1), 10**6)  # a plugin's own encoder
    said = r"^text_encoder: its vocabulary has 40 .* tokenizer_config\.from_pretrained has 41 ids"
    with pytest.raises(UserError, match=said):
        text_encoders.check_vocabulary(small, 41, tokenizer="tokenizer_config")
    with pytest.raises(UserError, match=r"^text_encoder\.1: its vocabulary has 40 "):
        text_encoders.check_vocabulary(torch.nn.ModuleList([clip, small]), 64)
