"""Two plugin sets, and their difference in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mm_registry.agreement import describe_difference

PREDICTORS, AES = "mm_core.predictor_models", "mm_core.ae_models"
CORE = {"mmzoo-core": "0.1.0", "mmzoo-registry": "0.1.0"}


def plugins(*claims: tuple[str, str, str, str, str], core: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"core": core or CORE, "claims": [list(claim) for claim in claims]}


WAN = (PREDICTORS, "wandit", "mmzoo-plugin-wan22", "0.1.0", "wan:DiT")
HAAR = (AES, "haar_video", "mmzoo-plugin-haar", "0.1.0", "haar:AE")


def test_equal_sets_have_no_difference() -> None:
    assert describe_difference(plugins(WAN, HAAR), plugins(HAAR, WAN)) == []


def test_a_distribution_on_one_side_only() -> None:
    assert describe_difference(plugins(WAN, HAAR), plugins(WAN)) == [
        "mmzoo-plugin-haar 0.1.0 is missing there"
    ]
    found = describe_difference(plugins(WAN), plugins(WAN, HAAR), here="on rank 0", there="on rank 1")
    assert found == ["mmzoo-plugin-haar 0.1.0 is on rank 1, but not on rank 0"]


def test_versions_are_told_once_a_distribution() -> None:
    other = (AES, "haar_image", "mmzoo-plugin-haar", "0.1.0", "haar:Image")
    newer = [(*claim[:3], "0.2.0", claim[4]) for claim in (HAAR, other)]
    found = describe_difference(plugins(HAAR, other), plugins(*newer))
    assert found == ["mmzoo-plugin-haar is 0.2.0 there and 0.1.0 here"]


def test_the_core_is_told_once_although_it_has_ids_too() -> None:
    mine = ("mm_core.tasks", "diffusion", "mmzoo-core", "0.1.0", "mm_core:T")
    theirs = (*mine[:3], "0.3.0", mine[4])
    found = describe_difference(plugins(mine), plugins(theirs, core={**CORE, "mmzoo-core": "0.3.0"}))
    assert found == ["mmzoo-core is 0.3.0 there and 0.1.0 here"]
    found = describe_difference(plugins(), plugins(core={**CORE, "mmzoo-registry": None}))
    assert found == ["mmzoo-registry is not installed there and 0.1.0 here"]


def test_ids_of_one_version_that_differ() -> None:
    moved = (*HAAR[:4], "haar.other:AE")
    more = (AES, "haar_image", "mmzoo-plugin-haar", "0.1.0", "haar:Image")
    assert describe_difference(plugins(HAAR), plugins(moved)) == [
        "the ae haar_video of mmzoo-plugin-haar is haar.other:AE there and haar:AE here"
    ]
    assert describe_difference(plugins(HAAR, more), plugins(HAAR)) == [
        "mmzoo-plugin-haar does not offer the ae haar_image there"
    ]
    assert describe_difference(plugins(HAAR), plugins(HAAR, more)) == [
        "mmzoo-plugin-haar offers the ae haar_image there, but not here"
    ]


def test_an_id_from_another_distribution_is_said_after_the_distributions() -> None:
    fork = (PREDICTORS, "wandit", "wan-fork", "2.0", "fork:DiT")
    assert describe_difference(plugins(WAN), plugins(fork)) == [
        "mmzoo-plugin-wan22 0.1.0 is missing there",
        "wan-fork 2.0 is there, but not here",
        "the predictor wandit comes from wan-fork there and from mmzoo-plugin-wan22 here",
    ]


def test_real_sets_of_managers(make_site: Callable[..., Any]) -> None:
    """What is written here by hand has the form that a manager gives."""
    one, two = make_site("one"), make_site("two")
    for site in (one, two):
        site.add("acme", entries={PREDICTORS: {"dit": "acme:DiT"}})
    two.add("extra", "2.0", entries={AES: {"vae": "extra:VAE"}})
    mine, theirs = one.manager().plugin_set(), two.manager().plugin_set()
    assert describe_difference(mine, mine) == []
    assert describe_difference(mine, theirs) == ["extra 2.0 is there, but not here"]
    assert describe_difference(theirs, two.manager(MM_PLUGINS="acme").plugin_set()) == [
        "extra 2.0 is missing there"
    ]
