"""The attention backend of a network of diffusers: what is chosen, what is refused, and that results stay the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from mm_core.models import attention_backends
from mm_core.models.attention_backends import set_attention_backend
from mm_core.models.kernels import Computation
from mm_registry.errors import UserError

CPU = Computation(torch.device("cpu"))
HALF = Computation(torch.device("cpu"), torch.bfloat16)


def network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=48,
        num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip


def backends(model: Any) -> set[str | None]:
    return {
        None if (name := block.processor._attention_backend) is None else name.value
        for layer in model.blocks
        for block in (layer.attn1, layer.attn2)
    }


def outputs_and_gradients(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, 16, generator=generator)
    output = model(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("where", [CPU, HALF])
def test_without_a_kernel_of_its_own_a_device_has_torchs(
    where: Computation, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        assert set_attention_backend(model, None, where, "predictor") == "native"
    assert backends(model) == {"native"}
    assert f"predictor: attention on {where} is native" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("asked", ["native", "_native_math"])
def test_outputs_and_every_gradient_are_those_of_the_native_one(asked: str) -> None:
    wanted, model = outputs_and_gradients(network()), network()
    assert set_attention_backend(model, asked, CPU, "predictor") == asked
    assert backends(model) == {asked}
    # The process's own choice, which other networks follow, stays.
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE
    for mine, twin in zip(outputs_and_gradients(model), wanted, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["flash", "sage", "_native_cudnn"])
def test_a_backend_that_does_not_work_here_is_refused(asked: str) -> None:
    with pytest.raises(
        UserError, match=rf"attention_backend {asked} does not work on cpu in bf16.*write native"
    ):
        set_attention_backend(network(), asked, HALF, "predictor")


def test_the_devices_own_is_tried_out_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_backends, "own_attention", lambda device: "cudnn")
    with caplog.at_level(logging.INFO):
        model = network()
        assert set_attention_backend(model, None, HALF, "predictor") == "native"  # there is no cuDNN
        assert set_attention_backend(model, None, CPU, "predictor") == "native"  # nor for fp32 anywhere
    assert "because _native_cudnn does not work there" in caplog.text
    monkeypatch.setitem(attention_backends._OF_DEVICE, "cudnn", "_native_math")
    assert set_attention_backend(model, None, HALF, "predictor") == "_native_math"
    assert backends(model) == {"_native_math"}


def test_what_computes_something_else_or_no_gradient_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    native = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        attention_dispatch, "dispatch_attention_fn", lambda *a, **k: 1.2 * native(*a, backend="native")
    )
    with pytest.raises(UserError, match="differs from native by 2"):
        set_attention_backend(network(), "_native_math", HALF, "predictor")
    monkeypatch.setattr(
        attention_dispatch, "dispatch_attention_fn", lambda *a, **k: native(*a, backend="native").detach()
    )
    with pytest.raises(UserError, match="computes no gradients"):
        set_attention_backend(network(), "_native_math", HALF, "predictor")
    without = Computation(HALF.device, HALF.dtype, gradients=False)
    assert set_attention_backend(network(), "_native_math", without, "predictor") == "_native_math"


def test_a_network_without_such_attentions(caplog: pytest.LogCaptureFixture) -> None:
    assert set_attention_backend(torch.nn.Linear(2, 2), None, CPU, "predictor") is None
    with pytest.raises(UserError, match="no attention of Linear chooses one; remove the key"):
        set_attention_backend(torch.nn.Linear(2, 2), "native", CPU, "predictor")
