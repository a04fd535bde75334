"""The diffusion task on real parts: a tiny wandit, the haar plugin, UMT5 and Wan's flow matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mm_core
from mm_core.models.sora import SoRAModel
from mm_core.training.tasks.diffusion import DiffusionInputs, DiffusionTask

FRAMES, HEIGHT, WIDTH = 4, 16, 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> SoRAModel:
    torch.manual_seed(1)
    predictor = mm_core.PREDICTOR_MODEL_MAPPINGS["wandit"](
        model_type="t2v", patch_size=(1, 2, 2), text_len=8, in_dim=24, out_dim=24, hidden_size=48, ffn_dim=64,
        num_heads=2, num_layers=2, freq_dim=16, text_dim=16, cross_attn_norm=True, max_seq_len=32,
    )  # fmt: skip
    for parameter in predictor.parameters():  # nothing may be zero, or some inputs would not matter
        torch.nn.init.normal_(parameter, std=0.1)
    return SoRAModel(
        predictor=predictor,
        ae=mm_core.AE_MODEL_MAPPINGS["haar_video"](temporal_levels=1, spatial_levels=1),
        text_encoder=mm_core.TEXT_ENCODER_MAPPINGS["UMT5"](
            config={"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        ),
        diffusion=mm_core.DIFFUSION_MODEL_MAPPINGS["wan_flow_match_scheduler"](
            shift=5.0, sigma_min=0.0, extra_one_step=True
        ),
    )


def batch(indices: list[int]) -> dict[str, Any]:
    """The loader's samples: each depends on its index alone."""
    videos, ids = [], []
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        videos.append(torch.rand(3, FRAMES, HEIGHT, WIDTH, generator=generator) * 2 - 1)
        ids.append(torch.randint(1, 32, (8,), generator=generator))
    mask = torch.ones(len(indices), 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "video": torch.stack(videos), "prompt_ids": torch.stack(ids), "prompt_mask": mask,
        "sample_index": torch.tensor(indices), "file": [str(i) for i in indices],
    }  # fmt: skip


def prepared(model: SoRAModel, groups: list[list[int]], seed: int = 7) -> list[DiffusionInputs]:
    return list(DiffusionTask(model, seed=seed, device=CPU).prepare([batch(group) for group in groups]))


def losses(model: SoRAModel, groups: list[list[int]], seed: int = 7) -> torch.Tensor:
    task = DiffusionTask(model, seed=seed, device=CPU)
    parts = [task.loss(task.forward(model, inputs), inputs) for inputs in prepared(model, groups, seed)]
    return torch.cat([part[0] for part in parts])


@pytest.mark.parametrize("groups", [[[4, 5], [6, 7]], [[4], [5], [6], [7]], [[4, 5, 6], [7]]])
def test_the_micro_batch_does_not_matter(model: SoRAModel, groups: list[list[int]]) -> None:
    (whole,) = prepared(model, [[4, 5, 6, 7]])
    parts = prepared(model, groups)
    for name in ("latents", "noised_latents", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    torch.testing.assert_close(losses(model, groups), losses(model, [[4, 5, 6, 7]]), rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_micro_batches(model: SoRAModel) -> None:
    def gradient(groups: list[list[int]]) -> torch.Tensor:
        model.predictor.zero_grad()
        losses(model, groups).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.predictor.parameters() if p.grad is not None])

    whole = gradient([[4, 5, 6, 7]])
    assert whole.norm() > 0
    torch.testing.assert_close(
        gradient([[4], [5, 6], [7]]), whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item()
    )


def test_the_order_of_samples_does_not_matter(model: SoRAModel) -> None:
    there, back = losses(model, [[4, 5, 6, 7]]), losses(model, [[7, 6, 5, 4]]).flip(0)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)


def test_each_sample_has_a_timestep_and_noise_of_its_own(model: SoRAModel) -> None:
    (inputs,) = prepared(model, [list(range(32))])
    assert inputs.timesteps.shape == (32,)
    assert len(set(inputs.timesteps.tolist())) > 24
    assert len({row.numpy().tobytes() for row in inputs.noise}) == 32
    (other,) = prepared(model, [list(range(32))], seed=8)
    assert not torch.equal(inputs.timesteps, other.timesteps)
    assert not torch.equal(inputs.noise, other.noise)
    (again,) = prepared(model, [list(range(32))])
    assert torch.equal(inputs.noised_latents, again.noised_latents)


def test_noise_and_timestep_come_from_streams_of_their_own(model: SoRAModel) -> None:
    """With one stream for both, samples of one timestep would share the beginning of their noise."""
    (inputs,) = prepared(model, [list(range(64))])
    first = inputs.noise.flatten(1)[:, 0].double()
    assert torch.corrcoef(torch.stack([first, inputs.timesteps.double()]))[0, 1].abs() < 0.5


def test_the_noised_latents_are_what_the_formula_says(model: SoRAModel) -> None:
    (inputs,) = prepared(model, [[1, 2]])
    sigma = (inputs.timesteps / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(inputs.noised_latents, (1 - sigma) * inputs.latents + sigma * inputs.noise)
    torch.testing.assert_close(inputs.latents, model.ae.encode(batch([1, 2])["video"]))


def test_losses_are_per_sample_fp32_and_carry_a_gradient(model: SoRAModel) -> None:
    task = DiffusionTask(model, seed=7, device=CPU)
    (inputs,) = task.prepare([batch([4, 5, 6])])
    assert not any(
        t.requires_grad for t in (inputs.latents, inputs.noised_latents, inputs.conditions["prompt"])
    )
    output = task.forward(model, inputs)
    assert output.shape == inputs.latents.shape
    per_sample, weights, metrics = task.loss(output, inputs)
    assert per_sample.shape == weights.shape == (3,)
    assert per_sample.dtype == torch.float32
    assert torch.equal(weights, torch.ones(3))
    assert metrics == {}
    assert per_sample.requires_grad
    error = (output - (inputs.noise - inputs.latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(per_sample, error * model.diffusion.training_weight(inputs.timesteps).float())


def test_tokens_are_what_the_transformer_reads(model: SoRAModel) -> None:
    task = DiffusionTask(model, seed=7, device=CPU)
    (inputs,) = task.prepare([batch([4, 5])])
    frames, height, width = inputs.latents.shape[2:]
    assert (frames, height, width) == (FRAMES // 2, HEIGHT // 2, WIDTH // 2)
    assert task.tokens(inputs) == 2 * frames * (height // 2) * (width // 2)


@pytest.mark.parametrize(("patch_size", "tokens"), [((1, 2, 2), 8), ([2, 2, 2], 4), (2, 32), (None, 32)])
def test_a_predictor_says_its_patch_size_or_a_token_is_a_position(patch_size: object, tokens: int) -> None:
    predictor = nn.Identity()
    if patch_size is not None:
        predictor.patch_size = patch_size
    latents = torch.zeros(1, 3, 2, 4, 4)
    inputs = DiffusionInputs(latents, latents, latents, torch.zeros(1), {})
    task = DiffusionTask(SoRAModel(predictor=predictor), seed=7, device=CPU)
    assert task.tokens(inputs) == tokens


def test_the_registry_offers_it() -> None:
    assert mm_core.TASK_MAPPINGS["diffusion"] is DiffusionTask
