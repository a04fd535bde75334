"""Models shared by several ranks in every way there is: which ways, and how one is trained.

Each way trains the same tensors on the same global batches, so its losses, norms and final weights are those of plain
torch in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ContextAlgorithm, ParallelSizes
from mm_core.models.sora import SoRAModel
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding import ShardingPolicy
from mm_core.sharding.context_policy import causal_text
from mm_core.training.gradients import scale_and_clip
from mm_core.training.optimizer import ShardedAdamW
from mm_core.training.step import GradientExchange, Passes, SumsExchange, UnusedParameters
from mm_core.training.sums import StepSums
from mm_core.training.tasks.language import LanguageTask
from mm_core.weights import materialize
from mm_core.weights.tensors import state_tensors
from mm_plugin_wan22.policy import wandit
from mm_plugin_wan22.predictor import WanDiT
from tests.distributed import models, vision_language
from tests.distributed.against_one import whole
from tests.distributed.harness import run_ranks
from tests.distributed.matrix import CLIP, SEED, Run, steps_of

BATCH = models.BATCH
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to share a model.

    Args:
        ranks: in all; what the sizes leave is data parallel.
        sharding: `sharding_size` of fsdp2.yaml.
        micro: samples of a micro batch.
    """

    model: str
    ranks: int
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    vpp: int = 1
    algo: ContextAlgorithm = "ulysses"
    layers: tuple[tuple[int, ...], ...] = ()
    sharding: int | str = "auto"
    micro: int = 4
    recompute: bool = False
    dtype: str = "fp32"

    def __str__(self) -> str:
        """As a test's name: `wan-4-pp2-cp2-ring`."""
        parts = [self.model, str(self.ranks)]
        parts += [f"{name}{n}" for name in ("pp", "vpp", "cp", "tp", "ep") if (n := getattr(self, name)) > 1]
        parts += ["ring"] if self.cp > 1 and self.algo == "ring" else []
        parts += [f"micro{self.micro}"] if self.micro != 4 else []
        parts += [f"sharding{self.sharding}"] if self.sharding != "auto" else []
        parts += ["recompute"] if self.recompute else []
        return "-".join([*parts, *([self.dtype] if self.dtype != "fp32" else [])])

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(self.pp, self.cp, self.tp, self.ep, self.vpp, self.algo, self.layers)

    @property
    def accumulation(self) -> int:
        """Micro batches of a step."""
        return BATCH // (self.micro * self.sizes.data_parallel(self.ranks))

    def fsdp2(self) -> Fsdp2Config:
        """The fsdp2.yaml of this way."""
        fields: dict[str, Any] = {"sharding_size": self.sharding, "expert_parallel_size": self.ep}
        if self.recompute:
            fields["recompute_granularity"] = "full"
        if self.dtype == "bf16":
            fields |= {"param_dtype": "bf16", "reduce_dtype": "fp32"}
        return Fsdp2Config(**fields)


# -- models -----------------------------------------------------------------------------------------------------------


CONDITIONS = ("i2v_vae_feature", "clip_feature", "first_frame_latents")


class FlowTask:
    """Flow matching on noised videos, as `DiffusionTask` does it after its encoders."""

    def __init__(self, model: nn.Module, *, seed: int, device: torch.device) -> None:
        pass

    def prepare(self, micro_batches: Any) -> Iterator[Batch]:
        yield from micro_batches

    def forward(self, model: Any, inputs: Batch) -> Any:
        s = inputs["sigma"].view(-1, 1, 1, 1, 1)
        noised = (1 - s) * inputs["video"] + s * inputs["noise"]
        given = {name: inputs[name] for name in CONDITIONS if name in inputs}
        if "first_frame_latents" in given:
            noised = torch.cat([given["first_frame_latents"], noised[:, :, 1:]], 2)
        return model.predictor(noised, inputs["sigma"] * 1000, inputs["text"], **given)

    def loss(self, outputs: torch.Tensor, inputs: Batch) -> Any:
        losses = (outputs.float() - (inputs["noise"] - inputs["video"])).square().flatten(1).mean(1)
        return losses, torch.ones_like(losses), {"count": losses.new_tensor(float(len(losses)))}

    def tokens(self, inputs: Batch) -> int:
        return len(inputs["video"])


def _flow_batch(step: int) -> Batch:
    """32 tokens a video, and a text."""
    generator = torch.Generator().manual_seed(step)
    return {
        "video": torch.randn(BATCH, 4, 2, 8, 8, generator=generator),
        "noise": torch.randn(BATCH, 4, 2, 8, 8, generator=generator),
        "sigma": torch.rand(BATCH, generator=generator),
        "text": torch.randn(BATCH, 6, 32, generator=generator),
    }


def _two_frames_batch(step: int) -> Batch:
    """With what becomes of a first and a last frame."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        **_flow_batch(step),
        "i2v_vae_feature": torch.randn(BATCH, 8, 2, 8, 8, generator=generator),
        "clip_feature": torch.randn(BATCH, 2 * 3, 16, generator=generator),
    }


def _first_frame_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        **_flow_batch(step),
        "first_frame_latents": torch.randn(BATCH, 4, 1, 8, 8, generator=generator),
    }


def _token_batch(step: int) -> Batch:
    """Samples differ in how many of their tokens count, so micro batches differ in weight."""
    batch = models.DENSE.batch(step)
    return {"input_ids": batch["ids"], "labels": batch["labels"]}


_WAN = {
    "in_dim": 4, "out_dim": 4, "hidden_size": 96, "ffn_dim": 96, "freq_dim": 32, "text_dim": 32, "text_len": 8,
    "num_heads": 4, "num_layers": 4, "max_seq_len": 16,
}  # fmt: skip
_FLF2V = {"model_type": "flf2v", "in_dim": 12, "text_len": 512, "img_dim": 16, "clip_token_len": 3}


def _wan(batch: Callable[[int], Batch], **changes: Any) -> Kind:
    section = {**_WAN, **changes}
    return Kind(
        lambda: WanDiT(**section),
        lambda network: SoRAModel(predictor=network, sharding_policies={"predictor": wandit(section)}),
        batch,
        FlowTask,
    )


@dataclass(frozen=True)
class Kind:
    """A model, its batches and its loss."""

    make: Callable[[], nn.Module]
    compose: Callable[[nn.Module], Any]
    batch: Callable[[int], Any]
    task: Callable[..., Any]
    take: Callable[[Any, slice], Batch] = models._of_each


def _text(make: Callable[[], nn.Module], policy: ShardingPolicy) -> Kind:
    return Kind(
        make, lambda network: TransformersModel(network, sharding_policy=policy), _token_batch, LanguageTask
    )


_LAYERS = ("model.layers.{*}",)
KINDS = {
    "wan": _wan(_flow_batch),
    "wan-flf2v": _wan(_two_frames_batch, **_FLF2V),
    "wan-ti2v": _wan(_first_frame_batch, model_type="ti2v"),
    "dense": _text(models._dense, ShardingPolicy(units=_LAYERS, context=causal_text())),
    "moe": _text(
        models.moe,
        ShardingPolicy(units=_LAYERS, experts=("model.layers.{*}.mlp.experts",), context=causal_text()),
    ),
}


@functools.cache
def kind_of(name: str) -> Kind:
    """A kind, built the first time that it is asked for."""
    if name not in vision_language.names():
        return KINDS[name]
    model = vision_language.tiny_model(name)
    return replace(_text(model.make, model.policy), batch=model.batch, take=model.take)


# -- how one is trained -----------------------------------------------------------------------------------------------


def train(way: Way) -> Run:
    """Train on the ranks of a process group as `mm train` does; rank 0 returns the result."""
    kind = kind_of(way.model)
    with torch.device("meta"):
        model = kind.compose(kind.make())
    model.fully_shard(None, way.fsdp2(), way.sizes)
    ((_, network),) = model.trained.items()
    materialize(network, "cpu", SEED)
    model.train()
    step_of = _Step(way, kind, model, network)
    run = Run([], [], {})
    for step in range(steps_of(way.model)):
        loss, norm = step_of(step)
        run.losses.append(loss)
        run.norms.append(norm)
    weights = {name: whole(tensor) for name, tensor in state_tensors(network).items()}
    mesh = model.parallel_mesh
    if mesh.pp is None:
        run.weights.update(weights)
        return run
    parts: list[Any] = [None] * way.ranks
    dist.all_gather_object(parts, weights)
    run.weights.update({name: value for part in parts for name, value in part.items()})
    return run


class _Step:
    """One optimizer step as the trainer does it."""

    def __init__(self, way: Way, kind: Kind, model: Any, network: nn.Module) -> None:
        self.way, self.kind, self.mesh = way, kind, model.parallel_mesh
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = ShardedAdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)
        cpu = torch.device("cpu")
        exchange = GradientExchange([network], model.device_mesh, way.accumulation)
        self.exchange_of_sums = SumsExchange(UnusedParameters([network], cpu, way.pp), self.mesh)
        self.task = kind.task(model, seed=SEED, device=cpu)
        self.ranks = model.device_mesh.size() * way.tp
        if way.pp == 1:
            self.passes: Any = Passes(model, self.task, exchange, way.accumulation)
        else:
            from mm_core.training.pipeline import PipelineStep

            self.passes = PipelineStep(model, self.task, self.mesh, way.accumulation, cpu, exchange)

    def __call__(self, step: int) -> tuple[float, float]:
        """Its loss, and the norm of its gradients."""
        sums = StepSums(torch.device("cpu"))
        self.passes.run(self.task.prepare(self._micro_batches(step)), sums)
        reduced, mismatch = self.exchange_of_sums.reduce(sums, False)
        assert not mismatch
        norm = scale_and_clip(self.parameters, self.ranks / reduced.weight, CLIP, self.mesh.pp_group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (reduced.loss / reduced.weight).item(), norm.item()

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        batch, size = self.kind.batch(step), self.way.micro
        first = self.mesh.dp_rank * size * self.way.accumulation
        for start in range(first, first + size * self.way.accumulation, size):
            yield self.kind.take(batch, slice(start, start + size))


@functools.cache
def reference(name: str) -> Run:
    """What plain torch does in one process in fp32, once a session: whole tensors, no line of our engine."""
    return run_ranks(_reference, 1, name)[0]


def _reference(name: str) -> Run:
    kind = kind_of(name)
    module = initial(name)
    model = kind.compose(module)
    task = kind.task(model, seed=SEED, device=torch.device("cpu"))
    optimizer = models.optimizer_of(module)
    run = Run([], [], {})
    for step in range(steps_of(name)):
        (inputs,) = task.prepare([kind.take(kind.batch(step), slice(None))])
        losses, weights, _ = task.loss(task.forward(model, inputs), inputs)
        mean = losses.sum() / weights.sum()
        mean.backward()
        run.norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(mean.item())
    run.weights.update({key: value.numpy() for key, value in module.state_dict().items()})
    return run


def initial(name: str) -> nn.Module:
    """The whole model with the values that all ways start from, built on the CPU by its own constructor."""
    kind = kind_of(name)
    with torch.device("meta"):
        values = kind.make()
    materialize(values, "cpu", SEED)
    module = kind.make()
    module.load_state_dict(values.state_dict())
    return module
