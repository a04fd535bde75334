"""LoRA (Hu et al., arXiv:2106.09685): its flags, and what they and the model file ask for together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mm_core.config.document import closest_path, expanded
from mm_core.config.findings import Finding, show
from mm_core.config.keys import NoEffect
from mm_core.config.model import SECOND
from mm_core.config.section import SectionModel

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.document import Document
    from mm_core.config.flags import TrainFlags
    from mm_core.config.fsdp2 import Fsdp2Config

_IN_FILE = "the model file says it, under the same name"
_HOOK = "gradients reach the adapters without it, since recomputation is not reentrant"
#: Keys of a model file; the flags `--lora-…` of other names have none.
_MODEL_KEYS = ("lora_apply_modules", "lora_mixed_training", "lora_save_full_weight")
_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout")
_SOURCES = ("lora_load", "load_base_model")
#: Components that may be trained, and so get adapters.
_TRAINED = ("predictor", SECOND, "model")
#: What PEFT's folder of an adapter has in it.
ADAPTER_CONFIG = "adapter_config.json"
#: A name among the target modules: every linear layer but the one that makes the logits.
ALL_LINEAR = "all-linear"


def _help(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


class LoraFlags(SectionModel):
    """LoRA"""

    lora_target_modules: Annotated[
        list[str] | None,
        _help(
            "train low-rank adapters of these layers, and nothing else: ends of their names, such as q_proj,v_proj, or "
            "all-linear. Parts that the model file freezes get none"
        ),
    ] = None
    lora_target_parameters: Annotated[
        list[str] | None,
        _help(
            "the same for parameters that are no layer's own matrix, such as a router's or all experts' of a layer: "
            "mlp.gate.weight,mlp.experts.down_proj"
        ),
    ] = None
    lora_r: Annotated[int, _help("rank of the adapters", ge=1, le=65536)] = 8
    lora_alpha: Annotated[
        float, _help("what adapters add is multiplied by alpha / rank", gt=0.0, allow_inf_nan=False)
    ] = 16.0
    lora_dropout: Annotated[float, _help("dropout of the adapters' inputs", ge=0.0, lt=1.0)] = 0.0
    lora_load: Annotated[
        str | None,
        _help("adapter to start from: a folder of PEFT, or a run that was trained with LoRA", min_length=1),
    ] = None
    load_base_model: Annotated[
        str | None,
        _help(
            "weights under the adapters: a Hugging Face folder, or a run that was trained without LoRA; default: those of "
            "the model file",
            min_length=1,
        ),
    ] = None
    lora_register_forward_hook: Annotated[list[str] | None, NoEffect(_HOOK)] = None
    lora_apply_modules: Annotated[list[str] | None, NoEffect(_IN_FILE)] = None
    lora_mixed_training: Annotated[str | None, NoEffect(_IN_FILE)] = None


@dataclass(frozen=True)
class LoraConfig:
    """What of a component gets adapters.

    Attributes:
        target_modules: ends of names of layers, `all-linear` among them.
        target_parameters: ends of names of parameters.
        rank, alpha, dropout: of each adapter; what it adds is multiplied by alpha / rank.
        apply_modules: parts of the network that get them; empty: all.
        mixed_training: other parts that are not frozen are trained as a whole.
        save_full_weight: `--save-hf` writes the merged weights as well.
        load: adapter to start from.
        base: weights under the adapters, instead of the section's.
        frozen_dtype: of the weights under the adapters, by short name; None: fp32. They are computed in it, so that
            nothing is lost.
    """

    target_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    apply_modules: tuple[str, ...] = ()
    mixed_training: bool = False
    save_full_weight: bool = False
    load: str | None = None
    base: str | None = None
    frozen_dtype: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint tells of its adapter."""
        return {
            "target_modules": list(self.target_modules),
            "target_parameters": list(self.target_parameters),
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "apply_modules": list(self.apply_modules),
            "mixed_training": self.mixed_training,
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> LoraConfig:
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            tuple(map(str, told["target_modules"])),
            tuple(map(str, told["target_parameters"])),
            int(told["rank"]),
            float(told["alpha"]),
            float(told["dropout"]),
            tuple(map(str, told["apply_modules"])),
            bool(told["mixed_training"]),
        )


def asks_for_lora(flags: TrainFlags) -> bool:
    """Whether the flags name something that gets adapters."""
    return bool(flags.lora_target_modules or flags.lora_target_parameters)


def weights_given(flags: TrainFlags) -> str | None:
    """Return what the flags name that has the network's own weights, so that the model file need not: `--load`, but not if
    it is a run with LoRA, which has adapters alone.
    """
    if not asks_for_lora(flags):
        return flags.load
    if flags.load_base_model is not None:
        return flags.load_base_model
    return flags.load if flags.load is not None and _is_folder(flags.load) else None


def with_lora(
    components: Mapping[str, ComponentConfig],
    flags: TrainFlags,
    model: Document | None,
    fsdp2: Fsdp2Config | None,
    fsdp2_file: Document | None,
) -> tuple[dict[str, ComponentConfig], list[Finding]]:
    """Give each component that is trained the adapters that a job asks for; two experts get the same ones.

    Args:
        model, fsdp2_file: the files, as read.
        fsdp2: the sharding file, checked, with what flags fill in.

    Returns:
        The components, and errors about what does not go together or notes about keys without effect.
    """
    keys = {} if model is None else {k: model.value((k,)) for k in _MODEL_KEYS if model.has((k,))}
    if not asks_for_lora(flags):
        return dict(components), list(_without(flags, model, keys))
    findings = [
        *_sources(flags),
        *_of_both(flags, components),
        *_together(flags, model, keys, fsdp2, fsdp2_file),
    ]
    parts = keys.get("lora_apply_modules")
    parts = parts if isinstance(parts, list) and all(isinstance(part, str) for part in parts) else []
    config = LoraConfig(
        tuple(flags.lora_target_modules or ()),
        tuple(flags.lora_target_parameters or ()),
        flags.lora_r,
        flags.lora_alpha,
        flags.lora_dropout,
        () if "all" in parts else tuple(parts),
        keys.get("lora_mixed_training") is True,
        keys.get("lora_save_full_weight") is True,
        flags.lora_load,
        flags.load_base_model,
        None if fsdp2 is None else fsdp2.param_dtype,
    )
    second = config
    if SECOND in components and flags.load_base_model is not None and _is_folder(flags.load_base_model):
        second = replace(config, base=None)  # a folder holds one network, the first expert's
    configs = {name: second if name == SECOND else config for name in _TRAINED}
    return {n: replace(c, lora=configs[n]) if n in configs else c for n, c in components.items()}, findings


def _is_folder(path: str) -> bool:
    """Whether it is a Hugging Face folder, rather than a run."""
    return any(expanded(path).glob("*.safetensors"))


def _without(flags: TrainFlags, model: Document | None, keys: Mapping[str, Any]) -> Iterator[Finding]:
    """What is said of LoRA where nothing gets adapters."""
    needs = "LoRA begins with --lora-target-modules, which names what gets adapters"
    for name in _SOURCES:
        if getattr(flags, name) is not None:
            mend = "Add it, or give the weights as --load"
            yield flags.finding(name, "missing-flag", f"it is of LoRA, and {needs}", mend)
    for name in _SETTINGS:
        if name in flags.model_fields_set:
            text = f"it has no effect: {needs}"
            yield Finding.at(flags.origin(name), "note", "no-effect", text, path=flags.spelling(name))
    for name, value in keys.items():
        if model is not None and value not in (None, False, []):
            text = f'"{name}" has no effect: {needs}'
            yield Finding.at(model.key_origin((name,)), "note", "no-effect", text, path=(name,))


def _sources(flags: TrainFlags) -> Iterator[Finding]:
    for name in _SOURCES:
        value = getattr(flags, name)
        if value is not None and not expanded(value).is_dir():
            text = f'"{value}": there is no such folder'
            yield flags.finding(name, "missing-path", text, closest_path(value))
    if (
        flags.load_base_model is not None
        and flags.load is not None
        and weights_given(flags.model_copy(update={"load_base_model": None}))
    ):
        text = f"{flags.spelling('load')} names a folder of weights too, and there is one base"
        yield flags.finding("load_base_model", "conflict", text, "Leave one of them out")


def _of_both(flags: TrainFlags, components: Mapping[str, ComponentConfig]) -> Iterator[Finding]:
    if SECOND not in components or flags.lora_load is None:
        return
    if (expanded(flags.lora_load) / ADAPTER_CONFIG).is_file():
        text = f'"{flags.lora_load}": it is the folder of one adapter, and two experts are trained'
        mend = (
            "Name a run that trained adapters of both, or train one expert at a time (boundary with expert)"
        )
        yield flags.finding("lora_load", "conflict", text, mend)


def _together(
    flags: TrainFlags,
    model: Document | None,
    keys: Mapping[str, Any],
    fsdp2: Fsdp2Config | None,
    fsdp2_file: Document | None,
) -> Iterator[Finding]:
    if flags.lora_dropout and flags.lora_target_parameters:
        text = f"{flags.lora_dropout} cannot be had with --lora-target-parameters, whose inputs nobody sees"
        yield flags.finding("lora_dropout", "conflict", text, "Set it to 0, or leave the parameters out")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(flags, name) > 1:
            text = f"{getattr(flags, name)}: layers with adapters cannot be shared in this way"
            yield flags.finding(name, "conflict", text, "Set it to 1; FSDP2 shares the weights")
    experts = 1 if fsdp2 is None else fsdp2.expert_parallel_size or 1
    if experts > 1 and flags.lora_target_parameters:
        text = f"experts are dealt out to {experts} ranks, and adapters of parameters need them together"
        mend = "Write expert_parallel_size: 1, or take layers (--lora-target-modules) alone"
        yield flags.finding("lora_target_parameters", "conflict", text, mend)
    if fsdp2 is not None and fsdp2.use_reentrant and fsdp2_file is not None:
        text = "use_reentrant is true, with which recomputed layers under frozen embeddings get no gradients, and LoRA "
        text += "trains nothing"
        origin = fsdp2_file.origin(("use_reentrant",))
        yield Finding.at(origin, "error", "conflict", text, path=("use_reentrant",), suggestion="Write false")
    parts = keys.get("lora_apply_modules")
    whole = not parts or (isinstance(parts, list) and "all" in parts)
    if keys.get("lora_mixed_training") is True and whole and model is not None:
        text = f'"lora_mixed_training" is true, but lora_apply_modules ({show(parts)}) leaves no part without LoRA'
        mend = 'Name the parts that get LoRA in "lora_apply_modules"'
        path = ("lora_mixed_training",)
        yield Finding.at(model.origin(path), "error", "conflict", text, path=path, suggestion=mend)
