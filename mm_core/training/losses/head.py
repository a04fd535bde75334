"""A language model's head that computes losses in place of logits, a chunk of tokens at a time.

The head is called by the network as ever, so that its weight is gathered by the hooks of its own FSDP unit, or of the one
that it shares with the embedding; what it returns stands where the network returns logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from mm_core.config.transformers_model import LossConfig
from mm_core.sharding.collectives import with_summed_gradient
from mm_core.sharding.context import ContextParallel
from mm_core.training.losses.chunked import chunked_cross_entropy, has_torch_kernel, torch_cross_entropy
from mm_core.training.losses.weights import IGNORED, UNIFORM
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

_SIZES = {"chunk": 1024, "dynamic_chunk": 4096}


@dataclass(frozen=True)
class Wanted:
    """Of which tokens the next call of the head is to compute losses.

    Args:
        targets: `[B, S]`, `IGNORED` where nothing is learnt.
        weights: of the tokens, `[B, S]` fp32.
        owners: of which sample or document each is, `[B, S]`; None: each row is a sample.
        count: number of these.
        rows: places in the flattened tokens that are learnt, `[T]`; None: all are computed.
        context: of the ranks that share each sequence; they have the features of their own tokens.
    """

    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor | None
    count: int
    rows: torch.Tensor | None
    context: ContextParallel | None


class LossHead:
    """Takes the place of the forward pass of a network's head, which is a `Linear`.

    Args:
        network: of transformers, sharded or not.
        loss: whose `compute_mode` is not `default`.

    Attributes:
        wanted: losses that are to be computed; None: the head gives logits.

    Raises:
        UserError: the network has no head that is a `Linear`, or changes its logits afterwards.
    """

    def __init__(self, network: Any, loss: LossConfig) -> None:
        self.network, self.mode = network, loss.compute_mode
        self.chunk = loss.chunk_size or _SIZES[self.mode]
        self.uniform = loss.loss_type in UNIFORM
        self.wanted: Wanted | None = None
        self._told = False
        head = network.get_output_embeddings()
        self._refuse_recomputed(head)
        name = type(network).__name__
        config = network.config.get_text_config()
        # Gemma's, Granite's and Cohere's.
        changed = [
            key
            for key in ("final_logit_softcapping", "logits_scaling", "logit_scale")
            if getattr(config, key, None)
        ]
        if not isinstance(head, nn.Linear) or changed:
            why = f"changes its logits ({changed[0]})" if changed else f"ends in a {type(head).__name__}"
            raise UserError(
                f"loss_cfg.compute_mode is {self.mode}, but {name} {why}, so its loss needs all logits; write default"
            )
        self.head: nn.Linear = head
        self._logits = head.forward
        head.forward = self._forward  # so that hooks see it as the head's own work

    def check(self) -> None:
        """See to it that the network still calls this head.

        Raises:
            UserError: it is recomputed, or another module has taken its place.
        """
        head = self.network.get_output_embeddings()
        if head is None or head is self.head:  # None: of a pipeline stage without a head
            return
        self._refuse_recomputed(head)
        raise UserError(
            f"loss_cfg.compute_mode is {self.mode}, but a {type(head).__name__} has taken the place of the head (LoRA on it, "
            "for one); write default"
        )

    def _refuse_recomputed(self, head: object) -> None:
        if hasattr(head, "_checkpoint_wrapped_module"):
            raise UserError(
                f"loss_cfg.compute_mode is {self.mode}, with which the head keeps no logits, but fsdp2.yaml recomputes it; "
                "take it out of the modules that are recomputed"
            )

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Losses of each sample, `[count]` fp32, from features `[B, S, H]`; `[1]` where torch's kernel gives their sum only."""
        wanted = self.wanted
        if wanted is None:
            return self._logits(hidden)
        weight, bias = self.head.weight, self.head.bias
        if not isinstance(weight, DTensor):
            return self._losses(hidden, weight, bias, wanted, None)
        # Ranks that share tensors have parts of the vocabulary, and each the same features.
        mesh = weight.device_mesh
        if weight.placements != (Shard(0),):
            raise UserError(
                f"loss_cfg.compute_mode is {self.mode}, which needs a head that is cut by its outputs; write default"
            )
        inside = isinstance(hidden, DTensor)  # the cut was made around this
        own = hidden.to_local(grad_placements=[Partial()]) if inside else with_summed_gradient(hidden, mesh)
        own_bias = bias.to_local() if isinstance(bias, DTensor) else bias
        sums = self._losses(own, weight.to_local(), own_bias, wanted, mesh.get_group())
        return DTensor.from_local(sums, mesh, [Replicate()], run_check=False) if inside else sums

    def _losses(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: Wanted,
        group: Any,
    ) -> torch.Tensor:
        chunk = self.chunk * (hidden.shape[0] if self.mode == "chunk" else 1)
        owners = wanted.owners
        if owners is None:
            owners = torch.arange(wanted.count, device=hidden.device)[:, None].expand_as(wanted.targets)
        own = [wanted.targets, wanted.weights, owners]
        if wanted.context is not None:
            own = [wanted.context.split(one) for one in own]
        targets, weights, owners = (one.flatten() for one in own)
        hidden = hidden.flatten(0, 1)
        if wanted.rows is not None:
            hidden = hidden.index_select(0, wanted.rows)
            targets, weights, owners = (
                one.index_select(0, wanted.rows) for one in (targets, weights, owners)
            )
        torchs = self._by_torch(hidden, wanted, group)
        self._tell(chunk, torchs)
        if torchs:
            return torch_cross_entropy(hidden, weight, bias, targets, chunk).view(1)
        # Its weight is 0, and any token of the vocabulary will do.
        targets = torch.where(targets == IGNORED, 0, targets)
        return chunked_cross_entropy(
            hidden, weight, bias, targets, weights, owners, wanted.count, chunk, group
        )

    def _by_torch(self, hidden: torch.Tensor, wanted: Wanted, group: Any) -> bool:
        """Whether torch's own operation serves: it gives one sum, in the dtype of the features, of rows that count the same;
        and it cannot be looked into by `mm plan`.
        """
        return (
            has_torch_kernel()
            and self.uniform
            and group is None
            and torch.is_grad_enabled()
            and type(hidden) is torch.Tensor
            and hidden.dtype == torch.float32
            and len(hidden) > 0
        )

    def _tell(self, chunk: int, torchs: bool) -> None:
        if not self._told:
            self._told = True
            which = "torch's linear_cross_entropy" if torchs else "our chunked cross entropy"
            log.info("loss: %s, the logits of %d tokens at a time (%s)", which, chunk, self.mode)
