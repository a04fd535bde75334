"""Which kernels a network of transformers is computed with: its attention and its experts, chosen for the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mm_core.accelerator import dtype_name, has_flash_attention, parse_dtype
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

ATTENTION = "sdpa"
"""The attention of a network whose file asks for none where nothing better is known: torch's own, which has fused kernels on
every device.
"""
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Computation:
    """Where a network is going to compute.

    Args:
        device: of this rank.
        dtype: of its matrix products; None: that of its parameters, fp32.
        shares_sequences: whether several ranks share each sequence.
        gradients: whether there is a backward pass.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    shares_sequences: bool = False
    gradients: bool = True

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: str | None,
        *,
        shares_sequences: bool = False,
        gradients: bool = True,
    ) -> Computation:
        """Of a device and a configuration's spelling of the dtype: `param_dtype` of fsdp2.yaml, `dtype` of a section."""
        return cls(device, None if dtype is None else parse_dtype(dtype), shares_sequences, gradients)

    def __str__(self) -> str:
        return f"{self.device.type} in {dtype_name(self.dtype or torch.float32)}"


def chosen_attention(
    cls: Any, parts: Mapping[str, Any], asked: Mapping[str, str], where: Computation | None, what: str
) -> dict[str, str]:
    """Return transformers' name of the attention of each part of a network, and log which they are.

    What the file asks for is taken as it is. The others have a package of FlashAttention where one is installed that this
    device and dtype can use, and else `sdpa`. transformers takes a part that is not named from config.json, which may have
    another machine's choice; so each is named.

    Args:
        cls: the network's class.
        parts: of its configuration, such as `text_config`; `""` is the rest.
        asked: part -> name, as its file says.
        where: it is going to compute; None if that is not known yet.
        what: it is called, for messages.

    Raises:
        UserError: FlashAttention is asked for, which has no kernels for the dtype.
    """
    if where is not None:
        _refuse_dtype(asked, where, what)
    default = _best(cls, where)
    chosen = {"": default, **dict.fromkeys(parts, default), **asked}
    if where is not None:
        by_name: dict[str, list[str]] = {}
        for part, name in chosen.items():
            by_name.setdefault(name, []).append(part)
        texts = [
            f"{name} in {', '.join(part or 'the rest' for part in sorted(own, reverse=True))}"
            for name, own in by_name.items()
        ]
        said = next(iter(by_name)) if len(by_name) == 1 else "; ".join(texts)
        how = f", {', '.join(sorted(asked))} as the file asks" if asked else ""
        log.info("%s: attention on %s is %s%s", what, where, said, how)
    return chosen


def log_experts(network: Any, where: Computation | None, what: str) -> None:
    """Log which of transformers' ways computes the experts of a network, if it has any."""
    text = network.config.get_text_config()
    if where is None or not getattr(text, "num_experts", 0):
        return
    # There is a public getter in newer releases only; this is what the experts themselves look at.
    name = getattr(text, "_experts_implementation", None) or "eager"
    log.info("%s: experts on %s are computed by %s", what, where, name)


def _best(cls: Any, where: Computation | None) -> str:
    if where is None or where.dtype not in _HALF or not has_flash_attention(where.device):
        return ATTENTION
    # The class attribute says whether the network's authors allow it; nothing public does before it is built.
    if not getattr(cls, "_supports_flash_attn", False):
        return ATTENTION
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available  # it takes a while

    packages = {
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
    }
    return next((name for name, available in packages.items() if available()), ATTENTION)


def _refuse_dtype(asked: Mapping[str, str], where: Computation, what: str) -> None:
    for part, name in asked.items():
        if name.startswith("flash_attention") and where.dtype not in _HALF:
            raise UserError(
                f"{what}: {part} asks for {name}, which has no kernels for {dtype_name(where.dtype or torch.float32)}; "
                "write param_dtype: bf16 in fsdp2.yaml, or attn_implementation: sdpa"
            )
