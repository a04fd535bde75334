"""Training a language model, with or without images: predict each token from those before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mm_core.config.component import ComponentConfig
from mm_core.config.document import expanded
from mm_core.config.latents import read_hf_config
from mm_core.config.transformers_model import TransformersFamilyConfig
from mm_core.models.transformers_model import NETWORK, TransformersModel
from mm_core.sharding.context import context_of
from mm_core.training.tasks.base import LossParts
from mm_core.training.tasks.router_loss import router_losses
from mm_registry.errors import UserError

IGNORED = -100
"""Label of a token that is not learnt, as in transformers."""
_NOT_OF_NETWORK = ("labels", "sample_index")


@dataclass(frozen=True)
class LanguageInputs:
    """One prepared micro batch. `arguments` are those of the network's forward, `input_ids` `[B, S]` among them."""

    arguments: dict[str, Any]
    targets: torch.Tensor  # [B, S]: the token that follows each one, IGNORED where none is learnt


class LanguageTask:
    """Causal language modelling: the mean cross entropy over every learnt token of the global batch.

    A batch has `input_ids` and `labels`, `[B, S]`, and whatever else the network's forward takes: `attention_mask`,
    `position_ids`, `pixel_values`, `image_grid_thw`, `mm_token_type_ids`. `labels` are the ids themselves, with -100 where a
    token is not learnt; the shift by one is made here.

    With `router_aux_loss_coef` the loss for balanced experts is added, taken sample by sample and weighted by the sample's
    learnt tokens (see `router_losses`), so that it does not depend on micro batches and ranks either.

    Args:
        model: the network.
        seed: of the run; nothing is drawn here.
        device: where inputs are put.

    Raises:
        UserError: experts are to be balanced, and the network has none.
    """

    def __init__(self, model: TransformersModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.router_aux_loss_coef = model.router_aux_loss_coef
        text = model.model.config.get_text_config()
        self.top_k: int = getattr(text, "num_experts_per_tok", 0)
        if self.router_aux_loss_coef and not hasattr(text, "output_router_logits"):
            raise UserError(
                f"loss_cfg.router_aux_loss_coef is {self.router_aux_loss_coef:g}, but {type(model.model).__name__} has no "
                "experts to balance; write 0"
            )

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[LanguageInputs]:
        for batch in micro_batches:
            arguments = {
                name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name not in _NOT_OF_NETWORK
            }
            labels = batch["labels"].to(self.device, non_blocking=True)
            yield LanguageInputs(arguments, next_tokens(labels))

    def forward(self, model: torch.nn.Module, inputs: LanguageInputs) -> Any:
        network: Any = model.model
        # Keys and values of earlier calls are of no use, and recomputation would append to them a second time.
        options: dict[str, Any] = {"use_cache": False}
        if self.router_aux_loss_coef:
            options["output_router_logits"] = True
        return network(**inputs.arguments, **options)  # logits [B, S, V]

    def loss(self, outputs: Any, inputs: LanguageInputs) -> LossParts:
        # Ranks that share a sequence have the logits of their own tokens.
        context = context_of(self.model.model)
        targets = inputs.targets if context is None else context.split(inputs.targets)
        losses, weights = token_losses(outputs.logits, targets)
        if not self.router_aux_loss_coef:
            return losses, weights, {}
        mask = inputs.arguments.get("attention_mask")
        mask = torch.ones_like(inputs.targets) if mask is None else mask
        group = None
        if context is not None:
            mask, group = context.split(mask), context.group
        # Of whole samples; ranks that share one have parts, which add up.
        learnt = (inputs.targets != IGNORED).sum(1)
        logits = outputs.router_logits
        if outputs.logits.requires_grad and not any(layer.requires_grad for layer in logits):
            # The older form of recomputation computes them without a graph, and the loss would be one in the log alone.
            raise UserError(
                f"loss_cfg.router_aux_loss_coef is {self.router_aux_loss_coef:g}, but the routers get no gradient from it; "
                "write use_reentrant: false in fsdp2.yaml, or 0 if no router is trained"
            )
        balance = router_losses(logits, self.top_k, mask, group) * learnt  # [B]
        return (
            losses + self.router_aux_loss_coef * balance,
            weights,
            {"router_aux_loss": balance.detach().sum(), "token_loss": losses.detach().sum()},
        )

    def tokens(self, inputs: LanguageInputs) -> int:
        return int(inputs.arguments["input_ids"].numel())

    @staticmethod
    def example_batch(
        components: Mapping[str, ComponentConfig],
        *,
        batch_size: int,
        sequence_length: int | None = None,
        device: torch.device | str = "meta",
    ) -> LanguageInputs:
        """Inputs of `forward` in the sizes that the sections say, with values that mean nothing; no file but config.json is
        read.

        A network that takes images gets one a sample, of the largest area that `preprocess_parameters` allows and the
        sequence has room for. Its grid is on the CPU even with `device` meta, since shapes follow from its values.

        Args:
            components: of the job.
            sequence_length: tokens of a sample, `--seq-length`; 1024 without.
        """
        component = components[NETWORK]
        length = sequence_length or 1024
        config = read_hf_config(expanded(component.from_pretrained or ""))
        vocabulary = config.get("text_config", config).get("vocab_size", 2)
        ids = torch.randint(max(1, vocabulary // 2), (batch_size, length), device=device)
        # Without a mask: nothing is padded, and a mask of values that are not there could not be looked at.
        arguments: dict[str, Any] = {"input_ids": ids}
        family = component.config
        dataset = components.get("dataset")
        limits = dataset.fields.get("preprocess_parameters") if dataset is not None else None
        area = limits.get("image_max_pixels") if isinstance(limits, Mapping) else None
        if isinstance(family, TransformersFamilyConfig) and isinstance(area, int):
            images = family.example_image(config, area, length - 1)
            if images is not None:
                ids[:, : images.tokens] = images.token_id
                kinds = torch.zeros_like(ids)
                kinds[:, : images.tokens] = 1
                arguments |= {
                    "pixel_values": torch.zeros(batch_size * images.patches, images.values, device=device),
                    "image_grid_thw": torch.tensor([images.grid] * batch_size, device="cpu"),
                    "mm_token_type_ids": kinds,
                }
        return LanguageInputs(arguments, next_tokens(ids))


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """What each place of `labels` `[B, S]` is to predict: the next one's label, nothing at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropies of each sample's learnt tokens, in fp32, and how many they are.

    Args:
        logits: `[B, S, V]`.
        targets: `[B, S]`, `IGNORED` where nothing is learnt.

    Returns:
        `[B]` fp32 both.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    return losses.sum(1), (targets != IGNORED).sum(1).float()
