from mm_core.sharding.context_policy import ContextPolicy
from mm_core.sharding.policy import PipelinePolicy, ShardingPolicy

TOY_DIT = ShardingPolicy(
    units=("blocks.{*}", "head"),
    aligned=("blocks.{*}.norm",),
    aliases={"layers.{*}": "blocks.{*}"},
    context=ContextPolicy(
        attention=("blocks.{*}.attend",), split_inputs={"blocks.0": {"tokens": 1}}, gather_outputs={"head": 1}
    ),
    pipeline=PipelinePolicy("blocks", first=("embed", "time", "text"), last=("head",)),
)
