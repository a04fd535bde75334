"""Nothing starts from random weights by accident."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mm_core.config.component import WITH_WEIGHTS, ComponentConfig
from mm_core.config.document import Document
from mm_core.config.findings import Finding, Level
from mm_core.config.section import SectionModel


def check_weights(
    components: Mapping[str, ComponentConfig],
    document: Document,
    *,
    load: str | Sequence[str] | None,
    level: Level = "error",
    loaded: Collection[str] = ("predictor",),
) -> Iterator[Finding]:
    """Nothing starts from random weights unless its section says `init: random`.

    An autoencoder and a text encoder need `from_pretrained` or `init: random`; a predictor is also content
    with `--load`. A component whose config class says `has_weights = False` needs none.

    Args:
        loaded: the predictors that `--load` may fill.
    """
    for name, component in components.items():
        if component.role not in WITH_WEIGHTS or component.from_pretrained or component.init == "random":
            continue
        if isinstance(component.config, SectionModel) and not component.config.has_weights:
            continue
        predictor = component.role == "predictor"
        if predictor and load is not None and name in loaded:
            continue
        sources = '--load, "from_pretrained"' if predictor else '"from_pretrained" (a folder)'
        origin = document.key_origin(component.path)
        yield Finding.at(
            origin,
            level if predictor else "error",
            "no-weights",
            f"{component.label} has no weights",
            path=component.path,
            suggestion=f'Give {sources}, or "init": "random" to start from random ones',
        )
