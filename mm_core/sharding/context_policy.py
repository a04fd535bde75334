"""Where a component's sequences are split over ranks, as data. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from mm_core.config.findings import show
from mm_core.config.patterns import syntax_problem


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class DealtItems:
    """A module that looks at items, such as images, each by itself: ranks that share sequences deal them out.

    Args:
        rows: argument of its forward with the rows of all items one after another, `[P, …]`.
        grids: argument with the grid of each, `[N, 3]`: frames × rows × columns. Frames do not see each other, so that a
            video may be cut between them; that of an item which is not cut is 1.
        outputs: fields of what it returns whose tensors (or tuples of them) are put together again. Each has as many rows as
            `rows`, or so many times fewer. Other fields are each rank's own.
    """

    rows: str
    grids: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContextPolicy:
    """How the ranks of a context-parallel group share each sequence of a component.

    All of them are given the whole sample. Between the points named here each works on its own tokens; what runs before
    and after them sees whole sequences. Modules are named by patterns, relative to the component (`""` is the component
    itself).

    Args:
        attention: modules in which tokens see each other, so that ranks exchange there; other modules work on each token
            by itself, or look from a token at something that is whole (cross-attention to a text). They call
            `torch.nn.functional.scaled_dot_product_attention`, or are modules of transformers.
        split_inputs: module -> argument of its forward -> the dimension of the tokens. An argument without that dimension
            stays whole (a timestep `[B]` where it may be `[B, S]`); in a tuple each tensor is split.
        split_outputs: module -> the dimension of the tokens in each tensor that it returns; one without it stays whole.
        split_marked: module -> argument of its forward -> the argument beside it that marks tokens, `[B, S]`: the first has
            a row for each marked token, in the order of the batch (features of images that a layer adds to their tokens).
            Each rank gets those of its own tokens, and its part of the marks; in a list each tensor is split.
        dealt: modules that look at images, or other items, before these become tokens; each rank takes some of them.
        gather_outputs: the same as `split_outputs` where the tokens of all ranks are put together again. Without any, the
            component returns each rank's own tokens, and whoever takes the loss splits the labels alike
            (`ContextParallel.split`).
        causal: tokens see only themselves and those before them.
        positions: argument of the component that holds the position of each token, `[B, S]`; where it does not go up by
            one, a new document begins, and documents do not see each other. Only if `padding` is absent or not given.
        padding: argument that is 0 where a row is padded, `[B, S]`. Padding at the end of rows is not seen by causal
            attention; any other is refused.
        unsupported: arguments of the component that a sequence which is shared cannot come with.
    """

    attention: tuple[str, ...]
    split_inputs: Mapping[str, Mapping[str, int]] = field(default_factory=_nothing)
    split_outputs: Mapping[str, int] = field(default_factory=_nothing)
    split_marked: Mapping[str, Mapping[str, str]] = field(default_factory=_nothing)
    dealt: Mapping[str, DealtItems] = field(default_factory=_nothing)
    gather_outputs: Mapping[str, int] = field(default_factory=_nothing)
    causal: bool = False
    positions: str | None = None
    padding: str | None = None
    unsupported: tuple[str, ...] = ()


def causal_text(
    decoder: str = "model",
    *,
    marked: Mapping[str, str] | None = None,
    dealt: Mapping[str, DealtItems] | None = None,
    unsupported: tuple[str, ...] = (),
) -> ContextPolicy:
    """The policy of a causal language model of transformers: a decoder with `layers` and one `rotary_emb`, whose layers
    attend in `self_attn`. Each rank gets the logits of its own tokens.

    Args:
        decoder: path of the module with the layers (`model`, `model.language_model`).
        marked: argument of the decoder -> the argument that marks its tokens, see `split_marked`.
        dealt, unsupported: see there.
    """
    return ContextPolicy(
        split_marked={decoder: marked} if marked else {},
        dealt=dealt or {},
        attention=(f"{decoder}.layers.{{*}}.self_attn",),
        split_inputs={f"{decoder}.layers.0": {"hidden_states": 1}},
        split_outputs={f"{decoder}.rotary_emb": 1},
        causal=True,
        positions="position_ids",
        padding="attention_mask",
        unsupported=unsupported,
    )


def context_policy_problem(policy: object) -> str | None:
    """What is wrong with the types and values of a policy's `context`: a part of a sentence; None if nothing is."""
    if policy is None:
        return None
    if not isinstance(policy, ContextPolicy):
        return f"{show(policy)} is of type {type(policy).__name__}, expected a ContextPolicy"
    return next(_problems(policy), None)


def _problems(policy: ContextPolicy) -> Iterator[str]:
    if not isinstance(policy.attention, tuple | list) or not policy.attention:
        yield f"attention is {show(policy.attention)}, expected a tuple of patterns"
        return
    yield from _pattern_problems("attention", policy.attention)
    for name in ("split_inputs", "split_outputs", "gather_outputs"):
        value = getattr(policy, name)
        if not isinstance(value, Mapping):
            yield f"{name} is of type {type(value).__name__}, expected a mapping from patterns"
            continue
        yield from _pattern_problems(name, value)
        for pattern, inner in value.items():
            dimensions = inner.values() if isinstance(inner, Mapping) else (inner,)
            if isinstance(inner, Mapping) != (name == "split_inputs"):
                yield f"{name}: {show(pattern)} has {show(inner)}, expected " + (
                    "a mapping from arguments to dimensions" if name == "split_inputs" else "a dimension"
                )
            elif any(type(number) is not int or number < 0 for number in dimensions):
                yield f"{name}: {show(pattern)} has {show(inner)}; a dimension is a number from 0 on"
    yield from _marked_problems(policy.split_marked)
    yield from _dealt_problems(policy.dealt)
    if not (policy.split_inputs or policy.split_outputs):
        yield "it splits nothing; name the points in split_inputs or split_outputs"
    for one in fields(policy):
        value = getattr(policy, one.name)
        if one.name in ("positions", "padding") and not isinstance(value, str | None):
            yield f"{one.name} is {show(value)}, expected the name of an argument"
        if one.name == "unsupported" and not isinstance(value, tuple):
            yield f"unsupported is {show(value)}, expected a tuple of arguments"
        if one.name == "causal" and not isinstance(value, bool):
            yield f"causal is {show(value)}, expected True or False"


def _marked_problems(value: object) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"split_marked is of type {type(value).__name__}, expected a mapping from patterns"
        return
    yield from _pattern_problems("split_marked", value)
    for pattern, inner in value.items():
        if not isinstance(inner, Mapping) or not all(isinstance(each, str) for each in inner.values()):
            yield (
                f"split_marked: {show(pattern)} has {show(inner)}, expected a mapping from arguments to the argument that "
                "marks their tokens"
            )


def _dealt_problems(value: object) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"dealt is of type {type(value).__name__}, expected a mapping from patterns"
        return
    yield from _pattern_problems("dealt", value)
    for pattern, inner in value.items():
        if not isinstance(inner, DealtItems):
            yield f"dealt: {show(pattern)} has {show(inner)}, expected a DealtItems"
        elif isinstance(inner.outputs, str) or not inner.outputs:
            yield f"dealt: {show(pattern)} has the outputs {show(inner.outputs)}, expected a tuple of names"


def _pattern_problems(name: str, patterns: Any) -> Iterator[str]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            yield f"{name}: {show(pattern)} is of type {type(pattern).__name__}, expected a text"
        elif pattern and (problem := syntax_problem(pattern)) is not None:
            yield f"{name}: {show(pattern)}: {problem}"
