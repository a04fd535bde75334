"""Which keys hold paths, and from where a relative one is meant: in job.yaml from the file, in classic files from the
working directory.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mm_core.config.document import Document, expanded
from mm_core.config.findings import Finding, clip
from mm_core.config.origin import KeyPath, Origin, dotted

#: Keys whose value is the path of a file or folder (or a list of them), in any section and among flags.
PATH_KEYS = frozenset(
    {
        # model
        "from_pretrained",
        "init_from_hf_path",
        "low_noise_predictor",
        "load_checkpoint_path",
        # data
        "data_path",
        "val_data_path",
        "data_folder",
        "model_name_or_path",
        "dataset_dir",
        "dataset",
        "val_dataset",
        "cache_dir",
        # tools
        "save_path",
        "config_path",
        # flags
        "mm_model",
        "mm_data",
        "mm_tool",
        "fsdp2_config_path",
        "load",
        "save",
        "lora_load",
        "load_base_model",
        "ref_model",
        "tensorboard_dir",
        "lock_file",
        "sample_config",
    }
)
#: Keys whose value may be several paths, with commas between them.
_LISTS = frozenset({"dataset", "val_dataset"})


@dataclass
class Paths:
    """The relative paths of one job file; `notes` says which place was chosen where two hold a name.

    Args:
        file: the job file, as the user named it.
        classic: whether paths are meant from the working directory, as in MindSpeed-MM's combined YAML.
    """

    file: str
    classic: bool
    notes: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._folder = os.path.dirname(expanded(self.file))
        self._same = os.path.realpath(self._folder or ".") == os.path.realpath(".")

    def in_document(self, document: Document, label: str) -> Document:
        """Return a section with its relative paths as seen from the working directory."""
        data = copy.deepcopy(document.data)
        for node, key, path in list(_path_values(data, ())):
            node[key] = self.seen(node[key], document.origin(path), label, path)
        return Document(document.path, data, document.origins, document.keys)

    def seen(self, value: str, origin: Origin, label: str, path: KeyPath) -> str:
        """Return one path (of some keys several, with commas) as seen from the working directory."""
        if path and path[-1] in _LISTS and "," in value:
            parts = (part.strip() for part in value.split(","))
            return ",".join(self._one(part, origin, label, path) for part in parts)
        return self._one(value, origin, label, path)

    def _one(self, value: str, origin: Origin, label: str, path: KeyPath) -> str:
        if self._same or not value or value.startswith("~") or "://" in value or os.path.isabs(value):
            return value
        beside = os.path.join(self._folder, value)
        taken, other = (value, beside) if self.classic else (beside, value)
        both = os.path.exists(taken) and os.path.exists(other)
        if os.path.exists(other) and not (both and os.path.samefile(taken, other)):
            place, rival = "working directory", f"folder of {self.file}"
            if not self.classic:
                place, rival = rival, place
            text = f'{dotted((label, *path))} is "{clip(value)}", looked for in the {place}'
            text += f"; the {rival} holds it too" if both else f", which does not hold it; the {rival} does"
            self.notes.append(Finding.at(origin, "note", "path-choice", text, path=(label, *path)))
        return taken


def _path_values(node: Any, path: KeyPath) -> Iterator[tuple[Any, str | int, KeyPath]]:
    """Yield (holder, key, path) of every text that is a path."""
    items: list[tuple[str | int, Any]]
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return
    named = (
        next((part for part in reversed(path) if isinstance(part, str)), "") if isinstance(node, list) else ""
    )
    for key, value in items:
        if isinstance(value, str):
            if (named or key) in PATH_KEYS:
                yield node, key, (*path, key)
        else:
            yield from _path_values(value, (*path, key))
