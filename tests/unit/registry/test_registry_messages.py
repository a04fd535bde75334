"""What an unknown id is answered: short, useful, and without importing anything."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_registry import GROUPS, PluginManager, UnknownIdError
from mm_registry.known_providers import KNOWN_PROVIDERS
from mm_registry.suggestions import closest

PREDICTORS = "mm_core.predictor_models"
AES = "mm_core.ae_models"
WAN = "`pip install ./mm_plugins/wan22` in a clone of MM Zoo"


def asked(manager: PluginManager, group: str, id: str) -> UnknownIdError:
    with pytest.raises(UnknownIdError) as raised:
        manager.resolve(group, id)
    assert len(str(raised.value).encode()) <= 1000
    return raised.value


@pytest.fixture
def wan(site: Any) -> PluginManager:
    site.add("mmzoo-plugin-wan22", "0.1.0", {PREDICTORS: {"wandit": "w:W"}, AES: {"wan_video_vae": "w:V"}})
    site.add("acme", "2.0", {PREDICTORS: {"wandit2": "a:W"}})
    return site.manager()


@pytest.mark.parametrize(
    ("group", "id", "message"),
    [
        (
            PREDICTORS,
            "wandti",
            "no installed distribution offers the predictor 'wandti'; "
            "did you mean 'wandit' (mmzoo-plugin-wan22 0.1.0), or 'wandit2' (acme 2.0)?",
        ),
        (
            PREDICTORS,
            "WanDiT",
            "no installed distribution offers the predictor 'WanDiT'; "
            "did you mean 'wandit' (mmzoo-plugin-wan22 0.1.0), or 'wandit2' (acme 2.0)?",
        ),
        (
            AES,
            "wandit",
            "no installed distribution offers the ae 'wandit'; 'wandit' is a predictor, not an ae: "
            "it comes from mmzoo-plugin-wan22 0.1.0 and goes under predictor.model_id",
        ),
        (
            PREDICTORS,
            "haar_video",
            "no installed distribution offers the predictor 'haar_video'; "
            "'haar_video' is an ae, not a predictor: it comes from mmzoo-plugin-haar, which is not installed "
            "(`pip install ./examples/plugins/mmzoo-plugin-haar` in a clone of MM Zoo), "
            "and goes under ae.model_id",
        ),
        (
            AES,
            "haar_vidoe",
            "no installed distribution offers the ae 'haar_vidoe'; did you mean 'haar_video' (of "
            "mmzoo-plugin-haar, which is not installed: "
            "`pip install ./examples/plugins/mmzoo-plugin-haar` in a clone of MM Zoo)?",
        ),
        (
            PREDICTORS,
            "zzz",
            "no installed distribution offers the predictor 'zzz'; installed: wandit, wandit2",
        ),
        (
            "mm_core.callbacks",
            "zzz",
            "no installed distribution offers the callback 'zzz'; "
            "no installed distribution offers any callback",
        ),
        (
            "mm_core.transformers_models",
            "qwen3_vl",
            "no installed distribution offers the transformers model 'qwen3_vl'; "
            "mmzoo-plugin-qwen3vl does, and is not installed; "
            "run `pip install ./mm_plugins/qwen3vl` in a clone of MM Zoo",
        ),
        (
            PREDICTORS,
            "acme/wandit",
            "acme offers no predictor 'wandit'; it is offered as 'mmzoo-plugin-wan22/wandit'",
        ),
        (
            PREDICTORS,
            "mmzoo-plugin-wna22/wandit",
            "mmzoo-plugin-wna22 offers no predictor 'wandit'; mmzoo-plugin-wna22 is not installed; "
            "others offer it as 'mmzoo-plugin-wan22/wandit'",
        ),
        (
            AES,
            "mmzoo-plugin-haar/haar_video",
            "mmzoo-plugin-haar offers no ae 'haar_video'; mmzoo-plugin-haar is not installed; "
            "run `pip install ./examples/plugins/mmzoo-plugin-haar` in a clone of MM Zoo",
        ),
    ],
)
def test_answers(wan: PluginManager, group: str, id: str, message: str, imports: list[str]) -> None:
    assert str(asked(wan, group, id)) == message
    assert not {"w", "a"} & set(imports)


@pytest.mark.parametrize("id", ["wandit", "wandi", "Wandit"])
def test_distribution_that_is_not_installed_is_named(site: Any, id: str) -> None:
    site.add("acme", entries={PREDICTORS: {"other": "a:A"}})
    error = asked(site.manager(), PREDICTORS, id)
    assert "mmzoo-plugin-wan22" in str(error)
    assert WAN in str(error)
    assert error.closest == ("wandit",)
    assert (error.id, error.group) == (id, PREDICTORS)


def test_known_distribution_installed_without_the_id(site: Any) -> None:
    site.add("mmzoo-plugin-wan22", "0.0.1", {PREDICTORS: {"older": "w:W"}})
    assert str(asked(site.manager(), PREDICTORS, "wandit")) == (
        "no installed distribution offers the predictor 'wandit'; "
        f"mmzoo-plugin-wan22 does, but not its installed 0.0.1; run {WAN}"
    )


def test_unreadable_distributions_are_mentioned(site: Any) -> None:
    info = site.add("mmzoo-plugin-wan22", "0.1.0", {PREDICTORS: {"wandit": "w:W"}})
    (info / "METADATA").write_bytes(b"\xff")
    message = str(asked(site.manager(), PREDICTORS, "zzz"))
    assert (
        "(1 error(s) while reading installed distributions, the first: the metadata of mmzoo-plugin-wan22"
        in message
    )


@pytest.mark.parametrize(
    "id", ["x" * 5000, "é" * 5000, "\ud800" * 70, "a/" * 3000, "\x00\n", "", "/", "a/", "/a", "'\""]
)
def test_message_stays_short_for_any_id(site: Any, id: str) -> None:
    names = {f"predictor_with_a_rather_long_name_{number:03}": "a:A" for number in range(300)}
    info = site.add("unreadable" * 10, entries={PREDICTORS: names})
    (info / "METADATA").write_bytes(b"\xff")
    site.add("acme", entries={PREDICTORS: names})
    message = str(asked(site.manager(), PREDICTORS, id))
    assert "\n" not in message


def test_many_ids_are_counted_not_listed(site: Any) -> None:
    site.add("acme", entries={PREDICTORS: {f"p{number:02}": "a:A" for number in range(20)}})
    assert str(asked(site.manager(), PREDICTORS, "zzz")).endswith(
        "installed: p00, p01, p02, p03, p04, p05, p06, p07, p08, p09, p10, p11 and 8 more"
    )


def test_closest() -> None:
    assert closest("wandti", ["wandit", "haar"]) == ["wandit"]
    assert closest("CLIPWITHPROJECTION", ["CLIP", "CLIPWithProjection"], 1) == ["CLIPWithProjection"]
    assert closest("t5", ["T5", "t5"]) == ["T5", "t5"]
    assert closest("x" * 201, ["x" * 201]) == []
    assert closest("a", []) == []


@given(
    name=st.text("abcdef_", max_size=12),
    options=st.lists(st.text("abcdef_", min_size=1, max_size=12), max_size=30),
)
def test_closest_is_what_difflib_says(name: str, options: list[str]) -> None:
    """As long as there are few; of many, it looks at those alone that share most pairs of letters."""
    assert closest(name, options) == difflib.get_close_matches(name, sorted(set(options)), 3)


def test_closest_of_many() -> None:
    many = [
        f"{a}_{b}_{number}" for number in range(200) for a in ("wan", "ltx") for b in ("dit", "vae", "flow")
    ]
    assert closest("wandit_77", many)[0] == "wan_dit_77"
    assert closest("predictor", [*many, "perdictor"]) == ["perdictor"]
    assert closest("zzzzzzzzz", many) == []
    assert closest("x", [*many, *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVW"])[0] == "x"


def test_table_of_known_providers_agrees_with_what_is_installed_here() -> None:
    """The table repeats what the plugins of this repository declare; this keeps the two together."""
    manager = PluginManager(environ={})
    compared = 0
    for provider in KNOWN_PROVIDERS:
        if manager.version(provider.distribution) is None:
            continue
        compared += 1
        declared: dict[str, set[str]] = {}
        for spec in manager.discover().entries:
            if spec.distribution == provider.distribution and GROUPS[spec.group].is_component:
                declared.setdefault(spec.group, set()).add(spec.id)
        assert {group: set(ids) for group, ids in provider.ids.items()} == declared
    assert compared
