"""What a plan consists of, as plain data: costs of units, memory over a step, and what is made of them.

Bytes and FLOPs are those of one rank. "A step" is an optimizer step, "a micro batch" one forward and backward pass.
This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mm_core.sharding.plan import ShardingPlan

Phase = Literal["prepare", "forward", "loss", "backward", "reduce", "optimizer"]
"""The parts of a step in which memory is looked at. `recompute` belongs to the backward pass."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations as torch's `FlopCounterMode` counts them: matrix products, convolutions, attention.

    A multiplication and an addition are two. Attention is counted whole, also where it is causal.

    Args:
        forward, backward: of one pass; recomputation is not part of `backward`.
        recompute: what the backward pass computes a second time.
        attention_forward, …: the part of each that products of queries, keys and values make.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    attention_forward: int = 0
    attention_backward: int = 0
    attention_recompute: int = 0

    @property
    def total(self) -> int:
        """All that is computed."""
        return self.forward + self.backward + self.recompute

    @property
    def attention(self) -> int:
        """The part of `total` that is attention."""
        return self.attention_forward + self.attention_backward + self.attention_recompute

    @property
    def model(self) -> int:
        """What the model needs, without recomputation: the numerator of MFU (PaLM, arXiv:2204.02311, appendix B)."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, number: int) -> Flops:
        """Those of `number` equal runs."""
        return Flops(*(getattr(self, f.name) * number for f in fields(self)))


@dataclass(frozen=True, slots=True)
class UnitCost:
    """What one FSDP unit costs on a rank in one micro batch; the same for all units of its kind.

    The root is a unit of its own, with what no other unit has: embeddings, the final norm and head, the loss. Experts
    that are units inside a block are part of the block's costs, and have none of their own.

    Args:
        kind: class of the module, with `#2`, `#3` where units of one class differ.
        paths: its units, relative to the root, in forward order; `("",)` is the root itself.
        parameter_numel: elements of one such unit's parameters, whole; units inside it counted in.
        trainable_numel: those that are trained.
        flops: of one micro batch.
        saved_bytes: what one unit keeps from its forward to its backward pass, without inputs and gathered parameters.
        transient_bytes: the most that it holds beside that, while it runs forward.
        backward_transient_bytes: the most that it holds beside what it saved while it runs backward, recomputed
            activations counted in, without its parameters' gradients.
        input_bytes, output_bytes: tensors that it is given and gives back, each storage once.
        collectives: bytes that this rank hands to collectives inside the unit's own computation (context and tensor
            parallelism, experts) forward, backward and when recomputed, by `kind group`: `all_to_all cp`.
        calls: of each of these collectives.
    """

    kind: str
    paths: tuple[str, ...]
    parameter_numel: int
    trainable_numel: int
    flops: Flops
    saved_bytes: int
    transient_bytes: int
    backward_transient_bytes: int
    input_bytes: int
    output_bytes: int
    moved_bytes: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The unit that was traced for all of them."""
        return self.paths[0]

    @property
    def count(self) -> int:
        """How many units of this kind there are on the rank."""
        return len(self.paths)


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes in a rank's device memory at one moment, by what they are for.

    Args:
        parameters: stored shards, and whole parameters of frozen components.
        gradients: shards of gradients.
        optimizer: states of the optimizer.
        gathered: parameters of units that are gathered, and buffers of all-gathers.
        reducing: whole gradients, and buffers of reduce-scatters.
        activations: inputs of the step, and what waits for the backward pass.
        transient: what operations under way need beside that.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    reducing: int = 0
    activations: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))

    def as_dict(self) -> dict[str, int]:
        """By name, with `total`."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """The most that is held between the event before and this one.

    Args:
        phase: part of the step.
        unit: path of the unit that runs, relative to the root; `""` is the root itself.
        bytes: by kind.
        micro: micro batch of the step, counted from 0.
    """

    phase: Phase
    unit: str
    bytes: RankBytes
    micro: int = 0

    @property
    def moment(self) -> str:
        """`backward of blocks.3`, for people."""
        of = f" of {self.unit}" if self.unit else ""
        return f"{self.phase}{of}" if self.phase != "optimizer" else "optimizer step"


@dataclass(frozen=True)
class Timeline:
    """A rank's device memory over one step after the first (whose optimizer states exist already).

    Args:
        events: in order.
        host_bytes: what lies in host memory instead (`offload_to_cpu`).
        host_activation_bytes: the most of a micro batch's activations that wait there (`offload_activations`).
    """

    events: tuple[MemoryEvent, ...]
    host_bytes: int = 0
    host_activation_bytes: int = 0

    @property
    def peak(self) -> MemoryEvent:
        """The first event with the most bytes."""
        return max(self.events, key=lambda event: event.bytes.total)

    @property
    def peak_bytes(self) -> int:
        """The most that is held at one time."""
        return self.peak.bytes.total

    @property
    def moment(self) -> str:
        """When that is, for people."""
        return self.peak.moment


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind over one group of ranks, in one step.

    Args:
        kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `send`.
        group: dimension of the mesh: `fsdp`, `dp_replicate`, `cp`, `tp`, `ep`, `pp`.
        ranks: of the group.
        count: how often it is called.
        bytes: that this rank sends, all calls together.
        what: what travels, for people: `parameters`, `gradients`, `tokens to experts`, ….
        stride: distance of neighbours in ranks, which says what links are used: 1 inside a machine as far as it goes.
    """

    kind: str
    group: str
    ranks: int
    count: int
    bytes: int
    what: str = ""
    stride: int = 1


@dataclass(frozen=True, slots=True)
class StepTime:
    """A roofline: seconds of one step of one rank.

    Args:
        matmul, attention: FLOPs over the rate that is reached.
        communication: bytes over the rate that is reached, whether hidden or not.
        exposed: the part of it that computation cannot hide.
        idle: waiting in a pipeline.
        other: everything that is bound by memory bandwidth: norms, optimizer, ….
    """

    matmul: float = 0.0
    attention: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    idle: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.matmul + self.attention + self.exposed + self.idle + self.other


@dataclass(frozen=True, slots=True)
class Advice:
    """One change of the configuration and what it would do.

    Args:
        change: what to write, and where.
        peak_bytes: the peak with it.
        seconds: the step's time with it; None if it is not known.
        fits: whether it fits then.
        why: one sentence.
    """

    change: str
    peak_bytes: int
    seconds: float | None
    fits: bool
    why: str = ""


@dataclass(frozen=True)
class StepCosts:
    """What tracing and composing say of one step on the fullest rank; the part of a plan that knows no device.

    Args:
        parameters: trainable elements of the whole model.
        frozen_parameters: elements of everything that is not trained, encoders too.
        units: of the trained root, in forward order, the root last.
        timeline: memory.
        steady: bytes that are there all the time, between steps.
        flops: of a whole step: all units, all micro batches.
        micro_batches: of a step.
        tokens: that the model reads on this rank in one micro batch.
        optimizer_states: copies of the trained parameters in `steady.optimizer`.
        notes: what the numbers assume, one sentence each.
        plan: of the trained root on this rank.
        numel: elements of each parameter that the rank computes with; fewer than the whole where experts or tensors are
            dealt out.
        shards: how many ranks share one copy of the parameters.
    """

    parameters: int
    frozen_parameters: int
    units: tuple[UnitCost, ...]
    timeline: Timeline
    steady: RankBytes
    flops: Flops
    plan: ShardingPlan
    numel: Mapping[str, int]
    shards: int = 1
    micro_batches: int = 1
    tokens: int = 0
    optimizer_states: int = 2
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanResult:
    """A whole plan.

    Args:
        costs: of the fullest rank.
        world_size: ranks.
        sizes: of the mesh's dimensions, by name.
        device: name of the device that it is for.
        device_bytes: its memory.
        collectives: of a step.
        time: of a step.
        fits: whether the peak, with the reserve that the device needs, fits into `device_bytes`.
        advice: what to change, best first.
    """

    costs: StepCosts
    world_size: int
    sizes: Mapping[str, int]
    device: str
    device_bytes: int
    collectives: tuple[Collective, ...]
    time: StepTime
    fits: bool
    advice: tuple[Advice, ...] = ()

    @property
    def parameters(self) -> int:
        """Trainable elements of the whole model."""
        return self.costs.parameters

    @property
    def peak_bytes(self) -> int:
        """The most that a rank's device holds at one time."""
        return self.costs.timeline.peak_bytes
