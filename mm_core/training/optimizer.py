"""The optimizer of a job: AdamW with fp32 states over fp32 (sharded) master weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mm_core.config import TrainFlags


def build_optimizer(parameters: Iterable[torch.nn.Parameter], flags: TrainFlags) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the fields of the command line, fused.

    The fused kernel exists on CPU, CUDA and NPU and runs on DTensors' local shards; the loop sets the learning
    rate each step.
    """
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=flags.lr,
        betas=(flags.adam_beta1, flags.adam_beta2),
        eps=flags.adam_eps,
        weight_decay=flags.weight_decay,
        fused=flags.optimizer_selection == "fused_torch_adamw",
    )
