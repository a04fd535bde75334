"""The auxiliary loss of routers against transformers' function."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mm_core.training.tasks.router_loss import router_losses

BATCH, LENGTH, EXPERTS, TOP_K = 3, 5, 8, 2


def logits(layers: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(BATCH * LENGTH, EXPERTS, generator=generator, requires_grad=True) for _ in range(layers)
    )


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("padded", [False, True])
def test_each_sample_has_the_loss_that_transformers_gives_it_alone(padded):
    given = logits()
    mask = MASK if padded else torch.ones_like(MASK)
    found = router_losses(given, TOP_K, mask)
    wanted = torch.stack(
        [
            load_balancing_loss_func(
                tuple(layer.view(BATCH, LENGTH, EXPERTS)[i] for layer in given),
                EXPERTS,
                TOP_K,
                mask[i : i + 1] if padded else None,
            )
            for i in range(BATCH)
        ]
    )
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), given),
        torch.autograd.grad(wanted.square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_an_even_load_has_the_least_loss_and_one_expert_for_all_the_greatest():
    even = torch.zeros(1 * 4, 4) + 1e-3 * torch.eye(4)  # each token to another expert
    one = torch.zeros(4, 4)
    one[:, 0] = 100.0
    mask = torch.ones(1, 4)
    assert router_losses([even], 1, mask).item() == pytest.approx(1, abs=1e-3)
    assert router_losses([one], 1, mask).item() == pytest.approx(4)


def test_a_sample_without_tokens_has_no_loss():
    mask = torch.zeros_like(MASK)
    mask[0] = 1
    found = router_losses(logits(), TOP_K, mask)
    assert found[0] > 0
    assert found[1:].tolist() == [0, 0]
