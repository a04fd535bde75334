"""Three tiny models and the global batches that they are trained on: Wan, a dense transformer with tied embeddings,
a transformer of experts.

Each is built on the meta device, and knows its sharding policy and its loss. Every rank can make the whole
global batch of a step and takes its share of it, so the same batch is trained on by any number of ranks and
micro batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_core.accelerator import Accelerator
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.sharding.offload import Offloader, OffloadWrapper
from tests.distributed.tiny import SIZES

BATCH = 8  # samples of a global batch: 4 ranks with 2 micro batches of one sample each
VOCABULARY, LENGTH = 96, 12
Batch = dict[str, torch.Tensor]

_TRANSFORMER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "use_cache": False,  # with it, reentrant recomputation appends to the cache a second time
    "attn_implementation": "sdpa",
    "pad_token_id": None,
}


def _of_each(batch: Batch, part: slice) -> Batch:
    return {name: tensor[part] for name, tensor in batch.items()}


@dataclass(frozen=True)
class TinyModel:
    """A model, how it is sharded, and what it learns.

    Args:
        make: build it on the current default device.
        batch: the global batch of a step; dimension 0 of each tensor is the sample.
        losses: of a module and a part of the batch: summed loss and weight of each sample, `[B]` both. What is
            trained on is the sum of the losses over the sum of the weights of the whole global batch.
        blocks: pattern of the blocks; `parts` of one module inside each; `attention` of another; `frozen` of what can
            be frozen and ignored.
        take: some samples of the global batch.
    """

    name: str
    make: Callable[[], nn.Module]
    policy: ShardingPolicy
    batch: Callable[[int], Batch]
    losses: Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
    blocks: str
    parts: str
    attention: str
    frozen: str
    take: Callable[[Any, slice], Batch] = _of_each

    def build(self, device: str = "meta") -> nn.Module:
        """The bare module."""
        with torch.device(device):
            return self.make()

    def composite(self, device: str = "meta") -> Composite:
        """The module as the predictor of a composite, not sharded yet."""
        return Composite(self.build(device), self.policy)

    def loss(
        self, module: nn.Module, step: int, rank: int = 0, world: int = 1, micro: int = 0, micros: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss (with a graph) and weight of one micro batch of a rank, both 0-d."""
        per_rank = BATCH // world
        size = per_rank // micros
        first = rank * per_rank + micro * size
        Dropout.samples = slice(first, first + size)
        torch.manual_seed(step)
        losses, weights = self.losses(module, self.take(self.batch(step), Dropout.samples))
        return losses.sum(), weights.sum()


class Dropout:
    """A hook that drops a third of a module's output, the same numbers on any ranks: it draws for the whole global
    batch, and takes its own samples' part.
    """

    samples = slice(0, BATCH)

    def __call__(self, module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        mask = F.dropout(torch.ones(BATCH, *output.shape[1:]), 1 / 3)
        return output * mask[self.samples].to(output)


def force_offload(model: nn.Module) -> Offloader:
    """Let the CPU's own memory play a device's: what is offloaded on a device is copied here too."""
    offloader = Offloader(Accelerator("cpu"), min_bytes=1, force=True)
    for module in model.modules():
        if isinstance(module, OffloadWrapper):
            assert module.offloader is None  # what a CPU gets
            module.offloader = offloader
    return offloader


class Composite(nn.Module, FSDP2Mixin):
    """A trained predictor beside a frozen encoder, as in a real model."""

    def __init__(self, predictor: nn.Module, policy: ShardingPolicy) -> None:
        super().__init__()
        self.predictor: Any = predictor
        self.ae = nn.Linear(2, 2).requires_grad_(False)
        self._policy = policy

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": self._policy}


def optimizer_of(module: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, as a job without further flags has it."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)


def _flow_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return {
        "video": torch.randn(BATCH, 4, 2, 8, 8, generator=generator),
        "noise": torch.randn(BATCH, 4, 2, 8, 8, generator=generator),
        "sigma": torch.rand(BATCH, generator=generator),
        "text": torch.randn(BATCH, 6, 32, generator=generator),
    }


def _flow_losses(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    s = batch["sigma"].view(-1, 1, 1, 1, 1)
    noised = (1 - s) * batch["video"] + s * batch["noise"]
    prediction = module(noised, batch["sigma"] * 1000, batch["text"], return_dict=False)[0]
    losses = (prediction.float() - (batch["noise"] - batch["video"])).square().flatten(1).mean(1)
    return losses, torch.ones_like(losses)


def _token_batch(step: int) -> Batch:
    """Random tokens; samples differ in how many of theirs count, so micro batches differ in weight."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    counted = torch.randint(3, LENGTH, (BATCH, 1), generator=generator)
    return {"ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) >= counted, -100)}


def _token_losses(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = module(input_ids=batch["ids"], use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum(1), (labels >= 0).sum(1).float()


_NORMS = ("model.layers.{*}.input_layernorm", "model.layers.{*}.post_attention_layernorm", "model.norm")


def _dense() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**_TRANSFORMER, tie_word_embeddings=True))


def moe(implementation: str = "eager") -> nn.Module:
    """The transformer of 8 experts, of which 2 see each token.

    Args:
        implementation: transformers' `experts_implementation`: `eager`, `batched_mm` or `grouped_mm`.
    """
    # No side of an expert's matrix is as long as another: transformers tells them apart by their lengths.
    config = Qwen3MoeConfig(
        **_TRANSFORMER,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        experts_implementation=implementation,
    )
    return Qwen3MoeForCausalLM(config)


WAN = TinyModel(
    "wan",
    lambda: WanTransformer3DModel(**SIZES),
    ShardingPolicy(
        units=("blocks.{*}", "proj_out"),
        aligned=("blocks.{*}.attn1.norm_q", "blocks.{*}.attn1.norm_k"),
        aliases={"head": "proj_out"},
    ),
    _flow_batch,
    _flow_losses,
    blocks="blocks.{*}",
    parts="blocks.{*}.ffn",
    attention="blocks.{*}.attn1",
    frozen="condition_embedder.text_embedder",
)
DENSE = TinyModel(
    "dense",
    _dense,
    ShardingPolicy(units=("model.layers.{*}",), aligned=_NORMS),
    _token_batch,
    _token_losses,
    blocks="model.layers.{*}",
    parts="model.layers.{*}.mlp",
    attention="model.layers.{*}.self_attn",
    frozen="model.layers.{*}.self_attn.v_proj",
)
MOE = TinyModel(
    "moe",
    moe,
    ShardingPolicy(units=("model.layers.{*}",), experts=("model.layers.{*}.mlp.experts",), aligned=_NORMS),
    _token_batch,
    _token_losses,
    blocks="model.layers.{*}",
    parts="model.layers.{*}.mlp",
    attention="model.layers.{*}.self_attn",
    frozen="model.layers.{*}.mlp.gate",
)
MODELS = {model.name: model for model in (WAN, DENSE, MOE)}
