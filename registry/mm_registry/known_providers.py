"""Distributions that may not be installed, and the ids that they offer: data for answers about unknown ids.

A plugin adds to it by entries of the group `mm_core.providers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from mm_registry.groups import PROVIDERS, ROLES
from mm_registry.spec import EXCLUDED, EntrySpec, Status


class KnownProvider(NamedTuple):
    """A distribution that may not be installed: how to install it, and its ids by group."""

    distribution: str
    install: str
    ids: Mapping[str, tuple[str, ...]]


def _provider(distribution: str, folder: str, **ids: tuple[str, ...]) -> KnownProvider:
    groups = MappingProxyType({f"mm_core.{group}": names for group, names in ids.items()})
    return KnownProvider(distribution, f"`pip install ./{folder}` in a clone of MM Zoo", groups)


KNOWN_PROVIDERS: tuple[KnownProvider, ...] = (
    _provider(
        "mmzoo-plugin-wan22",
        "mm_plugins/wan22",
        predictor_models=("wandit",),
        diffusion_models=("wan_flow_match_scheduler",),
        ae_models=("wan_video_vae",),
        i2v_processors=("wan_i2v_processor", "wan_ti2v_processor"),
        pipelines=("WanPipeline",),
    ),
    _provider(
        "mmzoo-plugin-qwen3vl",
        "mm_plugins/qwen3vl",
        transformers_models=("qwen3_vl", "qwen3_vl_moe"),
        chat_templates=("qwen3_vl", "qwen3_vl_nothink"),
    ),
    _provider("mmzoo-plugin-haar", "examples/plugins/mmzoo-plugin-haar", ae_models=("haar_video",)),
)


def known_providers(claims: Mapping[str, Mapping[str, Sequence[EntrySpec]]]) -> Iterator[KnownProvider]:
    """Yield our own table, then what installed plugins add to it, by name of the distribution. Two answers for
    one id are two answers: a plugin's does not take the place of ours.
    """
    yield from KNOWN_PROVIDERS
    ours = {
        (known.distribution, group, id)
        for known in KNOWN_PROVIDERS
        for group in known.ids
        for id in known.ids[group]
    }
    added: dict[str, dict[str, set[str]]] = {}
    for name, specs in claims.get(PROVIDERS, {}).items():
        role, _, id = name.partition("/")
        group = ROLES[role].name
        for spec in specs:
            usable = spec.status not in EXCLUDED and spec.status is not Status.BROKEN
            if usable and (spec.target, group, id) not in ours:
                added.setdefault(spec.target, {}).setdefault(group, set()).add(id)
    for distribution, groups in sorted(added.items()):
        ids = {group: tuple(sorted(names)) for group, names in sorted(groups.items())}
        yield KnownProvider(distribution, f"`pip install {distribution}`", ids)
