"""An optimizer's state by parameter name: tensors for the distributed checkpoint, everything else as JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mm_core.weights.errors import WeightsError
from mm_core.weights.tensors import compare_keys, state_tensors

PREFIX = "optim."
# How a step is computed, not what it computes: a resumed run keeps its own.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


class NamedOptimizer:
    """An optimizer over parameters of named modules, so that its state can be told by name.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        modules: name -> module; together they hold every parameter of the optimizer.

    Raises:
        RuntimeError: the optimizer has a parameter that no module holds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
        self.optimizer = optimizer
        # state_dict() brings FSDP modules into their sharded form, whose parameters the optimizer holds.
        held = {
            id(t): f"{prefix}.{name}" for prefix, m in modules.items() for name, t in state_tensors(m).items()
        }
        self.names: dict[nn.Parameter, str] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in held:
                    raise RuntimeError(
                        f"the optimizer has a parameter of shape {tuple(parameter.shape)} "
                        "that no saved module holds"
                    )
                self.names[parameter] = held[id(parameter)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`optim.<parameter>.<state>` -> tensor, such as `optim.predictor.proj_out.weight.exp_avg`."""
        return {
            f"{PREFIX}{name}.{key}": value
            for name, key, value in self._items()
            if isinstance(value, torch.Tensor)
        }

    def settings(self) -> dict[str, Any]:
        """What is no tensor: each group's hyperparameters with its parameters' names, and plain numbers in
        the state.
        """
        groups = []
        for group in self.optimizer.param_groups:
            hyper = {k: _plain(v) for k, v in group.items() if k not in _IMPLEMENTATION}
            groups.append({"params": [self.names[p] for p in group["params"]], "hyperparameters": hyper})
        scalars = {f"{name}.{key}": v for name, key, v in self._items() if not isinstance(v, torch.Tensor)}
        return {"groups": groups, "scalars": scalars}

    def prepare_states(self, stored: set[str], elsewhere: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Make the states that a checkpoint will be read into, and return them as `tensors()` does.

        An optimizer makes its states in its first step. That step is taken here with zero gradients and
        learning rate 0, which moves no parameter. A parameter without stored state (it never had a gradient)
        loses the state again.

        Args:
            stored: the checkpoint's keys under `optim.`
            elsewhere: names of parameters that other pipeline stages have.

        Raises:
            WeightsError: the stored states are not those of this optimizer.
        """
        stored = {key for key in stored if key.removeprefix(PREFIX).rpartition(".")[0] not in elsewhere}
        if any(p not in self.optimizer.state for p in self.names if p.requires_grad):
            self._first_step()
        for parameter, name in self.names.items():
            if not any(f"{PREFIX}{name}.{key}" in stored for key in self.optimizer.state.get(parameter, {})):
                self.optimizer.state.pop(parameter, None)
        tensors = self.tensors()
        missing, unexpected = compare_keys(tensors, stored)
        if missing or unexpected:
            raise WeightsError(
                f"The stored optimizer state does not fit {type(self.optimizer).__name__} of this run "
                "(use --no-load-optim to go on "
                "without it):\n" + "\n".join([*missing, *unexpected])
            )
        return tensors

    def restore_settings(self, settings: Mapping[str, Any], elsewhere: Collection[str] = ()) -> list[str]:
        """Put back the plain numbers of the states that `settings()` gave. Hyperparameters are this run's own.

        Args:
            elsewhere: as in `prepare_states`.

        Returns:
            A line for each hyperparameter that differs from the stored one, such as `weight_decay 0.01 → 0.1`;
            the learning rate, which the loop sets each step, aside.

        Raises:
            WeightsError: they are of other parameters. How these were grouped makes no difference.
        """
        now = {self.names[p]: group for group in self.optimizer.param_groups for p in group["params"]}
        before = {
            name: entry["hyperparameters"]
            for entry in settings["groups"]
            for name in entry["params"]
            if name not in elsewhere
        }
        if now.keys() != before.keys():
            missing, unexpected = compare_keys(now, before)
            raise WeightsError(
                "The stored optimizer is one of other parameters (use --no-load-optim to go on without it):\n"
                + "\n".join([*missing, *unexpected])
            )
        changes = [
            f"{key} {value} → {_plain(now[name].get(key))}"
            for name, hyperparameters in before.items()
            for key, value in hyperparameters.items()
            if key not in ("lr", "initial_lr") and _as_json(now[name].get(key)) != value
        ]
        scalars = settings["scalars"]
        for name, key, _ in list(self._items()):
            if f"{name}.{key}" in scalars:
                parameter = next(p for p, n in self.names.items() if n == name)
                self.optimizer.state[parameter][key] = scalars[f"{name}.{key}"]
        return list(dict.fromkeys(changes))

    def _items(self) -> Iterator[tuple[str, str, Any]]:
        for parameter, name in self.names.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield name, key, value

    def _first_step(self) -> None:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        gradients = {p: p.grad for p in self.names}
        try:
            for group in groups:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
            for parameter in self.names:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            self.optimizer.step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def merged_settings(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `settings()` of the stages of one model, in their order, would be of the whole model."""
    groups = [
        {**entries[0], "params": [name for entry in entries for name in entry["params"]]}
        for entries in zip(*(part["groups"] for part in parts), strict=True)
    ]
    return {"groups": groups, "scalars": {name: v for part in parts for name, v in part["scalars"].items()}}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _as_json(value: Any) -> Any:
    """As it comes back from JSON, which knows no tuples."""
    value = _plain(value)
    return list(value) if isinstance(value, tuple) else value
