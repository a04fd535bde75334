"""Defects of networks of the transformers library."""

from __future__ import annotations

from defects import net

_LOGITS = "logits = self.head(tokens)"

NETWORKS = (
    net("builds-a-module", "cannot be built", ("self.post_init()", "raise ValueError")),
    net("builds-on-meta", "parameters are real", ("self.post_init()", "self.scale = nn.Parameter(torch.ones(1, device='cpu'))")),
    net("reads-tokens-and-images", "without logits", ("logits=logits", "hidden_states=(logits,)")),
    net("reads-tokens-and-images", "logits are", (_LOGITS, "logits = self.head(tokens)[:, 1:]"),
        ("logits[:, :-1].float()", "logits.float()")),
    net("loss-is-the-networks-own", "disagree", ("labels[:, 1:].flatten())", "labels[:, 1:].flatten(), reduction='sum')")),
    net("text-is-causal", "another last token", (_LOGITS, "logits = self.head(tokens + tokens.mean(1, keepdim=True))")),
    net("padding-at-the-end-changes-nothing", "where a row is padded",
        (_LOGITS, "logits = self.head(tokens + tokens.mean(1, keepdim=True))")),
    net("network-learns", "no gradient reaches layers.0",
        ("(seen)))", "(seen))).detach()")),
    net("network-learns", "lead from a loss",
        (_LOGITS, "logits = self.head(tokens)\n        logits = 2 * logits.detach() - logits")),
    net("frozen-modules-are-the-ones", "ToyNet has no embedding", ('("embed",)', '("embedding",)'), file="config.py"),
    net("frozen-modules-are-the-ones", "is frozen, and", ("self.post_init()",
        "self.post_init()\n        self.head.requires_grad_(False)")),
    net("attention-is-of-known-parts", "text_config", ('{"": "sdpa"}', '{"text_config": "sdpa"}'), file="config.py"),
    net("repeated-numbers-have-places", "depth", ('("num_layers",)', '("depth",)'), file="config.py"),
    net("samples-are-independent", "when a second is beside it", ("tokens = self.embed(input_ids)",
        "tokens = self.embed(input_ids)\n        tokens = tokens - tokens.mean(0)")),
    net("units-run-in-order", "never calls layers.1", ("for layer in self.layers:", "for layer in self.layers[:1]:")),
    net("two-ranks-equal-one", "two ranks with FSDP2", (_LOGITS, "import torch.distributed as dist\n        "
        "logits = self.head(tokens) / dist.get_world_size()")),
)  # fmt: skip
