from mm_core.sharding.policy import PipelinePolicy, ShardingPolicy

TOY_DIT = ShardingPolicy(
    units=("blocks.{*}", "head"),
    aligned=("blocks.{*}.norm",),
    aliases={"layers.{*}": "blocks.{*}"},
    pipeline=PipelinePolicy("blocks", first=("embed", "time", "text"), last=("head",)),
)
