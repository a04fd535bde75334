"""What importing the plugin does to the process that imports it."""

from __future__ import annotations

from mm_core.testing.case import Case, Plugin
from mm_core.testing.check import CheckCrashed, CheckSkipped, check, require
from mm_core.testing.survey import ImportRecord
from mm_registry.groups import GROUPS, HOOKS
from mm_registry.spec import EntrySpec

SHARDED = ("predictor", "transformers_model")
MODULE_BUDGET = 100
"""Modules that a light target may bring beside what the core has imported when it asks for it."""


@check("its config class brings nothing heavy", stage="light")
def config_is_light(case: Case) -> None:
    """`mm check` and `mm list` stay fast: no torch, transformers or diffusers, and few modules at all."""
    _light(case, case.config_spec, "config class")


@check("its sharding policy brings nothing heavy", stage="light", roles=SHARDED)
def policy_is_light(case: Case) -> None:
    """As for the config class: `mm check` reads the policy."""
    _light(case, case.policy_spec, "sharding policy")


@check("its weights adapter brings nothing heavy", stage="light", roles=SHARDED)
def weights_adapter_is_light(case: Case) -> None:
    """As for the config class: headers of weights are looked at without torch."""
    _light(case, case.weights_spec, "weights adapter")


@check("its example brings nothing heavy", stage="light")
def example_is_light(case: Case) -> None:
    """The kit reads it before it imports torch."""
    _light(case, case.example_spec, "example")


@check("its hooks bring nothing heavy", stage="light", whole_plugin=True)
def hooks_are_light(plugin: Plugin) -> None:
    """Hooks run while a configuration is checked, before torch is imported."""
    specs = plugin.specs(HOOKS)
    if not specs:
        raise CheckSkipped("it has no hooks")
    for spec in specs:
        _within_budget(plugin.light_imports[spec.group, spec.id])


@check("importing it initialises no CUDA", stage="light")
def import_touches_no_cuda(case: Case) -> None:
    """Once initialised, CUDA cannot be used in forked workers, and every rank holds memory on device 0."""
    for record in _records(case):
        require(
            not record.cuda, f"importing {record.target} initialises CUDA, at {', '.join(record.cuda[:2])}"
        )


@check("importing it starts no process group", stage="light")
def import_starts_no_process_group(case: Case) -> None:
    """`torch.distributed` belongs to the launcher."""
    _unchanged(case, "distributed", "initialises torch.distributed")


@check("importing it leaves torch's global settings alone", stage="light")
def import_keeps_torch_state(case: Case) -> None:
    """Default dtype and device, deterministic algorithms, threads, grad mode, matmul precision, the random generator; and no
    function of torch is replaced by another one.
    """
    _unchanged(case, "torch", "changes torch's")


@check("importing it leaves the environment variables alone", stage="light")
def import_keeps_the_environment(case: Case) -> None:
    """Every process that is started later inherits them."""
    _unchanged(case, "environment", "changes the environment:")


@check("importing it leaves the interpreter's settings alone", stage="light")
def import_keeps_the_interpreter(case: Case) -> None:
    """`sys.path`, the root logger, signal handlers, the recursion limit, the working directory, the module `random`."""
    _unchanged(case, "interpreter", "changes")


@check("importing it writes no file in the working directory", stage="light")
def import_writes_no_files(case: Case) -> None:
    """Nothing is done at import."""
    _unchanged(case, "files", "writes")


@check("importing it starts no thread", stage="light")
def import_starts_no_threads(case: Case) -> None:
    """A process with threads cannot be forked safely."""
    _unchanged(case, "threads", "starts the thread")


@check("importing it prints nothing", stage="light")
def import_prints_nothing(case: Case) -> None:
    """Commands write JSON to standard output."""
    for record in _records(case):
        require(not record.printed, f"importing {record.target} prints {record.printed[:80]!r}")


def _records(case: Case) -> list[ImportRecord]:
    """What importing the component and its own companions did."""
    light = case.plugin.light_imports
    companions = (case.config_spec, case.policy_spec, case.weights_spec, case.example_spec)
    records = [case.plugin.component_imports[case.spec.group, case.spec.id]]
    for spec in companions:
        if spec is not None and (spec.group, spec.id) in light:
            records.append(light[spec.group, spec.id])
    usable = [record for record in records if not record.crashed]
    if not usable:
        raise CheckCrashed(f"importing {records[0].target}: {records[0].crashed}")
    return usable


def _unchanged(case: Case, kind: str, verb: str) -> None:
    for record in _records(case):
        changed = record.changes.get(kind, ())
        require(not changed, f"importing {record.target} {verb} {', '.join(changed[:4])}")


def _light(case: Case, spec: EntrySpec | None, what: str) -> None:
    if spec is None:
        raise CheckSkipped(f"it has no {what}")
    record = case.plugin.light_imports.get((spec.group, spec.id))
    if record is None:
        raise CheckSkipped(f"its {what} is that of {spec.distribution}")
    _within_budget(record)


def _within_budget(record: ImportRecord) -> None:
    if record.crashed:
        raise CheckCrashed(f"importing {record.target}: {record.crashed}", record.traceback)
    noun = GROUPS[record.group].noun
    require(not record.heavy, f"the {noun} {record.target} imports {', '.join(record.heavy)}")
    slowest = ", ".join(name for name, _ in record.slowest[:3])
    require(
        record.modules <= MODULE_BUDGET,
        f"the {noun} {record.target} imports {record.modules} modules, at most {MODULE_BUDGET} are allowed; "
        f"the slowest are {slowest}",
    )
