"""What a library's constructor computes, computed again for one tensor at a time."""

import copy
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm_core.weights import materialize
from mm_core.weights.recorded import Recorded, recorded

_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=True
    )
    return transformers.T5ForConditionalGeneration(config)


def _siglip() -> Any:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.Siglip2VisionModel(config)


def _qwen3_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    )


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        **_SMALL, text_dim=32, freq_dim=32, ffn_dim=64, rope_max_seq_len=16
    )


def _hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        **_SMALL, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        **_SMALL, text_embed_dim=16, time_embed_dim=16, sample_width=8, sample_height=8, sample_frames=5
    )


def _controlnet() -> Any:
    return diffusers.SD3ControlNetModel(
        **_SMALL, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, sample_size=8
    )


@pytest.mark.parametrize("make", [_t5, _siglip, _qwen3_vl, _wan, _hunyuan, _cogvideox, _controlnet])
def test_a_model_from_meta_is_like_one_that_was_constructed(make):
    with torch.device("meta"):
        model = make()
    materialize(model, "cpu", 3)
    torch.manual_seed(0)
    expected = make()
    buffers = dict(expected.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    parameters = dict(expected.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    for name, parameter in model.named_parameters():
        other = parameters[name].detach()
        assert (parameter.dtype, parameter.shape) == (other.dtype, other.shape)
        if other.numel() < 2 or other.std() == 0:
            assert torch.equal(parameter, other), name
        else:  # as often as not a few hundred values
            close = pytest.approx(other.std().item(), rel=5 / other.numel() ** 0.5)
            assert parameter.std().item() == close, name
            assert abs(parameter.mean() - other.mean()) < 7 * other.std() / other.numel() ** 0.5, name


class Net(ModelMixin, ConfigMixin):
    """The ways in which constructors make values."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.copied, self.last = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            self.copied.weight.copy_(self.first.weight)
        nn.init.zeros_(self.last.weight)
        nn.init.trunc_normal_(self.last.bias, std=3.0, a=-1.0, b=1.0)
        nn.init.orthogonal_(self.first.weight)
        self.gate = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.row = nn.Parameter(torch.ones(4, width))
        self.row.data[2] *= 5
        steps = torch.arange(int(torch.ones(width, device="cpu").sum().item()))  # a value is needed at once
        self.register_buffer("angles", torch.outer(steps, 1 / steps.add(1.0)).cos(), persistent=False)
        self.register_buffer("listed", torch.tensor([1.0, 2.0]) + torch.zeros(2), persistent=False)
        self.register_buffer("given", torch.tensor([3, 4]), persistent=False)


def test_every_way_in_which_a_constructor_makes_values():
    with torch.device("meta"):
        net = Net()
    materialize(net, "cpu", 0)
    expected = Net()
    assert torch.allclose(net.first.weight @ net.first.weight.T, torch.eye(8), atol=1e-5)
    assert not net.last.weight.any()
    assert net.last.bias.abs().max() <= 1
    assert net.last.bias.std() > 0.2
    for name in ("angles", "listed", "given", "row"):
        assert torch.equal(getattr(net, name), getattr(expected, name)), name


def test_values_depend_on_the_seed_alone_and_a_copy_stays_a_copy():
    def values(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + 17)
        before = torch.get_rng_state()
        with torch.device("meta"):
            net = Net()
        materialize(net, "cpu", seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [net.first.weight, net.copied.weight, net.gate, net.last.bias]

    record = Recorded(lambda: Net())
    one, two = (
        [record.value(f"{n}.bias", torch.Size([8]), 0) for n in names] for names in (("first",), ("copied",))
    )
    assert not torch.equal(one[0], two[0])
    for a, b, other in zip(values(0), values(0), values(1), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)


def test_a_copy_of_a_parameter_has_its_values():
    class Pair(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(4, 4)
            self.teacher = copy.deepcopy(self.student)

    with torch.device("meta"):
        pair = Pair()
    materialize(pair, "cpu", 0)
    assert torch.equal(pair.student.weight, pair.teacher.weight)


def test_modules_that_were_put_in_later_fill_themselves():
    with torch.device("meta"):
        net = Net()
        net.first = nn.Linear(8, 3)
        net.extra = nn.Linear(8, 5)
    materialize(net, "cpu", 0)
    assert 0 < net.first.weight.std() < 1
    assert 0 < net.extra.weight.std() < 1
    assert not net.last.weight.any()


def test_what_no_library_constructs_has_no_record():
    class Refuses(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3).nonzero())

    assert recorded(nn.Linear(2, 2)) is None
    with torch.device("cpu"):
        assert recorded(Refuses()) is None
