"""What flags and other files fill in of fsdp2.yaml: recomputation and number formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_core.config.findings import Finding, show
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.origin import KeyPath
from mm_core.config.recompute import KEYS as RECOMPUTE_KEYS
from mm_core.config.recompute import with_recompute_flags

if TYPE_CHECKING:
    from mm_core.config.job import TrainingDraft


def with_recomputation(draft: TrainingDraft, fsdp2: Fsdp2Config) -> tuple[Fsdp2Config, list[Finding]]:
    """Let the flags of recomputation fill what fsdp2.yaml leaves open."""
    filled, findings = with_recompute_flags(fsdp2, draft.flags)
    for name in RECOMPUTE_KEYS:
        value = getattr(filled, name, None)
        if value is not None and name not in fsdp2.model_fields_set:
            document, origin = draft.documents["fsdp2"], draft.flags.origin(name)
            draft.documents["fsdp2"] = document.replaced((name,), value, origin)
    return filled, findings


def with_precision(draft: TrainingDraft, fsdp2: Fsdp2Config) -> tuple[Fsdp2Config, list[Finding]]:
    """Let `--bf16` fill param_dtype and reduce_dtype, and say that a predictor's own dtype does not
    decide.
    """
    findings: list[Finding] = []
    if draft.flags.bf16:
        if fsdp2.param_dtype is None:
            chosen = {"param_dtype": "bf16", "reduce_dtype": fsdp2.reduce_dtype or "fp32"}
            fsdp2 = fsdp2.filled(chosen, "--bf16")
            for name, value in chosen.items():
                document = draft.documents["fsdp2"]
                if not document.has((name,)) or document.value((name,)) is None:
                    origin = draft.flags.origin("bf16")
                    draft.documents["fsdp2"] = document.replaced((name,), value, origin)
        elif fsdp2.param_dtype != "bf16":
            origin = draft.documents["fsdp2"].origin(("param_dtype",))
            text = f"param_dtype is {show(fsdp2.param_dtype)}, but --bf16 is given"
            findings.append(
                Finding.at(
                    origin, "error", "conflict", text, path=("param_dtype",), suggestion="Keep one of them"
                )
            )
    predictor, model = draft.components.get("predictor"), draft.documents.get("model")
    if (
        predictor is not None
        and model is not None
        and predictor.dtype not in (None, fsdp2.param_dtype or "fp32")
    ):
        path: KeyPath = (*predictor.path, "dtype")
        text = (
            '"dtype" has no effect in training: param_dtype of fsdp2.yaml '
            f"({fsdp2.param_dtype or 'fp32'}) decides"
        )
        findings.append(Finding.at(model.key_origin(path), "note", "no-effect", text, path=path))
    return fsdp2, findings
