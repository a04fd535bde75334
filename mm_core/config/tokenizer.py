"""The tokenizer's settings, in `data.json` and in inference files."""

from typing import Annotated, Literal

from pydantic import Field

from mm_core.config.keys import NoEffect
from mm_core.config.section import SectionModel


class TokenizerConfig(SectionModel):
    """A transformers tokenizer."""

    autotokenizer_name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="transformers' class, normally AutoTokenizer."),
    ] = "AutoTokenizer"
    hub_backend: Annotated[
        Literal["hf", "modelscope", "om"] | None,
        NoEffect("nothing is downloaded; from_pretrained names a local folder", quiet_for=("hf", None)),
        Field(description="Hub that a name would be looked up in."),
    ] = None
    from_pretrained: Annotated[str, Field(min_length=1, description="Folder of the tokenizer.")]
    model_max_length: Annotated[
        int, Field(ge=1, description="Tokens of a prompt: longer ones are cut, shorter ones padded.")
    ] = 512
