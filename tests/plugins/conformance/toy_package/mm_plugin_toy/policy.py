from mm_core.sharding.policy import ShardingPolicy

TOY_DIT = ShardingPolicy(
    units=("blocks.{*}", "head"), aligned=("blocks.{*}.norm",), aliases={"layers.{*}": "blocks.{*}"}
)
