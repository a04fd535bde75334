"""Every rank issues the same collectives, whatever modules its micro batch needs.

FSDP2 gathers a unit when it is called and reduces the gradients that its backward pass made. A rank whose micro
batch has no image does not call the vision tower, and the others would wait for it for ever, or exchange the
wrong tensors. Here such a rank *touches* what it skips: before a unit starts, the units listed before it that did
not run are called with a body that does nothing, so that FSDP2's own hooks gather, free and reduce as elsewhere.

The rules that make the order the same in the backward pass too:

* Autograd runs what is ready in the reverse order of its making. The touched units form a chain that hangs, times
  nothing, on the input of the unit that starts next (or on the root's output), which is where the real ones end.
* A unit with trainable parameters reduces their gradients as soon as its backward pass is over, also when none
  of its inputs has a gradient. FSDP2 leaves those to the very end, and a rank that skipped the unit cannot know
  whether they had one. A scalar that passes through FSDP2's hooks beside the inputs (the anchor) sees to it.
* Trainable parameters without a gradient give zeros; which parameters nobody used is known at the end of the
  step, so that the optimizer leaves them alone, as in one process (`Participation.take_unused`).

Two things a rank that skips a unit cannot know. The order of units is the plan's; where a forward pass shows another,
it is learnt, and `Participation.disorder` tells of it. And frozen units at the start of a chain are taken to have
inputs without gradient, as a frozen encoder has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node as GraphNode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mm_core.sharding.joins import first_with_gradient, has_gradient, join
from mm_core.sharding.plan import ALIGNED, ShardingError, ShardingPlan, bare_name, is_inside

log = logging.getLogger(__name__)

_ANCHOR = "_mm_anchor"  # keyword that carries the anchor past FSDP2's hooks; no module ever sees it
_ATTRIBUTE = "_mm_participation"


def every_rank_takes_part(root: nn.Module, plan: ShardingPlan) -> None:
    """Hook a sharded root so that its ranks may skip units; nothing on one rank.

    Args:
        root: after `fully_shard` of it and of its units.
        plan: its units in the order of the forward pass.
    """
    mesh = next((p.device_mesh for p in root.parameters() if isinstance(p, DTensor)), None)
    if mesh is not None and mesh.size() > 1 and isinstance(root, FSDPModule):
        setattr(root, _ATTRIBUTE, Participation(root, plan, mesh.device_type))


def participation_of(root: nn.Module) -> Participation | None:
    """What `every_rank_takes_part` made of a root; None where nothing needs it."""
    return getattr(root, _ATTRIBUTE, None)


class Participation:
    """The units of one FSDP root, and what this rank did with them since the last step.

    Attributes:
        disorder: a unit that ran after another one that the plan lists behind it, and that other one.
        disorder_pass: in which forward pass of the step that was noticed, counted from 1; 0 for in none.
        absent: paths that no rank runs in the passes to come: a rank that has several pipeline stages runs one of them in
            each pass.
    """

    def __init__(self, root: nn.Module, plan: ShardingPlan, device_type: str) -> None:
        self.device_type = device_type
        self.passes = 0
        self.disorder_pass = 0
        self.disorder: tuple[str, str] | None = None
        self.absent: tuple[str, ...] = ()
        self.corrections: list[Callable[[], None]] = []
        modules = {
            bare_name(n): m for n, m in reversed(list(root.named_modules())) if isinstance(m, FSDPModule)
        }
        self.grouped = grouped = {path: modules.pop(path) for path in plan.aligned if path in modules}
        units = {path: _Unit(path, module, self) for path, module in modules.items()}
        order = {unit.path: i for i, unit in enumerate(plan.units)}
        for path in sorted(units, key=lambda path: (order.get(path, len(order)), path)):
            if path:
                above = (p for p in units if p != path and is_inside(path, p))
                units[path].hang_below(units[max(above, key=len)])
        self.root = units[""]
        together = _Unit(ALIGNED, None, self)
        for module in grouped.values():
            together.watch(module)
        self.units = [*units.values(), together]
        self._deal_parameters(root, plan, {**units, ALIGNED: together})
        for unit in units.values():
            unit.hook()
        self.ran: set[nn.Module] = set()  # of the grouped modules, in this pass
        self._used: set[str] = set()
        self._settled: set[_Unit] = set()

    def _deal_parameters(self, root: nn.Module, plan: ShardingPlan, units: dict[str, _Unit]) -> None:
        owners = {p.name: unit.path for unit in (*plan.units, plan.root) for p in unit.parameters}
        for name, parameter in root.named_parameters():
            path, _, attribute = bare_name(name).rpartition(".")
            if not isinstance(parameter, DTensor):
                continue
            nearest = max((p for p in units if is_inside(path, p)), key=len)
            unit = units.get(owners.get(bare_name(name), nearest), units[nearest])
            module = root.get_submodule(name.rpartition(".")[0])
            unit.slots.append((bare_name(name), module, attribute))

    def take_unused(self) -> set[str]:
        """Names of the trainable parameters that no micro batch of this rank used since the last call."""
        unused = {
            full
            for unit in self.units
            for full, module, attribute in unit.slots
            if unit in self._settled and full not in self._used and getattr(module, attribute).requires_grad
        }
        self._used.clear()
        self._settled.clear()
        self.passes, self.disorder_pass, self.disorder = 0, 0, None
        return unused

    def settle(self, unit: _Unit) -> None:
        """Before a unit reduces: a zero where it has no gradient, and note where it has one."""
        self._settled.add(unit)
        for full, module, attribute in unit.slots:
            parameter = getattr(module, attribute)
            if parameter.grad is not None:
                self._used.add(full)
            elif parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def start(self, requires_grad: bool = False) -> torch.Tensor:
        """A fresh scalar: the start of a chain, or an anchor."""
        return torch.zeros((), device=self.device_type, requires_grad=requires_grad)


class _Unit:
    """An FSDP unit: its place among the units of its parent, and the ones inside it."""

    def __init__(self, path: str, module: nn.Module | None, whole: Participation) -> None:
        self.path, self.whole = path, whole
        self.module = module
        self.parent: _Unit | None = None
        self.children: list[_Unit] = []
        self.slots: list[tuple[str, nn.Module, str]] = []  # full name, owner and attribute of each parameter
        self.touching = False
        self.anchor: torch.Tensor | None = None
        self.flows = False  # whether a gradient goes through the call that is under way
        # Of the pass through the children that is under way:
        self.open = False
        self.next = 0  # the child whose turn it is
        self.touched: set[_Unit] = set()
        self.latest: _Unit | None = None
        self.pending: torch.Tensor | None = None  # end of the chain of touched units

    def hang_below(self, parent: _Unit) -> None:
        self.parent = parent
        parent.children.append(self)

    def hook(self) -> None:
        """Register the hooks: before FSDP2's on the way in, and again after them; before them on the way out."""
        assert self.module is not None
        self.watch(self.module)
        if self.parent is not None:
            self.module.register_forward_pre_hook(self._take_turn, prepend=True, with_kwargs=True)
        if self.children:
            # Inside a checkpoint wrapper, so that a recomputation passes by here as well.
            inner = _unwrapped(self.module)
            inner.register_forward_pre_hook(self._open)
            inner.register_forward_hook(self._close, prepend=True)

    def watch(self, module: nn.Module) -> None:
        """See to it that the parameters are reduced in time, and all of them."""
        # Before FSDP2's hook, and after `_take_turn`.
        module.register_forward_pre_hook(self._add_anchor, prepend=True, with_kwargs=True)
        module.register_forward_pre_hook(self._take_anchor, with_kwargs=True)
        module.register_forward_hook(self._tie_anchor, prepend=True)

    # -- a pass through the children ----------------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: Any) -> None:
        if self.touching:
            return
        if self.parent is None:
            self.whole.passes += 1
            for correct in self.whole.corrections:
                correct()
            self.whole.corrections.clear()
            self.whole.ran.clear()
        self.open, self.next, self.latest, self.pending = True, 0, None, None
        self.touched.clear()

    def _take_turn(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        parent = self.parent
        assert parent is not None
        if self.touching or not parent.open:
            return None
        place = parent.children.index(self)
        if place < parent.next:
            if self in parent.touched:
                parent.correct(self)
        else:
            skipped = parent.due(parent.children[parent.next : place])
            parent.next = place + 1
            if skipped:
                parent.touch(skipped)
            if parent.pending is not None:
                (args, kwargs), joined = join(parent.pending, (args, kwargs))
                parent.pending = None if joined else parent.pending
                parent.latest = self
                return args, kwargs
        parent.latest = self
        return None

    def _close(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.touching or not self.open:
            return None
        self.open = False
        if self.parent is None:
            missing = next((path for path, m in self.whole.grouped.items() if m not in self.whole.ran), None)
            if missing is not None:
                raise _not_in_the_group(missing)
        if rest := self.due(self.children[self.next :]):
            self.touch(rest)
        if self.pending is None:
            return None
        output, _ = join(self.pending, output)
        self.pending = None
        return output

    def due(self, units: list[_Unit]) -> list[_Unit]:
        """Those of these children that other ranks may run in this pass."""
        absent = self.whole.absent
        if not absent or self.parent is not None:
            return units
        return [unit for unit in units if not any(is_inside(unit.path, path) for path in absent)]

    def touch(self, units: list[_Unit]) -> None:
        """Run these children through FSDP2's hooks only, and keep the end of the chain if it has a gradient."""
        # Inside a unit whose inputs have a gradient, or that trains, so has what a skipped child would be given.
        flows = self.parent is not None and self.flows
        chain = self.pending if self.pending is not None else self.whole.start(flows)
        for unit in units:
            if any(is_inside(path, unit.path) for path in self.whole.grouped):
                raise _not_in_the_group(unit.path)
            chain = unit.pass_by(chain)
            self.touched.add(unit)
        self.pending = chain if chain.requires_grad else None

    def pass_by(self, chain: torch.Tensor) -> torch.Tensor:
        """Call the unit with a body that does nothing.

        Args:
            chain: 0-d; what is returned depends on it.
        """
        assert self.module is not None
        self.touching = True
        try:
            return _call_instead(self.module, self._nothing, chain)
        finally:
            self.touching = False

    def _nothing(self, chain: torch.Tensor) -> torch.Tensor:
        for child in self.children:
            chain = child.pass_by(chain)
        return _scaled(chain)

    def correct(self, child: _Unit) -> None:
        """Put a child that ran after its turn where it ran, from the next pass on."""
        latest = self.latest
        assert latest is not None
        self.touched.discard(child)
        if self.whole.disorder is None:
            self.whole.disorder, self.whole.disorder_pass = (child.path, latest.path), self.whole.passes
            log.warning(
                "%s runs after %s, though the plan lists it before: list units in the order of the forward pass; "
                "this run goes on with the order that it sees.",
                child.path,
                latest.path,
            )

        def move() -> None:
            self.children.remove(child)
            self.children.insert(self.children.index(latest) + 1, child)

        self.whole.corrections.append(move)

    # -- gradients ------------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether any parameter of its own has a gradient."""
        return any(getattr(module, attribute).requires_grad for _, module, attribute in self.slots)

    def _add_anchor(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.anchor, given = None, torch.is_grad_enabled() and has_gradient(args, kwargs)
        self.flows = given or (torch.is_grad_enabled() and self.trains)
        if given or not self.flows:
            return None
        return args, {**kwargs, _ANCHOR: self.whole.start(requires_grad=True)}

    def _take_anchor(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        anchor = kwargs.pop(_ANCHOR, None)
        tensor = anchor if anchor is not None else first_with_gradient(args, kwargs)
        if tensor is not None and tensor.grad_fn is not None:
            node: GraphNode = tensor.grad_fn  # FSDP2's, which reduces the unit's gradients
            node.register_prehook(lambda grads: self.whole.settle(self))
        if anchor is not None and self.touching:
            (args, kwargs), _ = join(anchor, (args, kwargs))
            return args, kwargs
        self.anchor = anchor
        return args, kwargs

    def _tie_anchor(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.path == ALIGNED:
            self.whole.ran.add(module)
        anchor, self.anchor = self.anchor, None
        if anchor is None:
            return None
        return join(anchor, output)[0]


def _not_in_the_group(path: str) -> ShardingError:
    # Where the group is gathered and reduced depends on which of its modules run.
    return ShardingError(
        f"align_fsdp_param_groups: true gathers modules of {path} together with others, and this micro batch runs the "
        "others without them, so that ranks would wait for each other for ever; write false."
    )


def _scaled(chain: torch.Tensor) -> torch.Tensor:
    # A product with a tensor saves one for the backward pass: a recomputation that stops at the last saved tensor
    # still comes here.
    return chain * torch.ones_like(chain)


def _call_instead(module: nn.Module, body: Callable[..., torch.Tensor], chain: torch.Tensor) -> torch.Tensor:
    """Call a module, hooks and all, with another forward."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = body
    try:
        return module(chain)
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := getattr(module, "_checkpoint_wrapped_module", None)) is not None:
        module = inner
    return module
