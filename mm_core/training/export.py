"""`--save-hf`: with each checkpoint, folders that diffusers, transformers and PEFT load.

    <run>/hf/iter_0000010/predictor/       config.json and safetensors, or the folder of a PEFT adapter
    <run>/hf/iter_0000010/predictor-ema/   the averaged weights, if there are any
    <run>/hf/iter_0000010/predictor-merged/    with `lora_save_full_weight`, the weights with what the adapter adds
    <run>/hf/.tmp-…                        being written, or left behind by a crash

A step's folder gets its name when all of it is written, by one rename.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.weights.adapter import StateDictAdapter, find_adapter
from mm_core.weights.agreement import rank, ranks_agree
from mm_core.weights.convert import files_beside
from mm_core.weights.errors import WeightsError
from mm_core.weights.hf_save import check_hf_folder, save_hf_folder
from mm_core.weights.layout import TEMPORARY, folder_name, sync_folder
from mm_core.weights.library_config import folder_config
from mm_core.weights.peft_folder import save_peft_folder
from mm_core.weights.peft_merge import merged_values
from mm_core.weights.peft_names import adapter_names
from mm_core.weights.stored import StoredWeights
from mm_core.weights.tensors import state_tensors

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig

log = logging.getLogger(__name__)

_REPLACED = f"{TEMPORARY}replaced-"


@dataclass(frozen=True)
class Exported:
    """One trained component of a run.

    Attributes:
        module: sharded or not, materialised.
        section: of the configuration; its weights adapter gives the folder's names and config.json.
        stored: how its weights lay in the folder that they came from; they are written the same way.
        averages: the module's name -> averaged tensor, sharded like the module's own.
    """

    module: nn.Module
    section: ComponentConfig | None = None
    stored: StoredWeights = field(default_factory=StoredWeights)
    averages: Mapping[str, torch.Tensor] | None = None


def export_folder(run: Path, step: int) -> Path:
    """Where the folders of a step are."""
    return Path(run) / "hf" / folder_name(step)


def check_export(components: Mapping[str, Exported]) -> None:
    """Find out whether `export` will be able to write these components, before anything is trained; each rank does this
    for itself.

    Raises:
        WeightsError: an adapter fails, or a folder cannot hold what a module has.
    """
    for name, component in components.items():
        if adapter_names(component.module) and not _merges(component):
            continue
        adapter, config = _described(component)
        stored = component.stored
        check_hf_folder(component.module, adapter, config, dtypes=stored.dtypes, layout=stored.layout or None)
        if config is None:
            log.warning(
                "--save-hf: the folders of %s get no config.json, for neither a weights adapter nor a library says what "
                "is in it",
                name,
            )


def export(run: Path, step: int, components: Mapping[str, Exported]) -> Path:
    """Write the folders of a step; all ranks call this. Those of an earlier attempt at this step are replaced.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        components: name of the section -> component.

    Returns:
        The step's folder, with one inside for each component.

    Raises:
        WeightsError: an adapter fails, the folder cannot be written, or there is no room for it. Nothing that
            existed before was touched.
        CheckpointError: another failure, on some rank.
    """
    final = export_folder(run, step)
    temporary = final.parent / f"{TEMPORARY}{final.name}"
    what = f"writing {final}"
    with ranks_agree(what), _worded(final):
        if rank() == 0:
            final.parent.mkdir(parents=True, exist_ok=True)
            _clean(final.parent)
            temporary.mkdir()
    try:
        for name, component in components.items():
            sharded = any(isinstance(tensor, DTensor) for tensor in state_tensors(component.module).values())
            # Of what is sharded each rank has to give its part; else all of them would write the same.
            with nullcontext() if sharded else ranks_agree(what):
                if sharded or rank() == 0:
                    _write(temporary, name, component, sharded=sharded)
                    if component.averages is not None:
                        _write(temporary, f"{name}-ema", component, component.averages, sharded=sharded)
        with ranks_agree(what), _worded(final):
            if rank() == 0:
                _publish(temporary, final)
    finally:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("Hugging Face folders %s", final)
    return final


@contextmanager
def _worded(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"{final} cannot be written ({error.strerror}); make room for it, or --save elsewhere."
        ) from error


def _write(
    folder: Path,
    name: str,
    component: Exported,
    values: Mapping[str, torch.Tensor] | None = None,
    *,
    sharded: bool,
) -> None:
    """Write one component as a whole, or its PEFT adapters: then the rest is as it was loaded."""
    module, stored = component.module, component.stored
    trained = adapter_names(module)
    for adapter_name in trained:
        inner = name if len(trained) == 1 else f"{name}-{adapter_name}"
        save_peft_folder(module, folder / inner, adapter_name, values=values)
    if trained and not _merges(component):
        return
    name = f"{name}-merged" if trained else name
    with ranks_agree(f"writing {folder / name}", alone=not sharded):
        adapter, config = _described(component)
    save_hf_folder(
        module,
        folder / name,
        adapter,
        config,
        dtypes=stored.dtypes,
        layout=stored.layout or None,
        values=None if trained else values,
        read=merged_values(module, values) if trained else None,
        beside=files_beside(component.section),
    )


def _merges(component: Exported) -> bool:
    """Whether a network with adapters is also written as a whole: if that is asked for, and if weights are trained that no
    adapter holds.
    """
    lora = None if component.section is None else component.section.lora
    return lora is not None and (lora.save_full_weight or lora.mixed_training)


def _described(component: Exported) -> tuple[StateDictAdapter | None, Mapping[str, Any] | None]:
    section = component.section
    adapter = None if section is None else find_adapter(section)
    fields = None if section is None else section.fields
    return adapter, folder_config(component.module, adapter, fields, component.stored.dtypes)


def _clean(folder: Path) -> None:
    """Remove what a crash left behind, and give back what it was about to replace. One process calls this."""
    for path in sorted(folder.glob(f"{_REPLACED}*")):
        before = folder / path.name.removeprefix(_REPLACED)
        if not before.exists():
            os.rename(path, before)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished step its name; an earlier attempt's goes when the new one is there."""
    sync_folder(temporary)
    replaced = final.parent / f"{_REPLACED}{final.name}"
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
