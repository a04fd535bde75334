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
from mm_core.models.packed_attention import (
    KEYWORD,
    PackedDocuments,
    check_used,
    ends_of,
    keeps_documents_apart,
    refuse_padding_before,
)
from mm_core.models.transformers_model import NETWORK, TransformersModel
from mm_core.sharding.context import context_of
from mm_core.training.losses.head import LossHead, Wanted
from mm_core.training.losses.weights import IGNORED, next_tokens, sums_of, token_weights
from mm_core.training.tasks.base import LossParts
from mm_core.training.tasks.packed import owners_of, packed_positions
from mm_core.training.tasks.router_loss import router_losses
from mm_registry.errors import UserError

__all__ = ["IGNORED", "LanguageInputs", "LanguageTask", "next_tokens", "token_losses"]

_NOT_OF_NETWORK = ("labels", "sample_index", "document_ids")


@dataclass(frozen=True)
class LanguageInputs:
    """One prepared micro batch. `arguments` are those of the network's forward, `input_ids` `[B, S]` among them.

    Attributes:
        targets: `[B, S]`: the token that follows each one, `IGNORED` where none is learnt.
        weights: of each token's loss, `[B, S]` fp32, 0 where none is learnt.
        count: number of samples, or of packed documents.
        owners: of which of these each token is, `[B, S]`, from 0 to `count - 1`; None: each row is a sample.
        documents: of packed rows.
        mask: 0 where a packed row is padded, `[B, S]`.
        rows: places in the flattened tokens that are learnt, `[T]`; None: it is not known.
        tokens: that are no padding; None: none is.
    """

    arguments: dict[str, Any]
    targets: torch.Tensor
    weights: torch.Tensor
    count: int
    owners: torch.Tensor | None = None
    documents: PackedDocuments | None = None
    mask: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    tokens: int | None = None


class LanguageTask:
    """Causal language modelling: cross entropies of the learnt tokens of the global batch, as `loss_cfg` weighs them.

    A batch has `input_ids` and `labels`, `[B, S]`, and whatever else the network's forward takes: `attention_mask`,
    `position_ids`, `pixel_values`, `image_grid_thw`, `mm_token_type_ids`. `labels` are the ids themselves, with -100 where a
    token is not learnt; the shift by one is made here. Rows that hold several documents come with `document_ids` `[B, S]`
    (see `mm_core.models.packed_attention.ends_of`): each is then as if it had a row of its own, in its positions, in
    attention, and in the loss.

    Sums and weights are those of each sample, or packed document, and add up over micro batches and ranks (see
    `mm_core.training.losses.weights.token_weights`). With `router_aux_loss_coef` the loss for balanced experts is added, taken
    sample by sample and weighted as the sample is (see `router_losses`).

    Args:
        model: the network.
        seed: of the run; nothing is drawn here.
        device: where inputs are put.

    Raises:
        UserError: experts are to be balanced, and the network has none; or its head cannot compute losses by chunks.
    """

    def __init__(self, model: TransformersModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.loss_type = model.loss.loss_type
        chunked = model.loss.compute_mode != "default"
        self.head = LossHead(model.model, model.loss) if chunked else None
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
            yield self._prepared(batch)

    def _prepared(self, batch: dict[str, Any]) -> LanguageInputs:
        """Everything that looks at values does so here, where they are on the CPU: nothing waits for the device."""
        labels, ids = batch["labels"], batch.get("document_ids")
        arguments = {name: value for name, value in batch.items() if name not in _NOT_OF_NETWORK}
        documents = mask = None
        if ids is None:
            owners, count = None, len(labels)
            if "attention_mask" in batch:
                refuse_padding_before(batch["attention_mask"], self.model.model)
        else:
            ends = ends_of(ids)
            owners, count = owners_of(ends, ids.shape[1]), sum(map(len, ends))
            network, mask = self.model.model, ids >= 0
            arguments.pop("attention_mask", None)
            arguments["position_ids"] = packed_positions(network, batch, ends)
            if keeps_documents_apart(network):
                documents = PackedDocuments(ends, ids.shape[1], self.device)
        targets = next_tokens(labels, ids)
        rows_as_samples = torch.arange(len(labels))[:, None].expand_as(labels)
        weights = token_weights(targets, rows_as_samples if owners is None else owners, count, self.loss_type)
        rows = None
        if self.head is not None and context_of(self.model.model) is None:
            rows = (targets != IGNORED).flatten().nonzero()[:, 0]
        real = batch.get("attention_mask") if mask is None else mask
        tokens = None if real is None else int(real.count_nonzero())
        arguments = {name: self._moved(value) for name, value in arguments.items()}
        targets, weights, owners, mask, rows = map(self._moved, (targets, weights, owners, mask, rows))
        return LanguageInputs(arguments, targets, weights, count, owners, documents, mask, rows, tokens)

    def _moved(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def forward(self, model: torch.nn.Module, inputs: LanguageInputs) -> Any:
        network: Any = model.model
        # Keys and values of earlier calls are of no use, and recomputation would append to them a second time.
        options: dict[str, Any] = {"use_cache": False}
        if self.router_aux_loss_coef:
            options["output_router_logits"] = True
        if inputs.documents is not None:
            options[KEYWORD] = inputs.documents
        if self.head is None:
            outputs = network(**inputs.arguments, **options)  # logits [B, S, V]
        else:
            self.head.check()
            self.head.wanted = Wanted(
                inputs.targets,
                inputs.weights,
                inputs.owners,
                inputs.count,
                inputs.rows,
                context_of(self.model.model),
            )
            try:
                outputs = network(**inputs.arguments, **options)  # in place of logits, losses [count]
            finally:
                self.head.wanted = None
        if inputs.documents is not None:
            check_used(inputs.documents, self.model.model)
        return outputs

    def loss(self, outputs: Any, inputs: LanguageInputs) -> LossParts:
        # Ranks that share a sequence have the logits of their own tokens.
        context = context_of(self.model.model)
        targets, weights, owners = (
            one if one is None or context is None else context.split(one)
            for one in (inputs.targets, inputs.weights, inputs.owners)
        )
        sums = outputs.logits  # of the head that computes losses
        if self.head is None:
            sums = sums_of(token_losses(sums, targets) * weights, owners, inputs.count)
        totals = sums_of(weights, owners, inputs.count)
        balance = None
        if self.router_aux_loss_coef:
            # Of whole samples; ranks that share one have parts, which add up.
            whole = sums_of(inputs.weights, inputs.owners, inputs.count)
            balance = self._balance(outputs, inputs, owners) * whole  # [count]
        if len(sums) != inputs.count:  # their sum
            totals = totals.sum(0, keepdim=True)
            balance = None if balance is None else balance.sum(0, keepdim=True)
        if balance is None:
            return sums, totals, {}
        return (
            sums + self.router_aux_loss_coef * balance,
            totals,
            {"router_aux_loss": balance.detach().sum(), "token_loss": sums.detach().sum()},
        )

    def _balance(self, outputs: Any, inputs: LanguageInputs, owners: torch.Tensor | None) -> torch.Tensor:
        """The loss for balanced experts of each sample, `[count]`; `owners` are this rank's."""
        logits = outputs.router_logits
        if outputs.logits.requires_grad and not any(layer.requires_grad for layer in logits):
            # The older form of recomputation computes them without a graph, and the loss would be one in the log alone.
            raise UserError(
                f"loss_cfg.router_aux_loss_coef is {self.router_aux_loss_coef:g}, but the routers get no gradient from it; "
                "write use_reentrant: false in fsdp2.yaml, or 0 if no router is trained"
            )
        mask = inputs.arguments.get("attention_mask") if inputs.mask is None else inputs.mask
        mask = torch.ones_like(inputs.targets) if mask is None else mask
        context = context_of(self.model.model)
        if context is None:
            return router_losses(logits, self.top_k, mask, None, owners, inputs.count)
        return router_losses(logits, self.top_k, context.split(mask), context.group, owners, inputs.count)

    def tokens(self, inputs: LanguageInputs) -> int:
        return int(inputs.arguments["input_ids"].numel()) if inputs.tokens is None else inputs.tokens

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
        # Not drawn: a draw would move the generators of a run, and now and then hit the placeholder of an image.
        ids = (torch.arange(batch_size * length, device=device) % max(1, vocabulary // 2)).view(-1, length)
        # Without a mask: nothing is padded, and a mask of values that are not there could not be looked at.
        arguments: dict[str, Any] = {"input_ids": ids}
        family = component.config
        dataset = components.get("dataset")
        limits = dataset.fields.get("preprocess_parameters") if dataset is not None else None
        area = limits.get("image_max_pixels") if isinstance(limits, Mapping) else None
        if isinstance(family, TransformersFamilyConfig) and isinstance(area, int):
            images = family.example_image(config, area, length - 1)
            if images is not None:
                ids = torch.where(ids == images.token_id, 0 if images.token_id else 1, ids)
                ids[:, : images.tokens] = images.token_id
                kinds = torch.zeros_like(ids)
                kinds[:, : images.tokens] = 1
                arguments |= {
                    "input_ids": ids,
                    "pixel_values": torch.zeros(batch_size * images.patches, images.values, device=device),
                    "image_grid_thw": torch.tensor([images.grid] * batch_size, device="cpu"),
                    "mm_token_type_ids": kinds,
                }
        targets = next_tokens(ids)
        return LanguageInputs(arguments, targets, (targets != IGNORED).float(), batch_size)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each learnt token, `[B, S]` fp32; 0 for others.

    Args:
        logits: `[B, S, V]`.
        targets: `[B, S]`, `IGNORED` where nothing is learnt.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets)
