"""The component's target: it exists, and other processes find it as well."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from mm_core.config.dataset_huggingface import ProcessorParameters
from mm_core.testing.case import Case
from mm_core.testing.check import CheckCrashed, CheckFailed, CheckSkipped, check, require
from mm_core.testing.spawned import resolved_in_a_worker
from mm_core.testing.survey import ImportRecord

_X: Any = None  # stands for a value in a call that is only looked at

# How the core calls what it builds: method -> positional arguments, keywords. `self` is the first positional.
_CALLS: Mapping[str, Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "predictor": {"forward": (3, ("prompt", "prompt_mask"))},
    "ae": {"encode": (2, ()), "decode": (2, ()), "latent_shape": (4, ())},
    "text_encoder": {"encode": (3, ())},
    "diffusion": {
        "q_sample": (2, ("noise", "t", "generator")),
        "training_losses": (6, ()),
        "sample": (4, ("uncond_kwargs", "guidance", "steps", "generator", "progress")),
    },
    "pipeline": {"__call__": (2, ("seed", "indices", "steps", "guidance_scale", "negative_prompt"))},
    "chat_template": {
        "render": (2, ("tools", "add_generation_prompt", "enable_thinking")),
        "encode": (4, ()),
        "length": (4, ()),
    },
    "task": {"prepare": (2, ()), "forward": (3, ()), "loss": (3, ()), "tokens": (2, ())},
    "callback": {
        "on_train_start": (2, ()),
        "on_step_start": (3, ()),
        "on_step_end": (3, ()),
        "on_train_end": (2, ()),
    },
    "transformers_model": {"_from_config": (2, ()), "from_pretrained": (2, ())},
}


@check("its target exists and can be imported", stage="light")
def target_exists(case: Case) -> None:
    """The module and the object in it are there, and what they need is installed."""
    record = case.plugin.component_imports[case.spec.group, case.spec.id]
    _imported(record)


@check("its config class, policy, adapter and example exist and can be imported", stage="light")
def companions_exist(case: Case) -> None:
    """As the one before, for everything that is declared for the component."""
    for spec in (case.config_spec, case.policy_spec, case.weights_spec, case.example_spec):
        record = case.plugin.light_imports.get((spec.group, spec.id)) if spec is not None else None
        if record is not None:
            _imported(record)


@check("its target can be called to build one", stage="light")
def target_builds(case: Case) -> None:
    """It is a class or a function; an instance would be shared by all who build one."""
    target: Any = case.target
    what = f"{case.spec.target} is a {type(target).__name__}, not a class or a function"
    require(
        callable(target) and (inspect.isclass(target) or inspect.isroutine(target) or _is_partial(target)),
        what,
    )


@check("it has the methods of its role, and they can be called as the core does", stage="light")
def has_the_methods_of_its_role(case: Case) -> None:
    """By names and arguments alone; what they compute is checked when it is built."""
    target = case.target
    if not inspect.isclass(target):
        raise CheckSkipped("its target is a function; what it builds is looked at when it is built")
    if case.role == "dataset":
        indexed = hasattr(target, "__getitem__") and hasattr(target, "__len__")
        require(indexed or hasattr(target, "__iter__"), "a dataset has __getitem__ and __len__, or __iter__")
        return
    for name, (positional, keywords) in _CALLS.get(case.role, {}).items():
        method: Any = getattr(target, name, None)
        require(callable(method), f"{target.__name__} has no {name}, which a {case.role} must have")
        static = inspect.ismethod(method) or isinstance(inspect.getattr_static(target, name), staticmethod)
        problem = _call_problem(method, positional - (1 if static else 0), dict.fromkeys(keywords))
        require(problem is None, f"{target.__name__}.{name} cannot be called as the core does: {problem}")


@check("its constructor takes the fields of its section", stage="light")
def constructor_takes_its_section(case: Case) -> None:
    """Every effective field is an argument, and every argument without a default is a field or given by the core."""
    fields = dict(case.component.fields)
    given: tuple[Any, ...] = ()
    if case.role == "pipeline":
        given, fields = (_X, _X), {"device": _X, **fields}
    elif case.role == "task":
        given, fields = (_X,), {"seed": 0, "device": _X, **fields}
    elif case.role == "chat_template":
        given = (_X,)  # the folder
        fields = dict.fromkeys(ProcessorParameters.model_fields)
        del fields["model_name_or_path"]
    elif case.role == "dataset" and "seed" in _parameters(case.target):
        fields = {"seed": 0, **fields}
    elif case.role == "transformers_model":
        raise CheckSkipped(f"a {case.role} is not built from the fields of a section")
    problem = _call_problem(case.target, len(given), fields)
    require(problem is None, f"{case.spec.target} does not fit its section: {problem}")


@check("its entry and its class can be pickled by name", stage="light")
def pickles_by_id(case: Case) -> None:
    """Both come back from `pickle`; a class or function as itself, so that workers and checkpoints refer to it by name."""
    require(pickle.loads(pickle.dumps(case.spec)) == case.spec, "its entry does not survive pickle")
    target = case.target
    try:
        copy = pickle.loads(pickle.dumps(target))
    except (pickle.PicklingError, AttributeError, TypeError, ImportError) as error:
        raise CheckFailed(f"{case.spec.target} cannot be pickled: {error}") from error
    if inspect.isclass(target) or inspect.isfunction(target):
        require(copy is target, f"{case.spec.target} comes back from pickle as another object")


@check("a spawned worker finds it by its id", stage="light")
def spawned_worker_resolves_it(case: Case) -> None:
    """A process started by `multiprocessing` with "spawn", as data loaders start them, resolves the id to the same entry
    and imports its config class, policy, adapter and example.
    """
    answers = case.plugin.once("spawned", lambda: resolved_in_a_worker(case.plugin))
    problem = answers.get(case.subject, f"it told nothing of {case.subject}")
    require(problem is None, f"in a spawned process: {problem}")


def _imported(record: ImportRecord) -> None:
    if record.crashed:
        raise CheckCrashed(f"importing {record.target}: {record.crashed}", record.traceback)
    require(not record.error, record.error, record.traceback)


def _is_partial(target: Any) -> bool:
    import functools

    return isinstance(target, functools.partial)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _call_problem(function: Callable[..., Any], positional: int, keywords: Mapping[str, Any]) -> str | None:
    """Why a call with so many positional arguments and these keywords cannot be made; None if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise CheckSkipped(f"the arguments of {function!r} cannot be told: {error}") from error
    try:
        signature.bind(*[_X] * positional, **keywords)
    except TypeError as error:
        return str(error)
    return None
