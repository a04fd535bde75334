"""`ShardingPolicy`: how a component wants to be sharded, as data. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal

from mm_core.config.findings import show
from mm_core.config.patterns import syntax_problem
from mm_core.sharding.context_policy import ContextPolicy, context_policy_problem

#: How tensor parallelism cuts a layer, by the names that transformers gives it (`transformers.distributed.tensor_parallel`).
TENSOR_STYLES = (
    "colwise",
    "colwise_rep",
    "colwise_gather_output",
    "rowwise",
    "rowwise_rep",
    "rowwise_split_input",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
    "moe_tp_experts",
    "replicate",
)


@dataclass(frozen=True, slots=True)
class PipelinePolicy:
    """How a component is cut into pipeline stages.

    Its blocks run one after the other, and every stage has some of them. The component brings two methods for the
    rest (see `mm_core.sharding.pipeline.PipelineComponent`): a `forward` that runs one stage, and the shapes of what one
    stage hands to the next. Modules and parameters keep their names on whichever stage they are.

    Args:
        blocks: path of the `ModuleList` of the blocks.
        first, last: paths of the modules and parameters that only the first stage, or only the last one, has. Modules
            without parameters need no mention: every stage has them.
    """

    blocks: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardingPolicy:
    """What an author knows about sharding a component; a field in fsdp2.yaml overrides the one here.

    Patterns are relative to the component, in the grammar of `mm_core.sharding.patterns`: `blocks.{*}`,
    `blocks.{0-19}.attn1`.

    Args:
        units: modules whose parameters are gathered together, in the order in which the forward pass runs
            them (prefetching follows it). The root takes what is left. Empty: the blocks are found by
            structure (every `ModuleList` of at least two modules of one class).
        recompute: modules whose activations are computed again in the backward pass.
        recompute_granularity: how the modules of `recompute` are recomputed, as in fsdp2.yaml.
        recompute_num_layers: recompute only the first of them.
        offload_activations: modules whose saved activations wait for the backward pass in host memory.
        compiled: modules whose forward is compiled by `torch.compile` (`compile_modules`).
        ignored: frozen modules that are not sharded.
        keep_gathered: units (from the list above) that stay gathered between forward and backward, whatever
            `reshard_after_forward` says.
        experts: modules whose parameters hold one expert an index of dimension 0 (`moe_modules`).
        aligned: norms, gates and other small modules that `align_fsdp_param_groups` puts in one unit of their
            own, which stays gathered.
        aliases: module paths that users bring from elsewhere -> ours: `{"head": "proj_out",
            "blocks.{*}.self_attn": "blocks.{*}.attn1"}`.
        fp32_inputs: names of the component's forward arguments that keep their dtype when mixed precision
            casts the others to `param_dtype`. bf16 has 8 significant bits: it would move the timestep 937.5
            to 936.
        joint_vision: modules of transformers that would call their vision tower once for images and once for videos, so that
            ranks gather it more or less often: they see both in one call (see `mm_core.sharding.joint_vision`), which then
            comes before the embedding of tokens, and so do its `units`.
        tensor: layers that tensor parallelism cuts, beside those that the `tp_plan` of transformers' own classes names, and
            how: `{"blocks.{*}.mlp.fc1": "colwise", "blocks.{*}.mlp.fc2": "rowwise"}` (see `mm_core.sharding.tensor`).
        context: where sequences are split over ranks (context parallelism); without it, they cannot be.
        pipeline: where the component can be cut into pipeline stages; without it, it cannot.
        reshard_after_forward, …, align_fsdp_param_groups: what fsdp2.yaml has for the keys of these names when
            it does not write them; None leaves the key's own default.
    """

    units: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    keep_gathered: tuple[str, ...] = ()
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_num_layers: int | None = None
    offload_activations: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fp32_inputs: tuple[str, ...] = ("timestep",)
    joint_vision: tuple[str, ...] = ()
    tensor: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    context: ContextPolicy | None = None
    pipeline: PipelinePolicy | None = None
    reshard_after_forward: bool | int | None = None
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    output_dtype: str | None = None
    num_to_forward_prefetch: int | None = None
    num_to_backward_prefetch: int | None = None
    align_fsdp_param_groups: bool | None = None


def policy_problem(policy: ShardingPolicy) -> str | None:
    """Return what is wrong with the types and values of a policy, which Python does not check: a part of a sentence that
    begins with the field; None if nothing is. Whether the modules exist is the plan's to find out.
    """
    from mm_core.config.document import Document
    from mm_core.config.fsdp2 import Fsdp2Config
    from mm_core.config.section import check_section

    written = {}
    for one in fields(policy):
        value = getattr(policy, one.name)
        if one.name == "aliases":
            problem = _aliases_problem(value)
        elif one.name == "tensor":
            problem = _styles_problem(value)
        elif str(one.type).startswith("tuple"):
            problem = _names_problem(value, patterns=one.name != "fp32_inputs")
        elif one.name == "context":
            problem = context_policy_problem(value)
        elif one.name == "pipeline":
            problem = _pipeline_problem(value)
        else:
            problem = None
            if value is not None:
                written[one.name] = value
        if problem is not None:
            return f"{one.name}: {problem}"
    for finding in check_section(Fsdp2Config, Document.from_data(written)).findings:
        if finding.level == "error":
            return f"{finding.message}. {finding.suggestion}".removesuffix(" ").removesuffix(".")
    return None


def _names_problem(value: object, *, patterns: bool) -> str | None:
    if isinstance(value, str):
        return f"{show(value)} is one text, expected a tuple of them; write ({show(value)},)"
    if not isinstance(value, tuple | list):
        return f"{show(value)} is of type {type(value).__name__}, expected a tuple of texts"
    for item in value:
        if not isinstance(item, str):
            return f"{show(item)} is of type {type(item).__name__}, expected a text"
        if patterns and (problem := syntax_problem(item)) is not None:
            return f"{show(item)}: {problem}"
    return None


def _aliases_problem(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return f"{show(value)} is of type {type(value).__name__}, expected a mapping from their paths to ours"
    return _names_problem((*value, *value.values()), patterns=True)


def _styles_problem(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return f"{show(value)} is of type {type(value).__name__}, expected a mapping from patterns to styles"
    wrong = next((style for style in value.values() if style not in TENSOR_STYLES), None)
    if wrong is not None:
        return f"{show(wrong)} is no style; use one of {', '.join(TENSOR_STYLES)}"
    return _names_problem(tuple(value), patterns=True)


def _pipeline_problem(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, PipelinePolicy):
        return f"{show(value)} is of type {type(value).__name__}, expected a PipelinePolicy"
    if not isinstance(value.blocks, str):
        return f"blocks is {show(value.blocks)}, expected the path of a ModuleList"
    for name in ("first", "last"):
        problem = _names_problem(getattr(value, name), patterns=False)
        if problem is not None:
            return f"{name}: {problem}"
    return None
