"""The auxiliary loss that keeps a router from sending all tokens to few experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def router_losses(
    logits: Sequence[torch.Tensor],
    top_k: int,
    mask: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    owners: torch.Tensor | None = None,
    count: int | None = None,
) -> torch.Tensor:
    """The load-balancing loss of each sample, `[B]` fp32, or packed document, `[count]`: K if its tokens are dealt out
    evenly, up to E if not.

    `E Σ_e f_e P_e`, where f_e is the share of the sample's tokens that choose expert e, and P_e the mean of its probability,
    both over the tokens of all layers: equations 4 to 6 of the Switch Transformer (Fedus et al., arXiv:2101.03961) as
    transformers computes them (`load_balancing_loss_func`), there over all tokens of a micro batch together. Here they
    are taken sample by sample: f and P multiply each other, so that a loss over a batch would depend on which samples
    share a micro batch, and with it on the number of ranks and of accumulated micro batches. For micro batches of one
    sample both are the same. The mean over samples, weighted by their tokens, is then the same on any ranks.

    Only P has a gradient.

    Args:
        logits: of each layer's router, `[B * S, E]` or `[B, S, E]`, before the softmax.
        top_k: experts of a token.
        mask: which tokens count, `[B, S]`; padding does not.
        group: of ranks that share each sequence (context parallelism), each with other tokens of it: returned are then
            parts that add up to the loss.
        owners: of which document each token is, `[B, S]`, from 0 to `count - 1`; None: each row is a sample.
        count: number of documents.
    """
    batch, length = mask.shape
    if owners is None:
        owners = torch.arange(batch, device=mask.device)[:, None].expand(batch, length)
    samples = batch if count is None else count
    owner = owners.to(logits[0].device).reshape(-1)  # [B * S]
    counted = mask.to(logits[0].device, torch.float32).reshape(-1)  # [B * S]
    experts = logits[0].shape[-1]
    chosen = counted.new_zeros(samples * experts)
    probability = counted.new_zeros(samples, experts)
    for layer in logits:
        probabilities = torch.softmax(layer.float(), -1).view(-1, experts)  # [B * S, E]
        index = probabilities.detach().topk(top_k, -1).indices + owner[:, None] * experts  # [B * S, K]
        chosen = chosen.scatter_add(0, index.flatten(), counted[:, None].expand_as(index).flatten())
        probability = probability.index_add(0, owner, probabilities * counted[:, None])
    chosen = chosen.view(samples, experts)
    tokens = counted.new_zeros(samples).index_add(0, owner, counted)
    rows = tokens[:, None] * len(logits)  # [samples, 1]
    if group is not None:
        both = torch.cat([chosen, rows], 1)
        dist.all_reduce(both, group=group)
        chosen, rows = both[:, :experts], both[:, experts:]
    rows = rows.clamp(min=1)  # a sample in which no token counts has no loss
    return experts * (chosen / rows * (probability / rows)).sum(1)
