"""What one step of a training job costs a rank: built on the meta device, sharded by its own policy, traced on fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch import nn
from torch.utils._pytree import tree_map_only

import mm_core
from mm_core.config import TrainingJob
from mm_core.config.model import SECOND
from mm_core.models.factory import TRAINED, build_model
from mm_core.models.transformers_model import NETWORK
from mm_core.planning.frozen import frozen_components
from mm_core.planning.fsdp_memory import Layout
from mm_core.planning.memory import Keeping, steady_bytes, timeline
from mm_core.planning.model import Flops, StepCosts
from mm_core.planning.stages import Stage, stage_traces
from mm_core.planning.trace import trace_micro_batch
from mm_core.sharding.activations import offloaded_modules
from mm_core.sharding.apply import needs_sharding
from mm_core.sharding.mesh import build_parallel_mesh
from mm_core.sharding.plan import ShardingPlan
from mm_core.training.precheck import check_patterns
from mm_registry.errors import UserError
from mm_registry.words import described


def step_costs(job: TrainingJob, world: int) -> StepCosts:
    """Trace one micro batch of a job as its first rank has it, and compose a step of it.

    There must be no process group; a fake one of `world` ranks is there meanwhile.

    Raises:
        UserError: the model cannot be built, sharded over these ranks, or traced.
    """
    components = {name: c for name, c in job.components.items() if name in (*TRAINED, "diffusion")}
    model: Any = build_model(components, device="meta", hooks=job.hooks)
    balanced = bool(getattr(model, "router_aux_loss_coef", 0.0))
    if balanced:
        model.router_aux_loss_coef = 0.0  # it reads what routers leave on the side, which stand-ins do not
    roots = {name: module for name in TRAINED if (module := getattr(model, name, None)) is not None}
    whole = sum(p.numel() for module in roots.values() for p in module.parameters() if p.requires_grad)
    frozen = frozen_components(job)
    sizes = job.parallel
    plans = check_patterns(job.components, roots, job.fsdp2, job.documents["fsdp2"], ranks=world, sizes=sizes)
    with fake_ranks(world):
        mesh = build_parallel_mesh(job.fsdp2, sizes)
        name = next(iter(plans))
        root, plan = roots[name], plans[name]
        shards = mesh.fsdp.size(-1)
        blocks = (
            [n for n, _ in root.get_submodule(plan.pipeline.blocks).named_children()] if plan.pipeline else []
        )
        wrapped = needs_sharding(root, plan, mesh.fsdp)
        layout = Layout(shards, mesh.fsdp.size() // shards, wrapped)
        micro_batches = job.flags.accumulation_steps(sizes.data_parallel(world))
        keeping = _keeping(job, micro_batches, frozen.bytes, plans, layout, name)
        task_class: Any = mm_core.TASK_MAPPINGS[job.components["task"].model_id]
        task = task_class(model, seed=job.flags.seed, device=torch.device("cpu"))
        batch = task_class.example_batch(
            job.components,
            batch_size=job.flags.micro_batch_size,
            sequence_length=getattr(job.flags, "seq_length", None),
            device="cpu",
        )
        tokens = task.tokens(batch) // (sizes.cp * sizes.tp)

        def forward(_: nn.Module, inputs: Any) -> tuple[Any, ...]:
            outputs = task.forward(model, inputs)
            losses, weights, metrics = task.loss(outputs, inputs)
            return losses.sum(), outputs, inputs, losses, weights, metrics

        try:
            trace = trace_micro_batch(
                root, plan, mesh.fsdp, forward, prepare=lambda: filled(batch), parallel=mesh
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{plan.full_path('')}: {type(root).__name__} cannot be traced without its values: {described(error)}"
            ) from error
    if sizes.pp > 1:
        assert plan.pipeline is not None
        stages = list(stage_traces(plan, trace, blocks, sizes, micro_batches))
    else:
        stages = [Stage(plan, trace)]
    lines = [timeline(stage.plan, stage.trace, layout, keeping) for stage in stages]
    fullest = max(range(len(stages)), key=lambda rank: lines[rank].peak_bytes)
    line, plan, trace = lines[fullest], stages[fullest].plan, stages[fullest].trace
    steady, _ = steady_bytes(plan, layout, trace.numel, keeping, trace.held)
    flops = Flops()
    for unit in trace.units:
        flops = flops + unit.flops.times(unit.count * micro_batches)
    everything = sum(p.numel() for module in roots.values() for p in module.parameters())
    return StepCosts(
        parameters=whole,
        frozen_parameters=everything - whole + frozen.numel,
        units=trace.units,
        timeline=line,
        steady=steady,
        flops=flops,
        plan=plan,
        numel=trace.numel,
        shards=shards,
        micro_batches=micro_batches,
        tokens=tokens,
        optimizer_states=keeping.optimizer_states,
        notes=(*frozen.notes, *_notes(job, balanced, plan), *_stage_notes(fullest, len(stages))),
    )


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of ranks that are not there, of which this is the first; its collectives do nothing."""
    # torch offers no public way; `FakeProcessGroup` is what its own tests of large meshes use.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor keeps how it dealt with each operation, meshes that are gone included, and takes another of the same sizes
        # for them: real ranks of this process would look for groups that are not there. There is no public way to forget.
        torch.distributed.tensor.debug._clear_sharding_prop_cache()


def filled(value: Any) -> Any:
    """Anew what a micro batch has: fake tensors inside a `FakeTensorMode`. Whole numbers keep their values, from which
    shapes may follow.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: filled(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        )
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.empty(t.shape, dtype=t.dtype) if t.is_floating_point() else t,
        value,
    )


def _keeping(
    job: TrainingJob,
    micro_batches: int,
    frozen: int,
    plans: Mapping[str, ShardingPlan],
    layout: Layout,
    traced: str,
) -> Keeping:
    """What a rank has beside the root that is traced: encoders, and a second predictor, which waits meanwhile."""
    flags = job.flags
    # A bad step is skipped on the device by the fused kernel alone.
    skips = bool(getattr(getattr(job.model, "patch", None), "clip_grad_async", False))
    fused = skips or flags.optimizer_selection == "fused_torch_adamw"
    keeping = Keeping(
        optimizer_states=2 + (flags.ema_decay is not None),
        optimizer_transient=0 if fused else 1,
        micro_batches=micro_batches,
    )
    other, states = frozen, 0
    for name, plan in plans.items():
        if name == traced or job.fsdp2.offload_idle_predictor:
            continue  # in host memory while another is at work
        steady, _ = steady_bytes(plan, layout, {}, keeping)
        gradients = steady.optimizer // keeping.optimizer_states
        other += steady.parameters + gradients
        states += steady.optimizer
    return dataclasses.replace(keeping, other_bytes=other, other_states=states)


def _notes(job: TrainingJob, balanced: bool, plan: ShardingPlan) -> tuple[str, ...]:
    notes = ["activations are those of an attention kernel that keeps no scores, such as flash attention"]
    if NETWORK not in job.components:
        notes.append("what encoders need while they run is not counted, only their parameters")
    inside = set(offloaded_modules(plan)) - {unit.path for unit in plan.units}
    if inside:
        notes.append(
            f"activations of {min(inside)} are counted as if they stayed on the device: offload_activations is planned "
            "for whole FSDP units"
        )
    if SECOND in job.components:
        waits = (
            "the other waits in host memory (offload_idle_predictor), but for validations and checkpoints"
            if job.fsdp2.offload_idle_predictor
            else "the other's parameters and gradients are counted with the parameters, its momenta with the optimizer"
        )
        notes.append(
            f"two experts share the micro batches of a step, which is planned as if one of them ran all; {waits}"
        )
    if balanced:
        notes.append("the loss that balances experts, and the routers' logits that it keeps, are not counted")
    dataset = job.components.get("dataset")
    read = dataset.fields.get("basic_parameters") if dataset is not None else None
    if isinstance(read, Mapping) and read.get("neat_packing"):
        notes.append(
            "a packed row is counted as one sample; attention within its samples alone computes less"
        )
    if job.parallel.ep > 1:
        notes.append("experts are taken to get equally many tokens")
    return tuple(notes)


def _stage_notes(fullest: int, stages: int) -> tuple[str, ...]:
    if stages == 1:
        return ()
    return (
        f"memory and FLOPs are those of pipeline stage {fullest + 1} of {stages}, which needs most memory",
    )
