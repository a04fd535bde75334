"""First values of models whose class a library can construct again: diffusers' and transformers'.

The constructor runs once more with its tensors on the meta device, and every operation on them is noted.
The values of one parameter or buffer are then computed by repeating just the operations that lead to it, so a
rank holds one whole tensor at a time, and what is computed is what the constructor computes: zero-initialised
projections, `_init_weights`, RoPE tables and all.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_core.random import keyed_seed

log = logging.getLogger(__name__)


class Recorded:
    """What a constructor does, and how to repeat it for one tensor.

    Args:
        construct: makes the module.

    Raises:
        RuntimeError, NotImplementedError, …: what the constructor raises, or an operation of it that needs values.
    """

    def __init__(self, construct: Callable[[], nn.Module]) -> None:
        self._recorder = _Recorder()
        with torch.random.fork_rng(devices=[]), self._recorder, _Initialisers(self._recorder):
            module = construct()
        self._tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        self._tensors |= dict(module.named_buffers(remove_duplicate=False))

    def value(self, name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
        """The whole tensor of a name, on the CPU; `None` if the constructor gives none of that name and shape, or
        leaves it without values.

        Args:
            seed: of the run. Each random operation has its own stream, which depends on nothing but this and
                its place in the constructor.
        """
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            return None
        with torch.no_grad():
            return self._recorder.replay(tensor.detach(), seed)


def recorded(module: nn.Module) -> Recorded | None:
    """The record of a library's model; `None` if the module is none, or cannot be constructed again."""
    construct = _constructor(module)
    if construct is None:
        return None
    try:
        return Recorded(construct)
    except Exception as error:  # a constructor may raise anything; what stays unfilled is reported by name
        log.debug("%s cannot be constructed again (%s)", type(module).__name__, error, exc_info=True)
        return None


def _constructor(module: nn.Module) -> Callable[[], nn.Module] | None:
    # A module of a library that was never imported is none of its own.
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        transformer: Any = module
        return lambda: type(transformer)(copy.deepcopy(transformer.config))
    diffusers = sys.modules.get("diffusers.configuration_utils")
    if diffusers is not None and isinstance(module, diffusers.ConfigMixin):
        configured: Any = module
        return lambda: type(configured).from_config(configured.config)
    return None


@dataclass(frozen=True)
class _Operation:
    """An operation that gave values to storages, with its arguments on meta."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]
    reads: frozenset[int]
    constant: torch.Tensor | None = None

    @property
    def is_random(self) -> bool:
        tags = getattr(self.function, "tags", None)
        return tags is None or torch.Tag.nondeterministic_seeded in tags


class _Recorder(TorchDispatchMode):
    """Sends new tensors to the meta device and notes what is done to them.

    Tensors are told apart by their storage and what they see of it: views need no entry, and neither does a
    Parameter, which is made of a tensor without an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.writers: dict[int, list[int]] = {}
        self.twins: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # by id: a real tensor and its meta form

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        deferred = [tensor for tensor in given if tensor.is_meta]
        has_device = any(argument.name == "device" for argument in func._schema.arguments)
        if not deferred and (given or not has_device):
            return func(*args, **kwargs)  # of real tensors (torch.tensor, NumPy): real
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(self.replay(deferred[0], seed=0))
        args, kwargs = tree_map_only(torch.Tensor, self._on_meta, (args, kwargs))
        if has_device:
            kwargs["device"] = torch.device("meta")
        kwargs.pop("generator", None)
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if func is not torch.ops.aten.detach.default:
            self._note(func, args, kwargs, result)
        return result

    def replay(self, target: torch.Tensor, seed: int) -> torch.Tensor | None:
        """The values of a tensor; itself if it is real, `None` if nothing wrote to it."""
        if not target.is_meta:
            return target
        storages: dict[int, torch.UntypedStorage] = {}

        def real(tensor: torch.Tensor) -> torch.Tensor:
            key = _key(tensor)
            if key not in storages:  # torch.empty, written to later
                storages[key] = torch.UntypedStorage(tensor.untyped_storage().nbytes())
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())

        needed = self._needed(_key(target))
        if not needed:
            return None
        for index in needed:
            operation = self.operations[index]
            if operation.constant is not None:
                real(operation.outputs[0]).copy_(operation.constant)
                continue
            args, kwargs = tree_map_only(torch.Tensor, real, (operation.args, operation.kwargs))
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            if operation.is_random:
                torch.default_generator.manual_seed(keyed_seed(seed, "draw of a constructor", index))
            result = operation.function(*args, **kwargs)
            for noted, computed in zip(operation.outputs, _tensors(result), strict=True):
                if _key(noted) not in storages and _same_layout(noted, computed):
                    storages[_key(noted)] = computed.untyped_storage()
                elif _key(noted) not in operation.reads:
                    real(noted).copy_(computed)
        return real(target)

    def _needed(self, storage: int) -> list[int]:
        """The operations that lead to a storage's values, in their order."""
        found: set[int] = set()
        waiting = [storage]
        seen = {storage}
        while waiting:
            for index in self.writers.get(waiting.pop(), ()):
                found.add(index)
                unseen = self.operations[index].reads - seen
                seen |= unseen
                waiting += unseen
        return sorted(found)

    def note_initialiser(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """An in-place function of `torch.nn.init`, whose first argument is the tensor."""
        key = _key(args[0])
        self._add(_Operation(function, args, {}, [args[0]], frozenset({key})), {key})

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        outputs = list(_tensors(result))
        reads = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        written = {_key(output) for output in outputs} - reads
        for position, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written |= {_key(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}
        is_view = not written
        leaves_unset = func.name().startswith(("aten::empty", "aten::new_empty"))
        if is_view or leaves_unset:
            self.twins[id(result)] = (result, result)  # kept, so that no other storage takes its place
            return
        self._add(_Operation(func, args, kwargs, outputs, frozenset(reads)), written)

    def _add(self, operation: _Operation, written: set[int]) -> None:
        for key in written:
            self.writers.setdefault(key, []).append(len(self.operations))
        self.operations.append(operation)

    def _on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        """The meta form of a real tensor that meets one on meta; a change of it in place is not seen by its views."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self.twins:
            twin = tensor.detach().to("meta")
            self.twins[id(tensor)] = (tensor, twin)
            constant = _Operation(None, (), {}, [twin], frozenset(), tensor.detach().clone())
            self._add(constant, {_key(twin)})
        return self.twins[id(tensor)][1]


class _Initialisers(TorchFunctionMode):
    """Notes functions of `torch.nn.init` that do nothing on meta, such as `trunc_normal_`.

    There is no hook for them, and other libraries hold references to them. But before they return they ask whether
    the tensor is on meta, and are found by that.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if result is True and getattr(func, "__self__", None) is torch.Tensor.is_meta:
            asking = sys._getframe(1)
            if asking.f_globals is vars(torch.nn.init):
                code = asking.f_code
                given = tuple(asking.f_locals[name] for name in code.co_varnames[: code.co_argcount])
                self.recorder.note_initialiser(asking.f_globals[code.co_name], given)
        return result


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


def _key(tensor: torch.Tensor) -> int:
    # A storage's address in memory is 0 on meta; the address of the object itself has no public name.
    return tensor.untyped_storage()._cdata


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, a.stride(), a.storage_offset()) == (
        b.dtype,
        b.shape,
        b.stride(),
        b.storage_offset(),
    )
