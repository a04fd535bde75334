"""Sharding: from a policy (data) and fsdp2.yaml to one checked plan, and from the plan to FSDP2."""

from mm_core._lazy import lazy_exports

__all__ = [
    "FSDP2Mixin",
    "ParameterInfo",
    "ShardingPlan",
    "ShardingPolicy",
    "Unit",
    "apply_plan",
    "build_device_mesh",
    "build_plan",
    "build_plans",
    "observe_plan",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FSDP2Mixin": "mm_core.sharding.mixin",
        "ParameterInfo": "mm_core.sharding.plan",
        "ShardingPlan": "mm_core.sharding.plan",
        "ShardingPolicy": "mm_core.sharding.policy",
        "Unit": "mm_core.sharding.plan",
        "apply_plan": "mm_core.sharding.apply",
        "build_device_mesh": "mm_core.sharding.mesh",
        "build_plan": "mm_core.sharding.build",
        "build_plans": "mm_core.sharding.build",
        "observe_plan": "mm_core.sharding.observe",
    },
)
