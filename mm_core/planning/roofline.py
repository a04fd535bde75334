"""How long a step takes at least: FLOPs and bytes over the rates that a device reaches (Williams et al., 2009).

What computation can hide of the exchange of parameters and gradients is hidden; all else runs one after the other. Real
steps are slower: launches, host work and stragglers are not in it. `PUBLISHED` says by how much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mm_core.config.parallel import ParallelSizes
from mm_core.planning.collectives import FORWARD
from mm_core.planning.devices import Device
from mm_core.planning.model import Collective, StepCosts, StepTime
from mm_core.sharding.plan import ShardingPlan

_HIDDEN = ("fsdp", "ep_shard", "dp_replicate", "ep_replicate")
"""Groups whose collectives run beside the computation of another unit."""


@dataclass(frozen=True, slots=True)
class Published:
    """What somebody else measured.

    Args:
        title: model and code.
        device: name of the device, as in `Device.name`.
        ranks: how many.
        tflops: 10¹² FLOP/s of the model on each device, recomputation not counted.
        attention_efficiency: part of the FLOP/s that its attention kernel reaches.
        reached: part of this module's roofline, with that kernel and for the same work, that it is.
        source: where it stands.
    """

    title: str
    device: str
    ranks: int
    tflops: float
    attention_efficiency: float
    reached: float
    source: str


_DFM = "https://github.com/NVIDIA-NeMo/DFM/blob/main/docs/performance-summary.md"
_H100 = "NVIDIA H100 SXM 80 GB"
PUBLISHED = (
    Published("Wan2.1-14B, 37,440 tokens, FSDP2 alone", _H100, 8, 175.88, 0.37, 0.66, _DFM),
    Published("Wan2.1-14B, 37,440 tokens, Megatron TP 2 · CP 4", _H100, 128, 325.77, 0.60, 0.80, _DFM),
)
"""docs/choose-a-parallelism.md shows how the last column came about."""


def step_time(
    costs: StepCosts, collectives: Iterable[Collective], device: Device, sizes: ParallelSizes
) -> StepTime:
    """The seconds of one optimizer step of a rank.

    Args:
        costs: of the rank.
        collectives: of the rank, from `step_collectives`.
        sizes: of the mesh. The stages of a pipeline wait for the first and the last micro batch (arXiv:2104.04473,
            section 2.2).
    """
    flops, plan = costs.flops, costs.plan
    rate = device.flops(_compute_bytes(plan))
    matmul, attention = rate * device.matmul_efficiency, rate * device.attention_efficiency
    forward = (flops.forward - flops.attention_forward) / matmul + flops.attention_forward / attention
    computed = (flops.total - flops.attention) / matmul + flops.attention / attention
    memory = device.memory_bandwidth * device.bandwidth_efficiency
    moved = sum(unit.moved_bytes * unit.count for unit in costs.units) * costs.micro_batches
    other = (moved + _optimizer_bytes(costs, plan)) / memory
    ahead = behind = alone = 0.0
    for one in collectives:
        rate = device.bandwidth(one.kind, one.ranks, one.stride) * device.bandwidth_efficiency
        seconds = one.bytes / rate
        if one.group not in _HIDDEN:
            alone += seconds
        elif one.what == FORWARD:
            ahead += seconds
        else:
            behind += seconds
    # The first unit's gather and the last one's reduction have nothing to hide behind.
    units = max(1, sum(unit.count for unit in costs.units)) * costs.micro_batches
    exposed = max(ahead / units, ahead - forward) + max(behind / units, behind - (computed - forward))
    host = _host_seconds(costs, device)
    exposed += alone + max(0.0, host - computed)
    busy = computed + other + exposed
    return StepTime(
        matmul=(flops.total - flops.attention) / matmul,
        attention=flops.attention / attention,
        communication=ahead + behind + alone + host,
        exposed=exposed,
        idle=busy * (sizes.pp - 1) / (costs.micro_batches * sizes.vpp),
        other=other,
    )


def model_tflops(costs: StepCosts, seconds: float) -> float:
    """10¹² FLOP/s of a device, counted as published ones are: a backward pass is twice a forward pass, and nothing is
    recomputed (PaLM, arXiv:2204.02311, appendix B). Of a model that is partly frozen, what its passes compute.
    """
    return min(costs.flops.model, 3 * costs.flops.forward) / seconds / 1e12


def _compute_bytes(plan: ShardingPlan) -> int:
    dtype = plan.param_dtype
    if dtype is None:
        dtype = next((p.dtype for unit in (plan.root, *plan.units) for p in unit.parameters), None)
    return 4 if dtype is None else dtype.itemsize


def _optimizer_bytes(costs: StepCosts, plan: ShardingPlan) -> int:
    """AdamW reads parameters, gradients and two states, and writes all but the gradients; an average of the weights is a third
    state.
    """
    if plan.offload_to_cpu:
        return 0
    steady = costs.steady
    trained = steady.optimizer // costs.optimizer_states
    return 2 * trained + trained + 2 * steady.optimizer


def _host_seconds(costs: StepCosts, device: Device) -> float:
    """Copies to and from host memory. The optimizer's own time there is not counted.

    Shards come up for each gather, forward and backward, and gradients go down: as much as three of the four equal parts
    that are there (parameters, gradients, two states). Activations that wait there go and come.
    """
    moved = costs.timeline.host_bytes * 3 / 4 + 2 * costs.timeline.host_activation_bytes
    return moved * costs.micro_batches / (device.host_bandwidth * device.bandwidth_efficiency)
