"""Tensor parallelism: the matrices of a layer are cut over ranks that work on the same tokens.

How a layer is cut is what the model's author knows: classes of transformers carry it as `tp_plan`, from the path of a
module (`*` for a number) to the name of a style; a sharding policy may name more layers (`tensor`), or others for the same.
A first matrix is cut by its outputs and the next one by its inputs, so that a pair needs one sum over the ranks (Shoeybi et
al., arXiv:1909.08053, section 3). Cut parameters are DTensors over the ranks of `tp`, and FSDP2 shards them further; all
others are the same on each of these ranks, as are their gradients.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mm_core.config.parallel import ParallelSizes
from mm_core.sharding.collectives import with_summed_gradient
from mm_core.sharding.expert_form import check_form
from mm_core.sharding.experts import split_experts
from mm_core.sharding.local_copy import with_parameters
from mm_core.sharding.plan import ShardingError, ShardingPlan
from mm_core.sharding.policy import TENSOR_STYLES

log = logging.getLogger(__name__)

FLAG = "--tensor-model-parallel-size"


@dataclass(frozen=True)
class _Cut:
    """How a matrix is cut: the dimension of its weight, and how its input comes and its output goes."""

    dimension: int
    input: Placement
    output: Placement

    @property
    def by_outputs(self) -> bool:
        """Whether each rank computes some of the outputs, from the whole input."""
        return self.dimension == 0


# By the names that transformers gives them (`transformers.distributed.tensor_parallel`).
_WHOLE, _PART = Replicate(), Shard(-1)
_MATRICES = {
    "colwise": _Cut(0, _WHOLE, _PART),
    "colwise_rep": _Cut(0, _WHOLE, _WHOLE),
    "colwise_gather_output": _Cut(0, _WHOLE, _WHOLE),
    "rowwise": _Cut(1, _PART, _WHOLE),
    "rowwise_rep": _Cut(1, _WHOLE, _WHOLE),
    "rowwise_split_input": _Cut(1, _WHOLE, _WHOLE),
    "embedding_rowwise": _Cut(0, _WHOLE, _WHOLE),
}
_SUMMED, _EXPERTS, _UNCUT = "replicated_with_grad_allreduce", "moe_tp_experts", "replicate"
_STYLES = (*_MATRICES, _SUMMED, _EXPERTS, _UNCUT)
assert set(_STYLES) == set(TENSOR_STYLES)


def tensor_problem(root: nn.Module, plan: ShardingPlan, sizes: ParallelSizes) -> str | None:
    """Why a module cannot be cut in this way: a sentence that names the flag; None if it can."""
    try:
        check_tensor_parallel(root, plan, sizes.tp)
    except ShardingError as error:
        return str(error)
    return None


def check_tensor_parallel(root: nn.Module, plan: ShardingPlan, size: int) -> None:
    """Check that a module can be cut over `size` ranks. Needs no ranks; the module may be on the meta device.

    Raises:
        ShardingError: it carries no `tp_plan`, this has a style that is not known here, or the size does not divide the
            heads, widths or experts.
    """
    if size == 1:
        return
    modules = dict(root.named_modules())
    parts = []
    for path, style in tensor_parallel_layers(root, plan).items():
        number, what = _parts(modules, path, style, plan)
        if number is not None:
            parts.append((number, f"{what} of {plan.full_path(path)}"))
    common = math.gcd(*(number for number, _ in parts))
    wrong = next((part for part in parts if part[0] % size), None)
    if wrong is not None:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ShardingError(
            f"{FLAG}: {size} does not divide the {wrong[0]} {wrong[1]}; use one of {allowed}."
        )


def apply_tensor_parallel(root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh) -> None:
    """Cut a module over the ranks of a mesh, in place, before experts are dealt out and `fully_shard`.

    Parameters may be on the meta device; the names of parameters stay. Every rank of the mesh calls this.

    Args:
        root: the module that the plan was built from.
        plan: of which the experts are left alone if they are dealt out otherwise (`expert_parallel_size`).
        mesh: 1-D, of the ranks that share each matrix.

    Raises:
        ShardingError: as `check_tensor_parallel`.
    """
    if mesh.size() == 1:
        return
    check_tensor_parallel(root, plan, mesh.size())
    modules = dict(root.named_modules())
    layers = tensor_parallel_layers(root, plan)
    if plan.experts:
        log.info(
            "experts are dealt out over the %d ranks of expert_parallel_size; the %d ranks that share tensors compute the same "
            "of them",
            plan.expert_parallel_size,
            mesh.size(),
        )
    ties = [places for places in _places(root) if len(places) > 1]
    inputs: dict[str, _Input] = {}
    for paths in _side_by_side(layers):
        inputs |= dict.fromkeys(paths, _Input(mesh, len(paths)))
    for path, style in layers.items():
        module = modules[path]
        if style in _MATRICES:
            _cut(module, mesh, _MATRICES[style], inputs.get(path) or _Input(mesh))
        elif style == _SUMMED:
            _sum_gradients(module, mesh)
        elif style == _EXPERTS:
            split_experts(module, plan.full_path(path), mesh)
    for (first, name), *others in ties:
        for module, other in others:
            module._parameters[other] = first._parameters[name]


def tensor_parallel_layers(root: nn.Module, plan: ShardingPlan) -> dict[str, str]:
    """Path of each module that tensor parallelism changes -> its style.

    Raises:
        ShardingError: no module inside carries a `tp_plan`, or it has a style that is not known here.
    """
    modules = dict(root.named_modules())
    parameters = [name for name, _ in root.named_parameters()]
    layers: dict[str, str] = {}
    bare: list[str] = []  # parameters that a plan names by themselves, as those of experts
    found = False
    for path, carrier in _carriers(root):
        found = True
        for pattern, style in carrier.tp_plan.items():
            full = f"{path}.{pattern}" if path else pattern
            bare += _matching(full, parameters)
            for each in _matching(full, modules):
                if style not in _STYLES:
                    raise ShardingError(
                        f'{FLAG}: the tp_plan of {type(carrier).__name__} gives {plan.full_path(each)} the style "{style}", '
                        f"which is not supported ({', '.join(_STYLES)} are); set it to 1."
                    )
                layers[each] = style
    found, layers = found or bool(plan.tensor), {**layers, **plan.tensor}
    if not found:
        raise ShardingError(
            f"{FLAG}: {plan.full_path('')} is a {type(root).__name__}, whose class carries no tp_plan that says how its layers "
            "are cut, and its sharding policy does not either (tensor); set it to 1."
        )
    if "rowwise" not in layers.values():
        named = f"names only {', '.join(list(layers)[:4])}" if layers else "names nothing that this model has"
        raise ShardingError(
            f"{FLAG}: the tp_plan of {type(root).__name__} {named}, so its blocks would not be cut; set it to 1."
        )
    alone = next((name for name in bare if layers.get(name.rpartition(".")[0]) != _EXPERTS), None)
    if alone is not None:
        raise ShardingError(
            f"{FLAG}: the tp_plan of this model cuts the parameter {plan.full_path(alone)} by itself, which is supported "
            "for experts only; set it to 1."
        )
    _with_norms_of_heads(layers, modules)
    _with_tied_embeddings(root, layers, modules)
    return {path: style for path, style in layers.items() if style != _UNCUT and path not in plan.experts}


def _carriers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a `tp_plan`, which has the plans of those inside them."""
    inside: list[str] = []
    for path, module in root.named_modules():
        if any(not outer or path.startswith(outer + ".") for outer in inside):
            continue
        plan = getattr(module, "tp_plan", None)
        if isinstance(plan, dict) and plan:
            inside.append(path)
            yield path, module


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if regex.fullmatch(name)]


def _with_norms_of_heads(layers: dict[str, str], modules: dict[str, nn.Module]) -> None:
    """Norms of each head, beside matrices that are cut between heads, see the heads of one rank. Not every `tp_plan`
    names them (Qwen3-VL's does not): without a hook that costs a forward pass nothing, and the gradient its other half.
    """
    for path in [path for path, style in layers.items() if style == "colwise"]:
        parent = path.rpartition(".")[0]
        head = getattr(modules.get(parent), "head_dim", None)
        for name, child in modules[parent].named_children() if isinstance(head, int) else ():
            own = list(child.parameters())
            if own and not isinstance(child, nn.Linear) and all(tuple(p.shape) == (head,) for p in own):
                layers.setdefault(f"{parent}.{name}", _SUMMED)


def _with_tied_embeddings(root: nn.Module, layers: dict[str, str], modules: dict[str, nn.Module]) -> None:
    """An embedding whose tensor is that of a head that is cut, is cut alike."""
    path_of = {id(module): path for path, module in modules.items()}
    for places in _places(root):
        paths = [path_of[id(module)] for module, _ in places]
        if len(places) > 1 and any(layers.get(path, "").startswith("colwise") for path in paths):
            for path in paths:
                if isinstance(modules[path], nn.Embedding):
                    layers.setdefault(path, "embedding_rowwise")


def _places(root: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Of each parameter, the modules that have it, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)].append((module, name))
    return list(found.values())


def _parts(
    modules: dict[str, nn.Module], path: str, style: str, plan: ShardingPlan
) -> tuple[int | None, str]:
    """Into how many equal parts a module can be cut, and what they are; None if it stays whole.

    Raises:
        ShardingError: the style is for other modules.
    """
    module = modules[path]
    if style == _SUMMED:
        return None, ""
    if style == _EXPERTS:
        check_form(module, plan.full_path(path))
        return next(p.shape[0] for p in module.parameters()), "experts"
    if style == "embedding_rowwise" and isinstance(module, nn.Embedding):
        return module.num_embeddings, "rows"
    if not isinstance(module, nn.Linear):
        raise ShardingError(
            f'{FLAG}: {plan.full_path(path)} is a {type(module).__name__}, which cannot be cut as "{style}"; set it to 1.'
        )
    by_outputs = _MATRICES[style].by_outputs
    width, what = (module.out_features, "outputs") if by_outputs else (module.in_features, "inputs")
    head = getattr(modules.get(path.rpartition(".")[0]), "head_dim", None)
    if isinstance(head, int) and head > 0 and width % head == 0:
        return width // head, "heads"
    return width, what


class _Input:
    """The input of matrices side by side that are cut by their outputs (queries, keys and values): they read one tensor,
    whose gradient is then summed over the ranks once, and not for each of them.

    Args:
        readers: how many read it.
    """

    def __init__(self, mesh: DeviceMesh, readers: int = 1) -> None:
        self._mesh, self._readers, self._left = mesh, readers, 0
        self._tensor: torch.Tensor | None = None
        self._whole: DTensor | None = None

    def __call__(self, tensor: torch.Tensor, placement: Placement) -> DTensor:
        if self._whole is None or self._tensor is not tensor:
            self._tensor, self._left = tensor, self._readers
            self._whole = DTensor.from_local(tensor, self._mesh, [placement], run_check=False)
        whole, self._left = self._whole, self._left - 1
        if not self._left:
            self._tensor = self._whole = None  # not to be kept alive
        return whole


def _side_by_side(layers: dict[str, str]) -> list[list[str]]:
    """Paths of the matrices right in one module that are cut by their outputs, for each such module."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, style in layers.items():
        if style == "colwise":
            found[path.rpartition(".")[0]].append(path)
    return list(found.values())


def _cut(module: nn.Module, mesh: DeviceMesh, cut: _Cut, given: _Input) -> None:
    """Cut a Linear or an Embedding, in place. What it is given and what it returns stay plain tensors."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        # A bias is added once, to the sum.
        place = Shard(cut.dimension) if name == "weight" or cut.by_outputs else _WHOLE
        # No source rank: each one cuts its own copy, and nothing is sent.
        own = distribute_tensor(parameter.detach(), mesh, [place], src_data_rank=None)
        setattr(module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    inside, wanted = module.forward, _WHOLE if cut.by_outputs else _PART

    def forward(tensor: torch.Tensor) -> torch.Tensor:
        whole = given(tensor, cut.input)
        # Only where it has something to do: its backward pass would sum the gradient of each reader.
        output = inside(whole if cut.input == wanted else whole.redistribute(mesh, [wanted]))
        local: torch.Tensor = output.redistribute(mesh, [cut.output]).to_local()
        return local

    # Not by hooks, in which this would be outside of what wrappers take for the module's own work.
    module.forward = forward


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """A module that is the same on all ranks but sees the heads of one only, such as a norm of each head."""
    cls = type(module)

    def forward(*args: object, **kwargs: object) -> object:
        whole = with_parameters(module, cls, lambda p: with_summed_gradient(p, mesh))
        return whole.forward(*args, **kwargs)

    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]  # what wrappers look at
    module.forward = forward
