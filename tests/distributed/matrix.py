"""The parity matrix: which ways of training there are, which of them a test runs, and how one is run.

A way (`Way`) is a model, a number of ranks and a choice for each feature of sharding. All ways train the same
tensors on the same global batches, so their losses and final weights are those of plain torch in one process.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding.patterns import ModulePaths
from mm_core.training.gradients import scale_and_clip
from mm_core.training.step import GradientExchange, UnusedParameters
from mm_core.weights import materialize
from mm_core.weights.tensors import state_tensors
from tests.distributed import vision_language
from tests.distributed.harness import run_ranks
from tests.distributed.models import MODELS, Composite, Dropout, TinyModel, force_offload, optimizer_of

STEPS, CLIP, SEED = 10, 0.5, 0


@dataclass(frozen=True)
class Run:
    """What a training run shows: the loss of each step, the norm of its gradients before clipping, and the final
    weights as NumPy arrays.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Any]


# The first choice of each is the ordinary one, which a test's name leaves out.
FACTORS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "model": tuple(MODELS),
        "ranks": (2, 1, 4),
        "mesh": ("fsdp", "hsdp"),
        "reshard": (True, False, 2),
        "prefetch": (0, 1, 2),
        "recompute": ("none", "full", "module", "selective"),
        "activations": ("kept", "offloaded"),
        "offload": (False, True),
        "aligned": (False, True),
        "experts": (1, 2),
        "ignored": (False, True),
        "accumulation": (1, 2),
        "init": ("meta", "real"),
        "dtype": ("fp32", "bf16"),
    }
)

VISION_LANGUAGE = vision_language.names()
"""Models of a matrix of their own."""
_WITH_EXPERTS = ("moe", "qwen3_vl_moe")


@functools.cache
def model_of(name: str) -> TinyModel:
    """A model, built the first time that it is asked for."""
    return vision_language.tiny_model(name) if name in VISION_LANGUAGE else MODELS[name]


def steps_of(name: str) -> int:
    """How many steps a model is trained: their numbers agree in few, or not at all."""
    return 3 if name in VISION_LANGUAGE else STEPS


def factors_of(models: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The choices of a matrix of some models."""
    return {**FACTORS, "model": models}


@dataclass(frozen=True)
class Way:
    """One point of the matrix; the fields are the factors."""

    model: str = "wan"
    ranks: int = 2
    mesh: str = "fsdp"
    reshard: bool | int = True
    prefetch: int = 0
    recompute: str = "none"
    activations: str = "kept"
    offload: bool = False
    aligned: bool = False
    experts: int = 1
    ignored: bool = False
    accumulation: int = 1
    init: str = "meta"
    dtype: str = "fp32"

    def __str__(self) -> str:
        """As a test's name: `wan-2-fsdp-prefetch2-recompute_full`."""
        parts = [self.model, str(self.ranks), self.mesh]
        for name, choices in list(FACTORS.items())[3:]:
            value = getattr(self, name)
            if value is not choices[0]:
                parts.append(_label(name, value))
        return "-".join(parts)

    def fsdp2(self) -> Fsdp2Config:
        """The fsdp2.yaml of this way."""
        model = model_of(self.model)
        fields: dict[str, Any] = {
            "reshard_after_forward": self.reshard,
            "num_to_forward_prefetch": self.prefetch,
            "num_to_backward_prefetch": self.prefetch,
            "offload_to_cpu": self.offload,
            "align_fsdp_param_groups": self.aligned,
            "expert_parallel_size": self.experts,
        }
        if self.mesh == "hsdp":
            fields["sharding_size"] = 2
        if self.recompute != "none":
            pattern = model.parts if self.recompute == "module" else model.blocks
            fields["recompute_modules"] = (f"predictor.{pattern}",)
            fields["recompute_granularity"] = "selective" if self.recompute == "selective" else "full"
        if self.activations == "offloaded":
            fields["offload_activations"] = (f"predictor.{model.attention}",)
        if self.ignored:
            fields["ignored_modules"] = ("ae", f"predictor.{model.frozen}")
        if self.dtype == "bf16":
            fields |= {"param_dtype": "bf16", "reduce_dtype": "fp32"}
        return Fsdp2Config(**fields)


def _label(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return (
        f"{name}{value}"
        if isinstance(value, int)
        else value
        if name in ("dtype", "init")
        else f"{name}_{value}"
    )


# -- which ways there are ---------------------------------------------------------------------------------------------

# What the rules below look at; every other factor goes with everything.
_RULED = ("model", "ranks", "mesh", "reshard", "experts")


def is_legal(model: str, ranks: int, mesh: str, reshard: bool | int, experts: int) -> bool:
    """Whether choices of the ruled factors go together."""
    if mesh == "hsdp" and ranks != 4:
        return False  # 2 x 2
    if experts > 1 and (model not in _WITH_EXPERTS or ranks == 1):
        return False
    return isinstance(reshard, bool) or (ranks == 4 and mesh == "fsdp")  # part of the ranks that shard


def legal_ways() -> Iterator[Way]:
    """All of them."""
    for values in itertools.product(*FACTORS.values()):
        chosen = dict(zip(FACTORS, values, strict=True))
        if is_legal(*(chosen[name] for name in _RULED)):
            yield Way(**chosen)


@functools.cache
def covering_ways(strength: int, models: tuple[str, ...] = FACTORS["model"]) -> tuple[Way, ...]:
    """Few ways in which every legal combination of choices for any `strength` factors occurs at least once.

    Those of a smaller strength come first. Greedy: each next way is the one of some random candidates that has most
    combinations that are missing. The seed is fixed, so the choice is the same in every process.
    """
    generator = random.Random(0)
    found = list(covering_ways(strength - 1, models)) if strength > 2 else []
    done = {combination for way in found for combination in combinations_of(way, strength)}
    missing = {combination: None for combination in combinations(strength, models) if combination not in done}
    while missing:
        target = dict(next(iter(missing)))
        candidates = [_completed(target, generator, models) for _ in range(30)]
        best = max(candidates, key=lambda way: sum(c in missing for c in combinations_of(way, strength)))
        for combination in combinations_of(best, strength):
            missing.pop(combination, None)
        found.append(best)
    return tuple(found)


Combination = tuple[tuple[str, Any], ...]


def combinations(strength: int, models: tuple[str, ...] = FACTORS["model"]) -> Iterator[Combination]:
    """Every choice for any `strength` factors that some legal way makes."""
    for names in itertools.combinations(FACTORS, strength):
        for values in itertools.product(*(factors_of(models)[name] for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if next(_ruled(chosen, models), None) is not None:
                yield tuple(chosen.items())


def combinations_of(way: Way, strength: int) -> Iterator[Combination]:
    """The combinations that one way makes."""
    for names in itertools.combinations(FACTORS, strength):
        yield tuple((name, getattr(way, name)) for name in names)


def _ruled(chosen: Mapping[str, Any], models: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The legal choices of the ruled factors that agree with what is chosen."""
    for values in itertools.product(
        *((chosen[n],) if n in chosen else factors_of(models)[n] for n in _RULED)
    ):
        if is_legal(*values):
            yield dict(zip(_RULED, values, strict=True))


def _completed(chosen: Mapping[str, Any], generator: random.Random, models: tuple[str, ...]) -> Way:
    values = {name: generator.choice(choices) for name, choices in factors_of(models).items()}
    return Way(**{**values, **chosen, **generator.choice(list(_ruled(chosen, models)))})


# -- how one is run ---------------------------------------------------------------------------------------------------


def train(way: Way) -> Run:
    """Train on the ranks of a process group as `mm train` does; rank 0 returns the result."""
    model = model_of(way.model)
    composite = model.composite()
    if way.init == "real":
        composite.predictor = _whole_model(model)
    _drop_out(composite.predictor, model)
    if way.ignored:
        _freeze(composite.predictor, model)
    composite.fully_shard(None, way.fsdp2())
    materialize(composite.predictor, "cpu", SEED)
    composite.train()
    offloader = force_offload(composite)
    step_of = _Step(model, composite, way.accumulation)
    run = Run([], [], {})
    for step in range(steps_of(way.model)):
        loss, norm = step_of(step)
        run.losses.append(loss)
        run.norms.append(norm)
    assert (offloader.copies > 0) == (way.activations == "offloaded")
    weights = {name: _whole(t) for name, t in state_tensors(composite.predictor).items()}
    if dist.get_rank() == 0:
        run.weights.update(weights)
    return run


class _Step:
    """One optimizer step as the trainer does it: sums of losses, and one scale of the gradients by the weight of the
    whole global batch.
    """

    def __init__(self, model: TinyModel, composite: Composite, accumulation: int) -> None:
        self.model, self.module, self.accumulation = model, composite.predictor, accumulation
        self.optimizer = optimizer_of(self.module)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.exchange = GradientExchange([self.module], composite.device_mesh, accumulation)
        self.unused = UnusedParameters([self.module], torch.device("cpu"))

    def __call__(self, step: int) -> tuple[float, float]:
        """Its loss, and the norm of its gradients."""
        rank, world = dist.get_rank(), dist.get_world_size()
        sums = torch.zeros(2)
        for micro in range(self.accumulation):
            self.exchange.begin(micro)
            loss, weight = self.model.loss(self.module, step, rank, world, micro, self.accumulation)
            loss.backward()
            sums += torch.stack([loss.detach(), weight])
        numbers = torch.cat([sums, self.unused.numbers()])
        dist.all_reduce(numbers)
        total, weight, others = numbers[0], numbers[1], numbers[2:]
        self.unused.drop(others)
        norm = scale_and_clip(self.parameters, world / weight, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (total / weight).item(), norm.item()


@functools.cache
def reference(name: str, ignored: bool) -> Run:
    """What plain torch does in one process in fp32, once a session: whole tensors, no line of our engine.

    Args:
        ignored: whether what the ways ignore is frozen.
    """
    return run_ranks(_reference, 1, name, ignored)[0]


def _reference(name: str, ignored: bool) -> Run:
    model = model_of(name)
    module = _whole_model(model)
    _drop_out(module, model)
    if ignored:
        _freeze(module, model)
    optimizer = optimizer_of(module)
    run = Run([], [], {})
    for step in range(steps_of(name)):
        loss, weight = model.loss(module, step)
        mean = loss / weight
        mean.backward()
        run.norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(mean.item())
    run.weights.update({key: value.numpy() for key, value in module.state_dict().items()})
    return run


def initial_weights(name: str) -> dict[str, Any]:
    """What all of them start from."""
    return {key: value.numpy() for key, value in _whole_model(model_of(name)).state_dict().items()}


def _whole_model(model: TinyModel) -> nn.Module:
    """Built on the CPU by its own constructor, with the values that the seed stands for."""
    values = model.build()
    materialize(values, "cpu", SEED)
    module = model.build("cpu")
    module.load_state_dict(values.state_dict())
    return module


def _freeze(module: nn.Module, model: TinyModel) -> None:
    for part in _matching(module, model.frozen):
        part.requires_grad_(False)


def _drop_out(module: nn.Module, model: TinyModel) -> None:
    """Recomputed modules then have random numbers to draw again."""
    for part in _matching(module, model.parts):
        part.register_forward_hook(Dropout())


def _matching(module: nn.Module, pattern: str) -> list[nn.Module]:
    paths = ModulePaths(name for name, _ in module.named_modules()).match(pattern, where="test")
    return [module.get_submodule(path) for path in paths]


def _whole(tensor: torch.Tensor) -> Any:
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.clone().numpy()
