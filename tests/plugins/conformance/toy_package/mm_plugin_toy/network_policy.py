from mm_core.sharding.policy import ShardingPolicy

TOY_NET = ShardingPolicy(
    units=("embed", "layers.{*}", "head"), aligned=("layers.{*}.norm",), aliases={"blocks.{*}": "layers.{*}"}
)
