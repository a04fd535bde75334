"""Names of number formats. They become torch dtypes only where tensors are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

_SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float64": "fp64",
    "double": "fp64",
}
#: Every name that is accepted for one of them.
SPELLINGS = ("bf16", "fp16", "fp32", "fp64", *_SHORT, *(f"torch.{name}" for name in _SHORT))


def short_dtype(name: Any) -> Any:
    """Return the short name of a floating format (`bfloat16` and `torch.bfloat16` are `bf16`); others
    unchanged.
    """
    return (
        _SHORT.get(name.removeprefix("torch."), name.removeprefix("torch."))
        if isinstance(name, str)
        else name
    )


#: A floating format by any of its usual names, kept as the short one.
DType = Annotated[Literal["bf16", "fp16", "fp32", "fp64"], BeforeValidator(short_dtype)]
