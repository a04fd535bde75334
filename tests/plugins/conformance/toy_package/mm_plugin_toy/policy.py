from mm_core.sharding.policy import ShardingPolicy

TOY_DIT = ShardingPolicy(units=("blocks.{*}", "head"), aliases={"layers.{*}": "blocks.{*}"})
