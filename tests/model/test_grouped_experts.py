"""The experts of a layer as one grouped product, and as one product each."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mm_core.planning.recorder import Recorder
from mm_core.sharding import grouped
from mm_core.sharding.grouped import (
    even_load,
    evenly,
    grouped_experts,
    grouped_product,
    is_grouped_form,
    product_for,
    separate_products,
    tokens_of_experts,
)


def experts(implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Qwen3MoeExperts:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=4)
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


# The experts of rows: all of them, one without rows, all rows at the last one, one row.
CHOICES = [[0, 3, 1, 2, 1, 0, 3, 3], [3, 0, 0, 1], [3, 3, 3], [2]]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("product", [grouped_product, separate_products])
def test_values_and_gradients_are_those_of_transformers(choice, product, monkeypatch):
    """Its eager loop, one expert after the other."""
    expert = torch.tensor(choice)
    module = experts("eager")
    rows = torch.randn(len(choice), 16, requires_grad=True)
    weight = torch.randn(len(choice), 16)
    wanted = module(rows, expert.unsqueeze(1), torch.ones(len(choice), 1))
    gradients = torch.autograd.grad((wanted * weight).sum(), [rows, *module.parameters()])

    monkeypatch.setattr(grouped, "product_for", lambda *_: product)
    found = grouped_experts(module, rows, expert, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), [rows, *module.parameters()]), gradients, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_product_runs_is_found_out_and_said(dtype, caplog):
    grouped._tell.cache_clear()
    caplog.set_level("INFO", "mm_core")
    module = experts(dtype=dtype)
    rows = torch.randn(5, 16, dtype=dtype)
    product = product_for(rows, module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2))
    product_for(rows, module.gate_up_proj.transpose(1, 2))
    assert product is grouped_product
    assert [record.message for record in caplog.records] == [
        "experts: grouped matrix products (torch.nn.functional.grouped_mm)"
    ]


def test_sizes_that_the_kernel_refuses_take_the_other_way(caplog):
    """Rows of 5 bf16 values are not aligned as the kernel wants them."""
    grouped._tell.cache_clear()
    caplog.set_level("INFO", "mm_core")
    rows, weights = torch.randn(3, 5).bfloat16(), torch.randn(2, 5, 7).bfloat16()
    assert product_for(rows, weights) is separate_products
    (record,) = caplog.records
    assert record.message.startswith(
        "experts: one matrix product an expert, since grouped_mm cannot be used: "
    )


def test_only_experts_whose_form_is_known_are_computed_here():
    module = experts()
    assert is_grouped_form(module)
    assert not is_grouped_form(experts("batched_mm"))  # chosen in the configuration
    assert not is_grouped_form(torch.nn.Linear(2, 2))
    module.has_bias = True
    assert not is_grouped_form(module)


def test_counts_of_tokens():
    index = torch.tensor([[0, 2], [2, 3]])
    assert tokens_of_experts(index, 5).tolist() == [1, 0, 2, 1, 0]
    assert tokens_of_experts(index[:0], 2).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_values_are_dealt_evenly(dtype):
    """As a plan traces them: the router's choices decide the sizes of all that follows."""
    module = experts(dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder(), even_load():
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        rows = torch.empty(10, 16, dtype=dtype, requires_grad=True)
        found = grouped_experts(module, rows, torch.zeros(10, dtype=torch.int64), 4)
        found.sum().backward()
        assert found.shape == rows.grad.shape == (10, 16)
        assert module.down_proj.grad.shape == module.down_proj.shape
    assert evenly(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [16, 12, 6])
def test_a_trace_takes_the_products_that_a_run_takes(dtype, width):
    weight = torch.zeros(2, 16, width, dtype=dtype)
    run = product_for(weight[0], weight)
    with even_load():
        assert product_for(weight[0], weight) is run
