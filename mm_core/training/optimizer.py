"""The optimizer of a job: AdamW with fp32 states over fp32 (sharded) master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mm_core.config import TrainFlags
from mm_core.training.gradients import by_mesh
from mm_core.training.parameter_groups import GroupSettings
from mm_core.weights.agreement import everywhere
from mm_registry.errors import UserError


class ShardedAdamW(torch.optim.AdamW):
    """AdamW over parameters on several device meshes, which torch's kernels over lists do not mix.

    The parameter groups do not depend on how the parameters are sharded: a checkpoint can be resumed on another mesh. A group
    may have a factor `lr_mult`, see `set_learning_rate`.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; see `torch.optim.AdamW`."""
        whole = [group["params"] for group in self.param_groups]
        parts = [by_mesh(parameters, parameters) for parameters in whole]
        if closure is not None or all(len(part) <= 1 for part in parts):
            return super().step(closure)
        try:
            for i in range(max(map(len, parts))):
                for group, part in zip(self.param_groups, parts, strict=True):
                    group["params"] = part[i] if i < len(part) else []
                super().step()
        finally:
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters
        return None


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    flags: TrainFlags,
    *,
    settings: Mapping[torch.nn.Parameter, GroupSettings] | None = None,
    skips_on_device: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the fields of the command line, fused.

    The fused kernel exists on CPU, CUDA and NPU and runs on DTensors' local shards; the loop sets the learning
    rate each step. All ranks call this.

    Args:
        parameters: a tied one may come twice. A pipeline stage whose part of the model is frozen has none.
        settings: from `group_settings`; those of the flags for parameters that are not in it.
        skips_on_device: the optimizer must honour `found_inf`, as only the fused one does.

    Raises:
        UserError: on every rank, if no rank has any.
    """
    trained = list(dict.fromkeys(p for p in parameters if p.requires_grad))
    plain = GroupSettings(1.0, flags.weight_decay)
    by_settings: dict[GroupSettings, list[torch.nn.Parameter]] = {}
    for parameter in trained:
        by_settings.setdefault((settings or {}).get(parameter, plain), []).append(parameter)
    every = everywhere((bool(trained), list(by_settings)))
    if not any(some for some, _ in every):
        raise UserError(
            "every parameter of the model is frozen, so there is nothing to train; leave one trainable"
        )
    # The same groups on each pipeline stage, whose checkpoint is one. torch refuses a bare list that is empty.
    groups = sorted({one for _, theirs in every for one in theirs}, key=lambda one: (one != plain, one))
    return ShardedAdamW(
        [
            {"params": by_settings.get(one, []), "lr_mult": one.lr_mult, "weight_decay": one.weight_decay}
            for one in groups
        ],
        lr=flags.lr,
        betas=(flags.adam_beta1, flags.adam_beta2),
        eps=flags.adam_eps,
        weight_decay=flags.weight_decay,
        fused=skips_on_device or flags.optimizer_selection == "fused_torch_adamw",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step: `rate` times the factor of each group, as in Megatron-LM."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
