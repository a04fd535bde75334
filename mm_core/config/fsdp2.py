"""`fsdp2.yaml`: how the trained model is sharded.

Where MindSpeed-MM's documentation and code disagree about a default, the choice stands in the field's
description.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from mm_core.config.dtypes import DType
from mm_core.config.keys import NoEffect, Only
from mm_core.config.patterns import pattern_problem
from mm_core.config.section import SectionModel


def _well_formed(pattern: str) -> str:
    problem = pattern_problem(pattern)
    if problem is not None:
        raise PydanticCustomError("invalid_value", "{why}", {"why": problem})
    return pattern


Pattern = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_well_formed)]
_NO_EXPERTS = "experts are distributed only by an expert_parallel_size above 1"
PATTERN_FIELDS = (
    "sub_modules_to_wrap",
    "ignored_modules",
    "recompute_modules",
    "offload_activations",
    "compile_modules",
    "moe_modules",
)
"""The fields that hold patterns, each a tuple or None."""


class Fsdp2Config(SectionModel):
    """How the trained model is sharded by FSDP2. A list of patterns that is given replaces the registered sharding policy's; `[]`
    means none.

    A pattern is a dotted module path that starts at the model (`predictor.blocks.{*}`); `{*}` is every
    index, `{0-3,7}` are some.

    MindSpeed-MM's documentation and code disagree about `pin_memory`, `num_to_backward_prefetch` and a `sharding_size`
    of null; what is done here stands at the key.
    """

    sharding_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"] | None,
        Field(
            description="Ranks that share one copy of the parameters; must divide the number of "
            "ranks. 1 replicates. "
            "`auto`, null and leaving it out mean all ranks (MindSpeed-MM reads null as 1, which "
            "shards nothing)."
        ),
    ] = "auto"
    sub_modules_to_wrap: Annotated[
        tuple[Pattern, ...] | None, Field(description="Modules that become FSDP units, in forward order.")
    ] = None
    reshard_after_forward: Annotated[
        bool | Annotated[int, Field(ge=2)],
        Field(
            description="true frees gathered parameters after the forward pass (ZeRO-3), false keeps "
            "them for the backward "
            "pass (ZeRO-2), a number keeps them sharded over that many ranks."
        ),
    ] = True
    param_dtype: Annotated[
        DType | None,
        Only(
            None, "bf16", "fp32", "fp64", reason="fp16 needs loss scaling, which is not available; use bf16"
        ),
        Field(description="Format of compute; None is the parameters' own. Master weights are fp32."),
    ] = None
    reduce_dtype: Annotated[
        DType | None, Field(description="Format of the gradients' reduction; None is param_dtype.")
    ] = None
    output_dtype: Annotated[
        DType | None, Field(description="Format to which the root's outputs are cast; None: no cast.")
    ] = None
    cast_forward_inputs: Annotated[bool, Field(description="Cast the forward's inputs to param_dtype.")] = (
        True
    )
    offload_to_cpu: Annotated[
        bool, Field(description="Keep sharded parameters, gradients and optimizer states in host memory.")
    ] = False
    pin_memory: Annotated[
        bool,
        NoEffect(
            "it is the memory of offload_to_cpu, which is off",
            quiet_for=(False,),
            when=("offload_to_cpu", False),
        ),
        Field(
            description="Page-locked memory, for offload_to_cpu only. Off as documented "
            "(MindSpeed-MM's code: on)."
        ),
    ] = False
    offload_idle_predictor: Annotated[
        bool,
        NoEffect(
            "offload_to_cpu keeps both predictors there",
            quiet_for=(False,),
            when=("offload_to_cpu", True),
        ),
        Field(
            description="Of two predictors that are trained in one job, keep the one that is not at work in host memory: "
            "its parameters, gradients, momenta and averages."
        ),
    ] = False
    num_to_forward_prefetch: Annotated[
        int, Field(ge=0, description="Units that are gathered ahead in the forward pass.")
    ] = 0
    num_to_backward_prefetch: Annotated[
        int,
        Field(
            ge=0,
            description="Units that are gathered ahead in the backward pass; 0 leaves it to FSDP2, "
            "which gathers one ahead. 0 as in "
            "MindSpeed-MM's code (its documentation: 1).",
        ),
    ] = 0
    ignored_modules: Annotated[
        tuple[Pattern, ...] | None, Field(description="Modules that stay whole on each rank.")
    ] = None
    recompute_modules: Annotated[
        tuple[Pattern, ...] | None,
        Field(description="Modules whose activations are computed again in backward."),
    ] = None
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None,
        Field(
            description="How modules are recomputed: `full` keeps only their inputs; `selective` also keeps the results of "
            "matrix products and attention, and recomputes the rest. Without recompute_modules: the policy's modules, "
            "else all units."
        ),
    ] = None
    recompute_num_layers: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Recompute only the first of the modules; null is all."),
    ] = None
    offload_activations: Annotated[
        tuple[Pattern, ...] | None,
        Field(description="Modules whose saved activations wait for backward in host memory."),
    ] = None
    compile_modules: Annotated[
        tuple[Pattern, ...] | None,
        Field(
            description="Modules whose forward is compiled by torch.compile, each by itself: blocks of one class are compiled "
            "once. The first steps take longer; without it everything runs as it is written."
        ),
    ] = None
    use_reentrant: Annotated[
        bool,
        Field(
            description="The older form of recomputation. Off (MindSpeed-MM's documentation and code: on): the newer one "
            "gives the same gradients, and "
            "right ones where the older fails."
        ),
    ] = False
    align_fsdp_param_groups: Annotated[
        bool,
        Field(
            description="Put the norms and gates that the policy names in a group of their own, which stays gathered, so "
            "that the other groups hold linear layers only."
        ),
    ] = False
    expert_parallel_size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="Ranks that share the experts of one layer; must divide their number. null is 1 "
            "(MindSpeed-MM stops at null)."
        ),
    ] = 1
    reshard_local_experts: Annotated[
        bool,
        NoEffect(_NO_EXPERTS, quiet_for=(True,), when=("expert_parallel_size", 1)),
        Field(description="Free gathered experts after the forward pass."),
    ] = True
    moe_modules: Annotated[
        tuple[Pattern, ...] | None,
        NoEffect(_NO_EXPERTS, quiet_for=(None, (), []), when=("expert_parallel_size", 1)),
        Field(
            description="Modules that hold experts, which expert_parallel_size distributes: dimension 0 of their parameters "
            "counts the experts."
        ),
    ] = None

    _fillers: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def filled(self, values: Mapping[str, Any], by: str) -> Self:
        """A copy with keys that the file leaves open, filled by a flag (`--bf16`)."""
        copy = self.model_copy(update=dict(values))
        copy._fillers = {**self._fillers, **dict.fromkeys(values, by)}
        return copy

    def source(self, key: str) -> str | None:
        """Who wrote a key: `fsdp2.yaml`, or the flag that filled it; None: nobody, it has its default."""
        return self._fillers.get(key, "fsdp2.yaml") if key in self.model_fields_set else None

    def shard_group_size(self, world_size: int) -> int:
        """Return how many ranks share one copy of the parameters, out of `world_size` data-parallel ranks."""
        return self.sharding_size if isinstance(self.sharding_size, int) else world_size
