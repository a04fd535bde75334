"""First values of a model that was built on the meta device and sharded there.

Values are drawn module by module from generators keyed by the module's name, or tensor by tensor as a library's
constructor makes them; then each rank copies its slice. They are therefore the same whole tensors on any number
of ranks and any mesh, and no rank ever holds more than its shards and one module's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from mm_core.random import keyed_seed
from mm_core.sharding.plan import bare_name
from mm_core.weights.errors import WeightsError
from mm_core.weights.peft_names import base_name
from mm_core.weights.recorded import Recorded, recorded
from mm_core.weights.tensors import local_part, shortened


@runtime_checkable
class InitialisesModules(Protocol):
    """A component with initial values of its own."""

    def init_module(self, module: nn.Module) -> bool:
        """Fill the parameters that `module` owns directly, in place; false if they are not this component's
        business.

        `module` is a stand-in of the real module: same class and attributes, whole parameters on the CPU, no
        submodules. It is asked before the module's own `reset_parameters()`.
        """


@runtime_checkable
class ResetsBuffers(Protocol):
    """A component whose buffers are computed, not stored, such as RoPE tables."""

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the buffers again, on `device`."""


def materialize(
    module: nn.Module, device: torch.device | str, seed: int, *, random_init: bool = True
) -> None:
    """Give a module on the meta device its storage and first values, in place. What is real already keeps
    its values and is moved.

    Values come from the nearest enclosing component's `init_module(module) -> bool`, else from the module's
    own `reset_parameters()`; buffers from `reset_buffers(device)` of the component or any of its parts. What is
    part of a model of diffusers or transformers and not of such a component gets the values that the library's
    constructor gives it; so do buffers that nothing else computed.

    Args:
        module: the component, sharded or not.
        device: where it is to live; parameters under CPU offload stay on the CPU.
        seed: the run's seed.
        random_init: false leaves parameters without values, for a caller that loads all of them next.
            Buffers are computed all the same.

    Raises:
        WeightsError: some parameter or buffer has nothing that fills it; all of them are listed.
    """
    device = torch.device(device)
    meta_buffers = {name for name, buffer in module.named_buffers() if buffer.is_meta}
    meta_parameters = {id(p) for p in module.parameters() if p.is_meta}
    keep_parameters_on_cpu = _offloads(module)
    targets = {name for name, p in module.named_parameters() if id(p) in meta_parameters}
    parameter_device = torch.device("cpu") if keep_parameters_on_cpu else device

    def place(tensor: torch.Tensor) -> torch.Tensor:
        where = parameter_device if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor.to(where)

    ties = _ties(module)
    # What `to()` and `to_empty()` are made of; unlike `to_empty()` it spares values that are real.
    module._apply(place)
    for (owner, name), *others in ties:  # on meta, it gives each of them a tensor of its own
        for other, other_name in others:
            other._parameters[other_name] = owner._parameters[name]

    unfilled: list[str] = []
    libraries = _Libraries(module, seed)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in meta_buffers:
                _mark_unset(buffer)
        if random_init:
            unfilled += _fill_parameters(module, targets, meta_buffers, seed, libraries)
        for part in module.modules():
            if isinstance(part, ResetsBuffers):
                part.reset_buffers(device)
            if callable(after := getattr(part, "post_meta_init", None)) and (meta_parameters or meta_buffers):
                after()  # MindSpeed-MM's name for what a model does once it has left the meta device
        for name, buffer in module.named_buffers():
            if name in meta_buffers and _is_unset(buffer):
                value = libraries.value(name, buffer)
                if value is not None:
                    buffer.copy_(value)
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        loaded_later = not random_init and name in persistent
        if name in meta_buffers and _is_unset(buffer) and not loaded_later:
            unfilled.append(f"  buffer {bare_name(name)}: give the component reset_buffers(device)")
    if unfilled:
        raise WeightsError(
            f"{type(module).__name__} was built on the meta device, and nothing gives a value to:\n"
            + "\n".join(shortened(unfilled, 20))
        )


class _Libraries:
    """Values of the models inside a module that a library can construct again; each is recorded when it is first
    asked for.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._modules = dict(module.named_modules())
        self._seed = seed
        self._records: dict[str, Recorded | None] = {}

    def value(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The whole tensor of a parameter or buffer, on the CPU; `None` if no library makes it."""
        parts = name.split(".")
        for length in range(len(parts)):  # the outermost model first: its constructor has the last word
            path = ".".join(parts[:length])
            record = self._record(path)
            if record is None:
                continue
            rest = ".".join(parts[length:])
            with _keyed_generator(self._seed):
                value = record.value(_upstream(rest), tensor.shape, self._seed)
            if value is not None:
                return value
        return None

    def _record(self, path: str) -> Recorded | None:
        if path not in self._records:
            self._records[path] = recorded(self._modules[path])
        return self._records[path]


def _fill_parameters(
    module: nn.Module, targets: set[str], meta_buffers: set[str], seed: int, libraries: _Libraries
) -> list[str]:
    """Fill the named parameters module by module; returns a line for each that nothing fills."""
    unfilled: list[str] = []
    components: list[tuple[str, InitialisesModules]] = []
    for path, owner in module.named_modules():
        if isinstance(owner, InitialisesModules):
            components.append((path, owner))
        own = {
            name: p for name, p in owner._parameters.items() if p is not None and _join(path, name) in targets
        }
        if not own:
            continue
        enclosing = [c for p, c in components if not p or path == p or path.startswith(p + ".")]
        if not enclosing:
            for name in [n for n, p in own.items() if _fill(p, libraries.value(_join(path, n), p))]:
                del own[name]
        if own:
            unfilled += _fill_own(owner, path, own, meta_buffers, seed, enclosing[-1] if enclosing else None)
    return unfilled


def _fill_own(
    owner: nn.Module,
    path: str,
    own: dict[str, nn.Parameter],
    meta_buffers: set[str],
    seed: int,
    component: InitialisesModules | None,
) -> list[str]:
    """Fill parameters of one module, and its buffers, by means of a stand-in."""
    unfilled: list[str] = []
    stand_in = _stand_in(owner, own)
    with _keyed_generator(keyed_seed(seed, f"init {_upstream(path)}")):
        how = _initialise(stand_in, owner, component)
    for name, parameter in own.items():
        whole = stand_in._parameters[name]
        assert whole is not None
        if how is None or _is_unset(whole):
            reason = "its module has no reset_parameters()" if how is None else f"{how} leaves it out"
            unfilled.append(
                f"  parameter {bare_name(_join(path, name))} of {_class_name(owner)}: {reason}; "
                "give the component init_module(module)"
            )
            continue
        _fill(parameter, whole)
    for name, buffer in owner._buffers.items():
        value = stand_in._buffers.get(name)
        is_new = _join(path, name) in meta_buffers
        if buffer is not None and value is not None and is_new and not _is_unset(value):
            buffer.copy_(value)
    return unfilled


def _fill(parameter: nn.Parameter, whole: torch.Tensor | None) -> bool:
    """Copy this rank's part of a whole tensor; false if there is none."""
    if whole is None:
        return False
    storage, slices = local_part(parameter)
    storage.copy_(whole.detach()[slices])
    return True


def _initialise(stand_in: nn.Module, owner: nn.Module, component: InitialisesModules | None) -> str | None:
    """Run the initialiser that applies, and return its name; `None` if there is none."""
    # A component that initialises its own parameters must meet the stand-in under `self` as well.
    if component is owner:
        assert isinstance(stand_in, InitialisesModules)
        component = stand_in
    if component is not None and component.init_module(stand_in):
        return f"{type(component).__name__}.init_module"
    reset: Any = getattr(stand_in, "reset_parameters", None)
    if not callable(reset):
        return None
    try:
        reset()
    except (AttributeError, KeyError) as error:
        raise WeightsError(
            f"{_class_name(owner)}.reset_parameters() reaches beyond the parameters that the module "
            f"owns ({error}); "
            "give the component init_module(module)."
        ) from error
    return f"{_class_name(owner)}.reset_parameters"


def _stand_in(owner: nn.Module, own: dict[str, nn.Parameter]) -> nn.Module:
    """A shallow copy of a module with whole, unset parameters and buffers on the CPU, and no submodules."""
    copy: nn.Module = object.__new__(type(owner))
    copy.__dict__ = dict(owner.__dict__)
    copy._modules = {}
    copy._parameters = {}
    for name, parameter in owner._parameters.items():
        if parameter is None:
            copy._parameters[name] = None
        elif name in own:
            whole = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
            _mark_unset(whole)
            copy._parameters[name] = whole
    copy._buffers = {
        name: None if b is None else b.detach().cpu().clone() for name, b in owner._buffers.items()
    }
    return copy


@contextmanager
def _keyed_generator(seed: int) -> Iterator[None]:
    """The CPU's global generator, which initialisers draw from, seeded for a moment.

    Devices' generators are left alone.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _mark_unset(tensor: torch.Tensor) -> None:
    """Fill with a value that no initialiser leaves everywhere."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.zero_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def _is_unset(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype is torch.bool:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().all())
    unset: bool = (tensor == torch.iinfo(tensor.dtype).min).all().item()
    return unset and tensor.dtype is not torch.uint8  # whose smallest value is an ordinary one


def _ties(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where each parameter sits that several modules share."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
    return [shared for shared in places.values() if len(shared) > 1]


def _offloads(module: nn.Module) -> bool:
    """Whether the module's sharded parameters live on the CPU; `apply_plan` notes it on the root."""
    return any(getattr(part, "_mm_offload_to_cpu", False) for part in module.modules())


def _upstream(name: str) -> str:
    """The name without wrappers, those of PEFT too: a network starts from the same values with adapters and without."""
    bare = bare_name(name)
    return base_name(bare) or bare


def _class_name(module: nn.Module) -> str:
    """The class as written; FSDP2 puts one of its own in front."""
    return type(module).__name__.removeprefix("FSDP")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
