"""How captions and prompts are cleaned: the same keys in data and inference files."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from mm_core.config.keys import Only
from mm_core.config.section import SectionModel

#: Every name must be one of `mm_core.data.text.TEXT_METHODS`, and the other way round.
TextMethodName: TypeAlias = Literal["basic_clean", "whitespace_clean", "lower", "lowercase"]


class TextMethod(SectionModel):
    """One step of `text_preprocess_methods`."""

    method: Annotated[
        TextMethodName,
        Field(
            description="basic_clean: mend encodings and HTML entities; whitespace_clean: single "
            "spaces; lower or lowercase: lower case."
        ),
    ]
    param: Annotated[
        dict[str, Any] | None,
        Only(None, {}, reason="the method takes no parameters"),
        Field(description="Its parameters."),
    ] = None


#: One step, or several in their order.
TextMethods: TypeAlias = list[TextMethod] | TextMethod


def method_names(methods: TextMethods) -> tuple[str, ...]:
    """Return the names of the steps, in order."""
    return tuple(step.method for step in ([methods] if isinstance(methods, TextMethod) else methods))
