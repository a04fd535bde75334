"""Pipeline stages compute what one process computes: losses and every gradient, with Wan as it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.planning.live_bytes import LiveBytes
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.sharding.pipeline import tensors_elsewhere
from mm_core.sharding.plan import ShardingError
from mm_core.training.pipeline import PipelineStep
from mm_core.training.step import GradientExchange
from mm_core.training.sums import StepSums
from mm_core.weights import load_hf_folder, materialize
from mm_core.weights.tensors import named_parameters, state_tensors
from mm_plugin_wan22.policy import WANDIT
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.models import force_offload

pytestmark = pytest.mark.timeout(120)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_heads": 2,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 32,
    "text_len": 8,
    "num_layers": 4,
    "in_dim": 4,
    "out_dim": 4,
    "max_seq_len": 16,
}
SAMPLES = 8


class Model(nn.Module, FSDP2Mixin):
    """A trained Wan beside a frozen encoder, as in a real model."""

    def __init__(self, policy: ShardingPolicy = WANDIT) -> None:
        super().__init__()
        with torch.device("meta"):
            self.predictor: Any = WanDiT(**SIZES)
        self.ae = nn.Linear(2, 2).requires_grad_(False)
        self.policy = policy

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": self.policy}


@dataclass(frozen=True)
class Inputs:
    latents: torch.Tensor
    timestep: torch.Tensor
    prompt: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor


class FlowTask:
    """Flow matching, with a weight of its own for each sample."""

    def prepare(self, micro_batches: Any) -> Any:
        yield from micro_batches

    def forward(self, model: Any, inputs: Inputs) -> Any:
        return model.predictor(inputs.latents, inputs.timestep, inputs.prompt, prompt_mask=inputs.mask)

    def loss(self, outputs: torch.Tensor, inputs: Inputs) -> Any:
        losses = (outputs.float() - inputs.target).square().flatten(1).mean(1)
        weights = inputs.prompt[:, 0, 0].abs()
        return losses * weights, weights, {"first": losses.detach()[0]}

    def tokens(self, inputs: Inputs) -> int:
        return inputs.latents[:, 0].numel() // 4


def micro_batches(size: int, *, per_token: bool, step: int = 0, frames: int = 2) -> list[Inputs]:
    """The global batch of a step, in micro batches of `size` samples."""
    generator = torch.Generator().manual_seed(step)
    video, noise = torch.randn(2, SAMPLES, 4, frames, 4, 8, generator=generator).unbind(0)
    sigma = torch.rand(SAMPLES, generator=generator)
    prompt = torch.randn(SAMPLES, 6, 32, generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (SAMPLES, 1), generator=generator)).long()
    s = sigma.view(-1, 1, 1, 1, 1)
    timestep = sigma * 1000
    if per_token:  # the first frame is given, as in ti2v
        tokens = frames * 2 * 4
        timestep = timestep.unsqueeze(1).repeat(1, tokens)
        timestep[:, : tokens // frames] = 0
    whole = ((1 - s) * video + s * noise, timestep, prompt, mask, noise - video)
    return [Inputs(*(t[i : i + size] for t in whole)) for i in range(0, SAMPLES, size)]


@dataclass(frozen=True)
class Way:
    """One way to run a step."""

    name: str
    pp: int = 2
    data: int = 1
    cp: int = 1
    vpp: int = 1
    ring: bool = False
    layers: tuple[tuple[int, ...], ...] = ()
    micro: int = 2  # samples of a micro batch
    per_token: bool = False
    frozen: tuple[str, ...] = ()
    fsdp2: tuple[tuple[str, Any], ...] = ()

    @property
    def sizes(self) -> ParallelSizes:
        algorithm: Any = "ring" if self.ring else "ulysses"
        return ParallelSizes(pp=self.pp, cp=self.cp, vpp=self.vpp, layers=self.layers, cp_algo=algorithm)

    def __str__(self) -> str:
        return self.name


def staged(way: Way) -> Model:
    """The model, cut, sharded and filled."""
    model = Model()
    for name in way.frozen:
        model.predictor.get_submodule(name).requires_grad_(False)
    model.fully_shard(None, Fsdp2Config(**dict(way.fsdp2)), way.sizes)
    materialize(model.predictor, "cpu", 0)
    if "offload_activations" in dict(way.fsdp2):
        force_offload(model)
    return model


def run_step(way: Way, steps: int = 1) -> tuple[Any, dict[str, Any], list[str]]:
    """Sums of the last of `steps` steps, this stage's gradients as sums over the global batch, names of its tensors."""
    model = staged(way)
    mesh = model.parallel_mesh
    accumulation = SAMPLES // way.micro // way.data
    exchange = GradientExchange([model.predictor], model.device_mesh, accumulation)
    task: Any = FlowTask()
    pipeline = PipelineStep(model, task, mesh, accumulation, torch.device("cpu"), exchange)
    for step in range(steps):
        model.zero_grad()
        sums = StepSums(torch.device("cpu"))
        # Other shapes in a later step: the schedule is made anew.
        batches = micro_batches(way.micro, per_token=way.per_token, step=step, frames=2 + step)
        pipeline.run(batches[mesh.dp_rank :: way.data], sums)
    numbers = torch.stack([sums.loss, sums.weight, torch.tensor(float(sums.tokens))])
    dist.all_reduce(numbers)
    factor = mesh.fsdp.size()  # FSDP2 takes the mean of the ranks' gradients
    gradients = {
        name: None if p.grad is None else (whole(p.grad) * factor).numpy()
        for name, p in named_parameters(model.predictor)
    }
    return numbers.tolist(), gradients, sorted(state_tensors(model.predictor))


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_process(way: Way, step: int = 0) -> tuple[Any, dict[str, Any]]:
    """The same by upstream's own forward, without stages."""
    model = Model()
    materialize(model.predictor, "cpu", 0)
    for name in way.frozen:
        model.predictor.get_submodule(name).requires_grad_(False)
    task, numbers = FlowTask(), torch.zeros(3)
    for inputs in micro_batches(way.micro, per_token=way.per_token, step=step, frames=2 + step):
        losses, weights, _ = task.loss(task.forward(model, inputs), inputs)
        losses.sum().backward()
        tokens = float(task.tokens(inputs))
        numbers += torch.stack([losses.sum().detach(), weights.sum(), torch.tensor(tokens)])
    gradients = {
        name: None if p.grad is None else p.grad.numpy() for name, p in model.predictor.named_parameters()
    }
    return numbers.tolist(), gradients


def must_agree(way: Way, steps: int = 1) -> None:
    ranks = way.data * way.cp  # of one stage
    results = run_ranks(run_step, way.pp * ranks, way, steps, timeout=100)
    numbers, expected = one_process(way, steps - 1)
    found: dict[str, Any] = {}
    names: list[str] = []
    for place, (sums, gradients, own) in enumerate(results):
        # Ranks that share a sequence each count all of it.
        np.testing.assert_allclose(sums, np.multiply(numbers, way.cp), rtol=1e-5)
        if place % ranks == 0:
            assert not found.keys() & gradients.keys()  # each tensor is on one stage
            found |= gradients
            names += own
    assert sorted(names) == sorted(expected)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            scale = np.abs(gradient).max()
            np.testing.assert_allclose(
                found[name] / way.cp, gradient, rtol=0, atol=2e-5 * scale, err_msg=name
            )


SHARDED = (("recompute_granularity", "full"),)
WAYS = [
    Way("GPipe: one micro batch", micro=8),
    Way("1F1B, a timestep a token, uneven stages", layers=((3, 1),), per_token=True),
    Way("interleaved", vpp=2, layers=((1, 1), (1, 1))),
    Way("FSDP, 1F1B, recompute", data=2, fsdp2=SHARDED, per_token=True),
    Way("FSDP, interleaved", data=2, vpp=2, fsdp2=(("reshard_after_forward", True),)),
    Way("sequences and stages, a timestep a token", cp=2, per_token=True),
    Way("what comes before the second stage is frozen", frozen=("condition_embedder", "patch_embedding", "blocks")),
]  # fmt: skip
MORE = [
    Way("sequences and stages, interleaved", cp=2, vpp=2, fsdp2=SHARDED),
    Way("a ring and stages", cp=2, per_token=True, ring=True),
    Way("four stages", pp=4, micro=1),
    Way("fewer micro batches than stages", pp=4, micro=4),
    Way("interleaved, fewer micro batches than stages", vpp=2, micro=8),
    Way("replicas, which exchange gradients once", data=2, micro=1, fsdp2=(("sharding_size", 1),)),
    Way("replicas, interleaved", data=2, micro=1, vpp=2, fsdp2=(("sharding_size", 1),)),
    Way("FSDP that gathers once", data=2, micro=1, fsdp2=(("reshard_after_forward", False),)),
    Way("FSDP, interleaved, selective recompute", data=2, vpp=2, fsdp2=(("recompute_granularity", "selective"),)),
    Way("FSDP, aligned norms", data=2, fsdp2=(("align_fsdp_param_groups", True),)),
    Way("activations wait in host memory", per_token=True, fsdp2=(("offload_activations", ("predictor.blocks.{*}",)),)),
    Way("FSDP, prefetch", data=2, vpp=2, fsdp2=(("num_to_forward_prefetch", 2), ("num_to_backward_prefetch", 2))),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_losses_and_gradients_are_those_of_one_process(way: Way) -> None:
    must_agree(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", MORE, ids=str)
def test_more_ways(way: Way) -> None:
    must_agree(way)


def test_a_later_step_may_have_other_shapes() -> None:
    must_agree(Way("two steps"), steps=2)


def mixed_shapes() -> None:
    way = Way("mixed")
    model = staged(way)
    task: Any = FlowTask()
    pipeline = PipelineStep(model, task, model.parallel_mesh, 2, torch.device("cpu"))
    batches = [micro_batches(4, per_token=False, frames=frames)[0] for frames in (2, 3)]
    with pytest.raises(ShardingError, match=r"of one size in a step, but micro batch 2 makes \(4, 24, 48\)"):
        pipeline.run(batches, StepSums(torch.device("cpu")))


def test_micro_batches_of_one_step_have_one_shape() -> None:
    run_ranks(mixed_shapes, 2)


def loaded(folder: Path) -> dict[str, Any]:
    model = staged(Way("loaded"))
    load_hf_folder(model.predictor, folder, elsewhere=tensors_elsewhere(model.predictor))
    return {name: tensor.detach().numpy() for name, tensor in state_tensors(model.predictor).items()}


def test_each_stage_reads_its_part_of_a_folder(tmp_path: Path) -> None:
    with torch.device("cpu"):
        expected = WanDiT(**SIZES).state_dict()
    save_file(expected, tmp_path / "diffusion_pytorch_model.safetensors")
    first, last = run_ranks(loaded, 2, tmp_path)
    assert not first.keys() & last.keys()
    assert {**first, **last}.keys() == expected.keys()
    for name, values in {**first, **last}.items():
        np.testing.assert_array_equal(values, expected[name].numpy())


def long_prompt() -> None:
    model = staged(Way("refused"))
    task: Any = FlowTask()
    pipeline = PipelineStep(model, task, model.parallel_mesh, 1, torch.device("cpu"))
    inputs = micro_batches(2, per_token=False)[0]
    inputs = replace(inputs, prompt=torch.zeros(2, 9, 32), mask=torch.ones(2, 9))
    # The second stage only sees that the first one is gone.
    error, said = (UserError, "a prompt of 9 tokens") if dist.get_rank() == 0 else (RuntimeError, "")
    with pytest.raises(error, match=said):
        pipeline.run([inputs], StepSums(torch.device("cpu")))


def test_what_a_model_says_of_its_inputs_is_told_as_it_is() -> None:
    run_ranks(long_prompt, 2)


def half_precision() -> tuple[list[float], list[float]]:
    dtypes: dict[str, Any] = {"param_dtype": "bf16", "reduce_dtype": "fp32", "output_dtype": "fp32"}
    way = Way("bf16", data=1, fsdp2=tuple(dtypes.items()))
    numbers, gradients, _ = run_step(way)
    assert all(gradient is not None and np.isfinite(gradient).all() for gradient in gradients.values())
    # The same on one rank of its own: each makes a mesh of itself alone.
    model = Model()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model.fully_shard(alone, Fsdp2Config(**dtypes))
    materialize(model.predictor, "cpu", 0)
    task, total = FlowTask(), 0.0
    for inputs in micro_batches(way.micro, per_token=False):
        losses, _, _ = task.loss(task.forward(model, inputs), inputs)
        losses.sum().backward()
        total += losses.sum().item()
    own = {name: p.grad for name, p in named_parameters(model.predictor)}
    worst = max(
        float(np.abs(gradients[name] - whole(own[name]).numpy()).max() / np.abs(gradients[name]).max())
        for name in gradients
    )
    return [numbers[0], worst], [total, 0.0]


def test_mixed_precision_travels_in_the_dtype_of_computation() -> None:
    for found, expected in run_ranks(half_precision, 2):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def activations(way: Way) -> list[int]:
    """Peak bytes beside parameters and gradients, of a step of 3 and of one of 8 micro batches of one sample."""
    model = staged(way)
    peaks = []
    for count in (3, 8):
        task: Any = FlowTask()
        pipeline = PipelineStep(model, task, model.parallel_mesh, count, torch.device("cpu"))
        batches = micro_batches(1, per_token=True)[:count]
        pipeline.run(batches, StepSums(torch.device("cpu")))
        kept = [*model.predictor.parameters(), *(p.grad for p in model.predictor.parameters())]
        inputs = [tensor for batch in batches for tensor in vars(batch).values()]
        with LiveBytes([*kept, *inputs]) as live:
            pipeline.run(batches, StepSums(torch.device("cpu")))
        peaks.append(live.peak)
    return peaks


def test_a_stage_holds_no_more_for_more_micro_batches() -> None:
    for few, many in run_ranks(activations, 2, Way("memory", micro=1)):
        assert many < few * 1.05


def cut_model_cannot_be_called_whole() -> None:
    model = staged(Way("alone"))
    inputs = micro_batches(1, per_token=False)[0]
    with pytest.raises(RuntimeError, match="pipeline"):
        FlowTask().forward(model, inputs)


def test_a_stage_cannot_be_called_as_if_it_were_the_model() -> None:
    run_ranks(cut_model_cannot_be_called_whole, 2)
