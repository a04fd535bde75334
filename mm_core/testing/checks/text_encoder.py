"""What a text encoder makes of ids and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")

TEXT_ENCODER = ("text_encoder",)


def encode(module: Any, given: builds.Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask.

    Raises:
        CheckFailed: encode returns something else.
    """
    with torch.no_grad():
        result = module.encode(given["input_ids"], given["attention_mask"])
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not all(isinstance(t, torch.Tensor) for t in result)
    ):
        raise CheckFailed("encode does not return a pair of tensors (embeddings [B, L, D], mask [B, L])")
    return result


@check("encode returns embeddings [B, L, D] and a mask [B, L]", stage="build", roles=TEXT_ENCODER)
def encodes_to_embeddings_and_mask(case: Case) -> None:
    embeddings, mask = encode(builds.lively(case), builds.inputs(case, batch=3))
    if embeddings.ndim != 3 or len(embeddings) != 3:
        raise CheckFailed(f"embeddings of 3 prompts have the shape {list(embeddings.shape)}, not [3, L, D]")
    if mask.shape != embeddings.shape[:2]:
        raise CheckFailed(
            f"the mask {list(mask.shape)} does not belong to embeddings {list(embeddings.shape)}"
        )


@check("the mask that comes back covers the tokens that went in", stage="build", roles=TEXT_ENCODER)
def mask_comes_back(case: Case) -> None:
    given = builds.inputs(case)
    embeddings, mask = encode(builds.lively(case), given)
    if embeddings.shape[1] != given["input_ids"].shape[1]:
        if not bool(mask.bool().all()):
            raise CheckFailed("a pooled output's mask hides part of it")
        return
    if not torch.equal(mask.bool(), given["attention_mask"].bool()):
        raise CheckFailed("the mask that encode returns is not the one that it was given")


@check("ids of padding do not change the embeddings of the prompt", stage="build", roles=TEXT_ENCODER)
def padding_does_not_matter(case: Case) -> None:
    module: Any = builds.lively(case)
    if getattr(module, "use_attention_mask", True) is False:
        raise CheckSkipped("its section turns the attention mask off")
    given = builds.inputs(case)
    mask = given["attention_mask"].bool()
    other = torch.where(mask, given["input_ids"], (given["input_ids"] + 1) % builds.vocabulary(case))
    before, _ = encode(module, builds.copied(given))
    after, _ = encode(module, builds.copied(given, input_ids=other))
    kept = mask if before.shape[1] == mask.shape[1] else torch.ones(before.shape[:2], dtype=torch.bool)
    builds.must_be_close(
        after[kept], before[kept], 1e-5, "other ids behind the mask change the embeddings before it"
    )


@check("different prompts have different embeddings", stage="build", roles=TEXT_ENCODER)
def ids_matter(case: Case) -> None:
    given = builds.inputs(case)
    embeddings, _ = encode(builds.lively(case), given)
    builds.must_differ(
        embeddings[:1, :1], embeddings[1:, :1], "two different prompts have the same embeddings"
    )


@check("shorter prompts work, and one prompt is a batch", stage="build", roles=TEXT_ENCODER)
def other_lengths_work(case: Case) -> None:
    module: Any = builds.lively(case)
    given = builds.inputs(case, batch=1)
    length = max(1, given["input_ids"].shape[1] // 2)
    short = {name: value[:, :length] for name, value in given.items()}
    embeddings, mask = encode(module, short)
    if len(embeddings) != 1 or mask.shape != embeddings.shape[:2]:
        raise CheckFailed(
            f"{length} ids become embeddings {list(embeddings.shape)} with a mask {list(mask.shape)}"
        )


@check("in bf16 embeddings are finite and near those in fp32", stage="build", roles=TEXT_ENCODER)
def bf16_embeddings_work(case: Case) -> None:
    given = builds.inputs(case)
    exact, _ = encode(builds.as_module(builds.build(case, dtype="fp32")), given)
    rounded, _ = encode(builds.as_module(builds.build(case, dtype="bf16")), given)
    if not rounded.is_floating_point() or not bool(rounded.isfinite().all()):
        raise CheckFailed("in bf16 the embeddings are not finite")
    error = float((rounded.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-12))
    if error > 0.2:
        raise CheckFailed(f"in bf16 the embeddings are {error:.0%} away from those in fp32")
