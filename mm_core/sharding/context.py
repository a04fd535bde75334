"""Context parallelism: several ranks share each sequence, each with its own tokens, and exchange in attention.

A component's policy says where sequences are split and gathered (`ContextPolicy`). What runs before is computed by
every rank of the group on the whole sample. Gradients need no exchange of their own: the backward pass of each
exchange here is its true adjoint, so the sum of the ranks' gradients, which FSDP2 takes anyway, is the gradient of the
sum of the ranks' losses. Whether each rank takes the loss of the gathered output (and counts it once a rank, as its
weight) or that of its own tokens, the quotient of the sums is the same.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from mm_core.config.parallel import ContextAlgorithm, ParallelSizes
from mm_core.sharding.block_attention import kernel_for
from mm_core.sharding.context_items import deal_items, gathered
from mm_core.sharding.context_policy import ContextPolicy
from mm_core.sharding.context_text import exchange_in_transformers, is_transformers, transformers_problem
from mm_core.sharding.context_torch import exchange_in_torch
from mm_core.sharding.documents import documents_of, refuse_padding
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.plan import ShardingError, ShardingPlan
from mm_core.sharding.ring import ring_attention
from mm_core.sharding.sequence import Documents, SequenceLayout
from mm_core.sharding.ulysses import ulysses_attention

log = logging.getLogger(__name__)

_ATTRIBUTE = "_mm_context"
_FLAG, _ALGORITHM_FLAG = "--context-parallel-size", "--context-parallel-algo"


def context_of(root: nn.Module) -> ContextParallel | None:
    """How the ranks share the sequences of an FSDP root; None if they do not."""
    return getattr(root, _ATTRIBUTE, None)


def context_problem(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> str | None:
    """Why the sequences of a component cannot be shared by so many ranks: a sentence; None if they can.

    Args:
        root: the bare component, on any device.
    """
    if sizes.cp == 1:
        return None
    name = plan.full_path("")
    if plan.context is None:
        return (
            f"{_FLAG}: {sizes.cp} ranks cannot share the sequences of {name}, since its sharding policy does not say where "
            "they are split (context); set it to 1."
        )
    if (problem := _unknown_argument(root, plan, plan.context)) is not None:
        return problem
    for path in plan.context.attention:
        module = root.get_submodule(path)
        if (problem := transformers_problem(module, plan.full_path(path))) is not None:
            return f"{_FLAG}: {problem}; set it to 1."
        heads = _heads(module)
        if heads is None or sizes.cp_algo == "ring":
            continue
        own = heads // sizes.tp
        if own % sizes.cp:
            fitting = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
            shared = f" of each of the {sizes.tp} tensor-parallel ranks" if sizes.tp > 1 else ""
            return (
                f"{_FLAG}: {sizes.cp} does not divide the {own} heads of {plan.full_path(path)}{shared}, which "
                f"ulysses_cp_algo deals out; use one of {fitting}, or {_ALGORITHM_FLAG} megatron_cp_algo (ring attention), "
                "which deals out none."
            )
    return None


def _unknown_argument(root: nn.Module, plan: ShardingPlan, policy: ContextPolicy) -> str | None:
    """A name in the policy that no forward takes: a sentence."""
    of_root = [name for name in (policy.positions, policy.padding, *policy.unsupported) if name is not None]
    marked = [(path, [*each, *each.values()]) for path, each in policy.split_marked.items()]
    items = [(path, [each.rows, each.grids]) for path, each in policy.dealt.items()]
    # These are looked for by name; what is only split may come as one of `**kwargs`.
    for path, names in [*marked, *items, *policy.split_inputs.items(), ("", of_root)]:
        parameters = inspect.signature(root.get_submodule(path).forward).parameters
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if is_open and (path, names) not in (*marked, *items):
            continue
        wrong = next((name for name in names if name not in parameters), None)
        if wrong is not None:
            return (
                f"policy of {plan.full_path('')}, context: {plan.full_path(path)} is called with ({', '.join(parameters)}), "
                f"none of which is {wrong}."
            )
    return None


class ContextParallel:
    """The ranks that share the sequences of one FSDP root, and how the present forward pass shares them.

    Args:
        group: the ranks.
        policy: with paths in place of patterns.
        algorithm: how they exchange in attention.
        name: of the root, for messages.

    Attributes:
        layout: which tokens each rank has; set by the first split of a forward pass, and kept for its backward pass.
        documents: those that are packed into each row.
    """

    def __init__(
        self, group: dist.ProcessGroup, policy: ContextPolicy, algorithm: ContextAlgorithm, name: str
    ) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.policy = policy
        self.algorithm = algorithm
        self.name = name
        self.layout: SequenceLayout | None = None
        self.documents: Documents | None = None
        self._told = False

    def name_of(self, path: str) -> str:
        """Path of a module of the root, for messages."""
        return f"{self.name}.{path}" if path else self.name

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Before a forward pass of the root.

        Args:
            arguments: of its forward, by name.

        Raises:
            UserError: rows are padded elsewhere than at their end, or come with an argument that is not supported.
        """
        given = next((name for name in self.policy.unsupported if arguments.get(name) is not None), None)
        if given is not None:
            raise ShardingError(
                f"{self.name} is given {given}, with which ranks cannot share a sequence yet; set {_FLAG} to 1."
            )
        self.layout = self.documents = None
        mask = arguments.get(self.policy.padding) if self.policy.padding else None
        positions = arguments.get(self.policy.positions) if self.policy.positions else None
        if mask is not None:
            assert self.policy.padding is not None
            refuse_padding(mask, self.policy.padding, self.name)
        elif positions is not None:
            self.documents = documents_of(positions)

    def layout_of(self, length: int) -> SequenceLayout:
        """Which tokens of a sequence each rank has.

        A ring of causal attention gives each rank a part of the beginning and one of the end, for else the last ranks
        would do most of the work.
        """
        if self.algorithm == "ring" and self.policy.causal:
            return SequenceLayout.balanced(length, self.size)
        return SequenceLayout.contiguous(length, self.size)

    def split(self, tensor: torch.Tensor, dimension: int = 1) -> torch.Tensor:
        """This rank's tokens of a whole tensor.

        Raises:
            ShardingError: another tensor of this forward pass was longer or shorter.
        """
        length = tensor.shape[dimension]
        if self.layout is None:
            self.layout = self.layout_of(length)
        elif self.layout.length != length:
            raise ShardingError(
                f"{self.name}: the points where its policy splits sequences (context) give two lengths, "
                f"{self.layout.length} and {length}; name points, and dimensions, of the same tokens."
            )
        parts = [tensor.narrow(dimension, span.start, span.size) for span in self.layout.spans[self.rank]]
        return torch.cat(parts, dimension)  # a copy: a view would keep the whole tensor's memory

    def gather(self, tensor: torch.Tensor, dimension: int = 1) -> torch.Tensor:
        """The whole tensor, of the tokens of all ranks, in their order. Every rank of the group calls this.

        The backward pass gives each rank the sum of all ranks' gradients of its tokens.
        """
        layout = self._present(tensor, dimension)
        whole = gathered(tensor.movedim(dimension, 0), layout.sizes, self.group)
        if not layout.in_order:
            whole = torch.cat([whole[span.start : span.stop] for span in layout.order])
        return whole.movedim(0, dimension)

    def split_marked(self, values: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """Those rows of `values` `[N, …]`, one for each token that `marks` `[B, S]` (bool) marks, that are of this rank's
        tokens, in the order in which it holds them.
        """
        place = (marks.flatten().cumsum(0) - 1).view_as(marks)
        return values[self.split(place)[self.split(marks)]]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of this rank's tokens to those of all ranks. Every rank of the group calls this.

        Args:
            query: `[B, H, S_rank, D]`.
            key, value: `[B, G, S_rank, D]`, where G divides H.

        Returns:
            `[B, H, S_rank, D]`.

        Raises:
            ShardingError: the tokens are not those of the split, or the heads cannot be dealt out.
        """
        layout = self._present(query, 2)
        if self.algorithm == "ulysses" and query.shape[1] % self.size:
            raise ShardingError(
                f"{self.name}: {self.size} context-parallel ranks cannot deal out {query.shape[1]} heads; use "
                f"{_ALGORITHM_FLAG} megatron_cp_algo (ring attention)."
            )
        self._tell(query, value)
        exchange = ulysses_attention if self.algorithm == "ulysses" else ring_attention
        return exchange(
            query,
            key,
            value,
            layout,
            self.group,
            causal=self.policy.causal,
            scale=scale,
            documents=self.documents,
        )

    def _present(self, tensor: torch.Tensor, dimension: int) -> SequenceLayout:
        if self.layout is None:
            raise ShardingError(
                f"{self.name}: a module that exchanges tokens runs before any point where the policy splits sequences "
                "(context); name an earlier one in split_inputs or split_outputs."
            )
        if tensor.shape[dimension] != self.layout.sizes[self.rank]:
            raise ShardingError(
                f"{self.name}: {tensor.shape[dimension]} tokens are to be exchanged, but this rank's part of the "
                f"{self.layout.length} that were split has {self.layout.sizes[self.rank]}; a point where they are split is "
                "missing in the policy (context)."
            )
        return self.layout

    def _tell(self, query: torch.Tensor, value: torch.Tensor) -> None:
        if not self._told:
            self._told = True
            way = (
                "tokens are exchanged for heads (Ulysses)"
                if self.algorithm == "ulysses"
                else f"keys go round (ring attention, {kernel_for(query, value)} blocks)"
            )
            log.info("%s: %d ranks share each sequence; in attention %s.", self.name, self.size, way)


def share_attention(
    root: nn.Module, modules: Mapping[str, nn.Module], plan: ShardingPlan, mesh: ParallelMesh | None
) -> ContextParallel | None:
    """Let the attention modules of a plan exchange tokens, in place; before they are wrapped.

    Args:
        modules: of the root, by their bare paths.

    Returns:
        None if ranks share no sequences; else what `share_sequences` needs.

    Raises:
        ShardingError: see `context_problem`.
    """
    if mesh is None or mesh.cp is None:
        return None
    if (problem := context_problem(root, plan, mesh.sizes)) is not None:
        raise ShardingError(problem)
    assert plan.context is not None
    context = ContextParallel(mesh.cp.get_group(), plan.context, mesh.sizes.cp_algo, plan.full_path(""))
    for path in plan.context.attention:
        if is_transformers(modules[path]):
            exchange_in_transformers(modules[path], context.attend)
        else:
            exchange_in_torch(modules[path], plan.full_path(path), context)
    setattr(root, _ATTRIBUTE, context)
    return context


def share_sequences(
    modules: Mapping[str, nn.Module], bare: Mapping[str, nn.Module], context: ContextParallel
) -> None:
    """Hook the points where sequences are split and gathered; after recomputed modules were wrapped, so that these keep
    this rank's tokens only.

    Args:
        modules: of the root, by their bare paths, wrapped or not.
        bare: the same, none wrapped.
    """
    policy = context.policy
    names = _argument_names(bare[""])

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        context.begin(_by_name(names, args, kwargs))
        # Nothing is left to mask, and what would be masked by it has this rank's tokens only.
        positional = tuple(
            None if i < len(names) and names[i] == policy.padding else value for i, value in enumerate(args)
        )
        return positional, {name: None if name == policy.padding else value for name, value in kwargs.items()}

    modules[""].register_forward_pre_hook(begin, with_kwargs=True)
    for path, arguments in policy.split_inputs.items():
        hook = _split_arguments(context, _argument_names(bare[path]), arguments)
        modules[path].register_forward_pre_hook(hook, with_kwargs=True)
    for path, marked in policy.split_marked.items():
        hook = _split_marked_arguments(context, _argument_names(bare[path]), marked)
        modules[path].register_forward_pre_hook(hook, with_kwargs=True)
    for path, items in policy.dealt.items():
        deal_items(modules[path], items, _argument_names(bare[path]), context.group, context.name_of(path))
    for path, dimension in policy.split_outputs.items():
        modules[path].register_forward_hook(_on_output(context.split, dimension))
    for path, dimension in policy.gather_outputs.items():
        modules[path].register_forward_hook(_on_output(context.gather, dimension))


def _split_arguments(
    context: ContextParallel, names: list[str], arguments: Mapping[str, int]
) -> Callable[..., tuple[Any, Any]]:
    def split(value: Any, dimension: int) -> Any:
        return tree_map_only(
            torch.Tensor, lambda t: context.split(t, dimension) if t.ndim > dimension else t, value
        )

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        positional = tuple(
            split(value, arguments[names[i]]) if i < len(names) and names[i] in arguments else value
            for i, value in enumerate(args)
        )
        named = {
            name: split(value, arguments[name]) if name in arguments else value
            for name, value in kwargs.items()
        }
        return positional, named

    return hook


def _split_marked_arguments(
    context: ContextParallel, names: list[str], arguments: Mapping[str, str]
) -> Callable[..., tuple[Any, Any]]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _by_name(names, args, kwargs)
        changed: dict[str, Any] = {}
        for name, mark in arguments.items():
            marks, values = given.get(mark), given.get(name)
            if marks is not None:
                changed[mark] = context.split(marks)
                changed[name] = tree_map_only(
                    torch.Tensor, lambda t, m=marks: context.split_marked(t, m), values
                )
        positional = tuple(
            changed.get(names[i], value) if i < len(names) else value for i, value in enumerate(args)
        )
        return positional, {name: changed.get(name, value) for name, value in kwargs.items()}

    return hook


def _on_output(function: Callable[[torch.Tensor, int], torch.Tensor], dimension: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return tree_map_only(
            torch.Tensor, lambda t: function(t, dimension) if t.ndim > dimension else t, output
        )

    return hook


def _argument_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _heads(module: nn.Module) -> int | None:
    """The number of heads of an attention module: its own attribute, or that of its configuration."""
    config = getattr(module, "config", None)
    for holder, name in ((module, "heads"), (module, "num_heads"), (config, "num_attention_heads")):
        value = getattr(holder, name, None)
        if type(value) is int:
            return value
    return None
