"""What a resumed run does otherwise than the one whose checkpoint it continues.

What changes the numbers counts: plugins, the sections, the schedule, the optimizer's flags. Where files lie, how often
something is logged or saved, how many ranks and workers share the work, and how the model is sharded do not.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from mm_core.config import TrainingJob
from mm_core.config import flag_table as table
from mm_core.config.data import DataloaderConfig
from mm_core.config.findings import show
from mm_core.config.flag_help import flag_name
from mm_core.config.keys import NoEffect
from mm_core.config.model import ModelConfig
from mm_core.config.origin import DEFAULT, KeyPath, dotted
from mm_core.config.resolved import leaves
from mm_core.models.lora_weights import adapter_bases, lora_state
from mm_core.training.schedule import LearningRate
from mm_registry import PluginManager, default_manager

#: Their versions are told when they differ.
PACKAGES = (
    "mmzoo-core", "mmzoo-registry", "torch", "torch-npu", "diffusers", "transformers", "safetensors", "numpy", "torchdata",
    "av", "tokenizers",
)  # fmt: skip
#: The engine: told like any other package, for a plugin is what a model is made of.
_OWN = ("mmzoo-core", "mmzoo-registry")
_ABSENT = object()

#: Of the schedule, which is compared as a whole; and which of torch's AdamW computes it.
_NOT_OF_OPTIMIZER = frozenset({"lr", "min_lr", "optimizer_selection"})
#: Flags that are compared: of the batch, the optimizer and the adapters.
_FLAGS = (
    frozenset(
        {"global_batch_size", "micro_batch_size", "seq_length", *table.OptimizerFlags.model_fields}
        | {"lora_target_modules", "lora_target_parameters", "lora_r", "lora_alpha", "lora_dropout"}
    )
    - _NOT_OF_OPTIMIZER
)
_LENGTH: KeyPath = ("flags", "seq_length")
_FSDP2 = frozenset({"param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs"})
_MICRO_BATCH: KeyPath = ("flags", "micro_batch_size")
_DATALOADER = frozenset({"sampler_type", "shuffle", "group_data", "group_frame", "group_resolution"})
#: Callbacks and patches change no number; plugins are compared by what they offer; weights come from the checkpoint.
_NOT_OF_MODEL = frozenset(
    {"callbacks", "plugins", "patch", "init_from_hf_path", "init", "lora_save_full_weight"}
)
#: Of a section whose weights come from the checkpoint, however it is cut into stages.
_NOT_OF_PREDICTOR = frozenset({"from_pretrained", "hub_backend", "init", "dtype", "pipeline_num_layers"})
_SCHEDULE = {
    "peak": "--lr",
    "minimum": "--min-lr",
    "style": "--lr-decay-style",
    "warmup_steps": "--lr-warmup-iters",
    "warmup_init": "--lr-warmup-init",
    "decay_steps": "--lr-decay-iters (by default --train-iters)",
    "wsd_style": "--lr-wsd-decay-style",
    "wsd_decay_steps": "--lr-wsd-decay-iters",
}


def learning_rate(flags: Any) -> LearningRate:
    """The schedule that the flags say."""
    return LearningRate(
        peak=flags.lr,
        minimum=flags.min_lr or 0.0,
        style=flags.lr_decay_style,
        warmup_steps=flags.warmup_steps,
        warmup_init=flags.lr_warmup_init,
        decay_steps=flags.lr_decay_iters or flags.train_iters,
        wsd_style=flags.lr_wsd_decay_style,
        wsd_decay_steps=flags.lr_wsd_decay_iters or 1,
    )


def identity(job: TrainingJob, manager: PluginManager | None = None) -> dict[str, Any]:
    """What a checkpoint keeps of a job, to compare others with: `fingerprint`, `schedule`, `plugins` and `versions`,
    and `lora` if adapters are trained."""
    manager = manager or default_manager()
    components = {
        dotted(component.path) or component.role: {
            "id": component.spec.id,
            "distribution": component.spec.distribution,
            "target": component.spec.target,
        }
        for component in job.components.values()
    }
    adapted = {name: component for name, component in job.components.items() if component.lora is not None}
    lora = {"lora": lora_state(adapted, job.flags.load)} if adapted else {}
    return lora | {
        "fingerprint": {"digest": manager.fingerprint(), "components": components},
        "schedule": asdict(learning_rate(job.flags)),
        "plugins": dict(job.plugins),
        "versions": package_versions(manager),
    }


def package_versions(manager: PluginManager | None = None) -> dict[str, str]:
    """Package -> version, of Python and of what computes numbers; packages that are not installed are left out."""
    manager = manager or default_manager()
    found = {name: manager.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {n: v for n, v in found.items() if v is not None}


def changes(before: Mapping[str, Any], job: TrainingJob) -> list[str]:
    """Lines `what: old → new` of what makes the numbers differ.

    Args:
        before: the state of a checkpoint; what an older one does not tell is not compared.
        job: of now.
    """
    now = identity(job)
    return [
        *_plugins(before, now),
        *_schedule(before, now),
        *_base(before, now),
        *_configuration(before, job),
    ]


def other_versions(before: Mapping[str, Any]) -> list[str]:
    """`torch 2.12.0 → 2.13.0`, for each package whose version is not the checkpoint's."""
    old = before.get("versions")
    if not old:
        return []
    now = package_versions()
    return [
        f"{name} {old.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted({*old, *now})
        if old.get(name) != now.get(name)
    ]


def _plugins(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = before.get("plugins") or {}, now["plugins"]
    if old:
        for name in sorted({*old, *new} - set(_OWN)):
            if old.get(name) != new.get(name):
                yield f"plugin {name}: {old.get(name, 'not used')} → {new.get(name, 'not used')}"
    components = (before.get("fingerprint") or {}).get("components")
    if not isinstance(components, Mapping):
        return
    for place, made in now["fingerprint"]["components"].items():
        was = components.get(place)
        if isinstance(was, Mapping) and dict(was) != made:
            yield f"{place}: {_component(was)} → {_component(made)}"


def _base(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The weights under adapters, which no checkpoint holds."""
    if "lora" not in now or not isinstance(before.get("lora"), Mapping):
        return
    bases = adapter_bases(before["lora"])
    for name, base in adapter_bases(now["lora"]).items():
        old, new = bases.get(name) or {}, base or {}
        if old.get("fingerprint") != new.get("fingerprint"):
            of = f" of {name}" if len(bases) > 1 else ""
            yield f"weights under the adapters{of}: {old.get('path', 'random')} → {new.get('path', 'random')}"


def _component(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('distribution')}/{entry.get('id')} ({entry.get('target')})"


def _schedule(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = before.get("schedule"), now["schedule"]
    if not old:
        return
    styles = {old.get("style"), new["style"]}
    unread = {"minimum", "decay_steps"} if styles == {"constant"} else set()
    unread |= set() if "WSD" in styles else {"wsd_style", "wsd_decay_steps"}
    for key, flag in _SCHEDULE.items():
        if key in old and old[key] != new[key] and key not in unread:
            yield f"{flag}: {show(old[key])} → {show(new[key])}"


def _configuration(before: Mapping[str, Any], job: TrainingJob) -> Iterator[str]:
    config = before.get("config")
    if not isinstance(config, Mapping) or not isinstance(config.get("values"), Mapping):
        return
    resolved = job.resolved()
    old = {path: value for path, value in leaves(config["values"]) if _counts(path)}
    new = {path: value for path, value in leaves(resolved["values"]) if _counts(path)}
    origins = config.get("origins")
    dataset = job.components.get("dataset")
    if getattr(type(dataset.config) if dataset else None, "sequence_length_key", None) is None:
        for values in (old, new):
            values.pop(_LENGTH, None)  # nobody reads it
    if not job.data.dataloader_param.grouped_axes():
        for values in (old, new):
            values.pop(_MICRO_BATCH, None)  # it decides the order of grouped samples only
    for path in sorted({*old, *new}, key=dotted):
        was, became = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if _same(was, became):
            continue
        # A key that one of the two versions does not have, and nobody wrote.
        if was is _ABSENT and _unwritten(resolved["origins"], path):
            continue
        if became is _ABSENT and _unwritten(origins, path):
            continue
        yield f"{_name(path)}: {_shown(was)} → {_shown(became)}"


def _counts(path: KeyPath) -> bool:
    """Whether a value of the resolved configuration changes numbers."""
    match path:
        case ("flags", name, *_):
            return name in _FLAGS and not _idle(table.OptimizerFlags, str(name))
        case ("fsdp2", name, *_):
            return name in _FSDP2
        case ("data", "dataloader_param", name, *_):
            return name in _DATALOADER and not _idle(DataloaderConfig, str(name))
        case ("data", "dataset_param", "basic_parameters", "val_data_path" | "val_max_samples"):
            return False
        case ("data", *_):
            return True
        case ("model", "predictor" | "low_noise_predictor", name, *_):
            return name not in _NOT_OF_PREDICTOR
        case ("model", name, *_):
            return name not in _NOT_OF_MODEL and not _idle(ModelConfig, str(name))
    return False


def _idle(section: type[BaseModel], name: str) -> bool:
    """Whether a key is accepted and never does anything."""
    field = section.model_fields.get(name)
    return field is not None and any(
        isinstance(mark, NoEffect) and mark.when is None for mark in field.metadata
    )


def _same(was: Any, became: Any) -> bool:
    return was is became or (isinstance(was, bool) == isinstance(became, bool) and was == became)


def _unwritten(origins: Any, path: KeyPath) -> bool:
    return isinstance(origins, Mapping) and origins.get(dotted(path), str(DEFAULT)) == str(DEFAULT)


def _name(path: KeyPath) -> str:
    return flag_name(str(path[1])) if path[0] == "flags" else dotted(path)


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else show(value)
