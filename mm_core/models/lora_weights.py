"""Where the weights of a network with LoRA come from: those under its adapters, and an adapter to start from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mm_core.config.component import ComponentConfig
from mm_core.config.document import expanded
from mm_core.config.lora import ADAPTER_CONFIG, LoraConfig
from mm_core.config.model import SECOND
from mm_core.models.pretrained import load_predictor_folder
from mm_core.weights import is_hf_folder, load_checkpoint, resolve_load
from mm_core.weights.agreement import ranks_agree
from mm_core.weights.checkpoint import load_base_weights
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_folder import weight_files
from mm_core.weights.layout import MARKER
from mm_core.weights.peft_folder import load_peft_folder
from mm_core.weights.state_file import read_state
from mm_core.weights.stored import StoredWeights

log = logging.getLogger(__name__)

_SAMPLE = 65536  # bytes
_SAMPLES = 32  # of a file
#: Ways of PEFT to begin an adapter that take a part out of the weights under it.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on disk.

    Attributes:
        path: a folder of PEFT, or one complete checkpoint.
        config: what it says of itself; the names of its targets are those of a checkpoint, of a folder PEFT's.
        base: folder or run of the weights that a checkpoint's adapter was trained on, if it tells.
        components: of a checkpoint: what has adapters in it.
    """

    path: Path
    config: LoraConfig
    base: str | None = None
    components: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether PEFT reads it."""
        return (self.path / ADAPTER_CONFIG).is_file()


def find_adapter_source(
    path: Path, flag: str = "--lora-load", *, component: str | None = None
) -> AdapterSource:
    """Find the adapter of a folder of PEFT, or of a run (its newest checkpoint) that was trained with LoRA.

    Args:
        component: in a run that trained adapters of several, whose `base` is wanted; by default the first's.

    Raises:
        UserError: there is none.
    """
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterSource(path, _of_folder(path))
    checkpoint = resolve_load(path, flag=flag)
    told = read_state(checkpoint)["state"].get("lora")
    if not isinstance(told, Mapping):
        raise WeightsError(f"{flag} {path}: {checkpoint.name} was trained without LoRA, and has no adapter.")
    try:
        config = LoraConfig.from_json(told)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{flag} {path}: {checkpoint} tells of its adapter what cannot be read ({error})."
        ) from error
    bases = adapter_bases(told)
    base = bases.get(component or "", told.get("base"))
    place = base.get("path") if isinstance(base, Mapping) else None
    return AdapterSource(checkpoint, config, place, tuple(bases))


def load_adapter(network: nn.Module, source: AdapterSource, name: str, config: LoraConfig) -> None:
    """Read an adapter into a network that has the same one, sharded or not, in place; all ranks call this.

    Args:
        name: of the component, in a checkpoint.
        config: of the network's adapter.

    Raises:
        UserError: rank or scale are others, or the tensors do not fit.
    """
    theirs = source.config
    for key, own, other in (("rank", config.rank, theirs.rank), ("alpha", config.alpha, theirs.alpha)):
        if own != other:
            raise WeightsError(
                f"--lora-load {source.path}: its {key} is {other:g}, and the job's is {own:g}; "
                f"give --lora-{'r' if key == 'rank' else key} {other:g}."
            )
    if source.is_folder:
        load_peft_folder(network, source.path)
    else:
        load_checkpoint(source.path, {name: network}, None, with_rng=False)
    log.info("%s: adapter of %s", name, source.path)


def check_adapted(source: AdapterSource, adapted: Collection[str]) -> None:
    """A run of two experts begins with a run of two, and one of one with one: names alone do not tell which expert a run had.

    Args:
        adapted: components that get adapters.

    Raises:
        WeightsError: it is the other way.
    """
    if source.is_folder or len(source.components) == len(adapted):
        return
    raise WeightsError(
        f"--lora-load {source.path}: it has adapters of {' and '.join(source.components)}, and the job trains "
        f"{' and '.join(adapted)}; "
        + (
            "name the folder of one of them, which `mm convert --component` writes."
            if len(source.components) > len(adapted)
            else "name a run that trained both experts."
        )
    )


def load_base(
    network: nn.Module, name: str, section: ComponentConfig, load: str | None
) -> StoredWeights | None:
    """Read the weights under the adapters, in place; all ranks call this.

    Args:
        load: `--load`, which counts if it is a Hugging Face folder.

    Returns:
        How they lay in their folder; None for random ones, which keep their values, and for those of a run.

    Raises:
        UserError: they do not fit.
    """
    place = base_path(section, load)
    if place is None:
        log.info("%s has random weights under its adapters, as its section asks", name)
        return None
    path = expanded(place)
    log.info("%s: weights of %s under the adapters", name, place)
    if is_hf_folder(path):
        loaded = load_predictor_folder(network, path, section)
        return StoredWeights(loaded.dtypes, loaded.layout)
    checkpoint = resolve_load(path, flag="--load-base-model")
    if "lora" in read_state(checkpoint)["state"]:
        raise WeightsError(
            f"--load-base-model {place}: {checkpoint.name} was trained with LoRA, and has an adapter alone; write it as a "
            "whole folder with `mm convert --merge-lora`, and name that."
        )
    load_base_weights(network, checkpoint, name)
    stored = read_state(checkpoint)["state"].get("weights", {}).get(name)
    return None if stored is None else StoredWeights.from_json(stored)


def base_path(section: ComponentConfig, load: str | None = None) -> str | None:
    """Where the weights under the adapters are: a folder or a run; None: they are random."""
    assert section.lora is not None
    if section.lora.base is not None:
        return section.lora.base
    if load is not None and section.path != (SECOND,) and is_hf_folder(expanded(load)):
        return load  # a folder holds one network: of two experts the first
    return section.from_pretrained if section.init == "pretrained" else None


def lora_state(adapted: Mapping[str, ComponentConfig], load: str | None) -> dict[str, Any]:
    """What a checkpoint tells of its adapters: the configuration, and which weights each belongs to.

    Args:
        adapted: the components with adapters, all of one configuration, the first first.
    """
    bases: dict[str, dict[str, str] | None] = {}
    for name, section in adapted.items():
        place = base_path(section, load)
        known = None if place is None else weights_fingerprint(expanded(place))
        bases[name] = None if place is None or known is None else {"path": place, "fingerprint": known}
    first, section = next(iter(adapted.items()))
    assert section.lora is not None
    told = {**section.lora.as_json(), "component": first, "base": bases[first]}
    return told if len(bases) == 1 else {**told, "bases": bases}


def adapter_bases(told: Mapping[str, Any]) -> dict[str, Any]:
    """Component -> what `lora_state` tells of the weights under its adapter."""
    bases = told.get("bases")
    return dict(bases) if isinstance(bases, Mapping) else {str(told.get("component", "")): told.get("base")}


def weights_fingerprint(path: Path) -> str:
    """Tell weights from others without reading all of them: sizes of the files, and a few places in each.

    Args:
        path: a Hugging Face folder or a run.
    """
    digest = hashlib.sha256()
    with ranks_agree(f"reading {path}", alone=True):
        if not is_hf_folder(path):
            marker = resolve_load(path, flag="--load-base-model") / MARKER
            digest.update(marker.read_bytes())  # it has a checksum of each file
            return digest.hexdigest()
        for file in weight_files(path):
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                for place in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                    stream.seek(place)
                    digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _of_folder(path: Path) -> LoraConfig:
    file = path / ADAPTER_CONFIG
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.get("peft_type", "LORA") != "LORA" or told.get("use_dora") or told.get("use_rslora"):
            raise ValueError("it is not plain LoRA")
        # What PEFT would do otherwise for some layers, or to the weights under the adapter, without other tensors to show it.
        start = told.get("init_lora_weights", True)
        odd = [key for key in ("alpha_pattern", "rank_pattern") if told.get(key)]
        if odd or str(start).lower().startswith(_CHANGE_BASE):
            why = odd[0] if odd else f"init_lora_weights {start}"
            raise ValueError(f"it has {why}, and only one rank and alpha on unchanged weights are supported")
        modules, parameters = told.get("target_modules") or [], told.get("target_parameters") or []
        if isinstance(modules, str):
            modules = [modules]
        return LoraConfig(
            tuple(map(str, modules)), tuple(map(str, parameters)), int(told["r"]), float(told["lora_alpha"])
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{file} describes no adapter that can be used here: {error}.") from error
