"""The toy's published folders say `layers` where the module says `blocks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ToyWeights:
    def to_module(self, key: str) -> str:
        return key.replace("layers.", "blocks.")

    def to_folder(self, key: str) -> str:
        return key.replace("blocks.", "layers.")

    def config_to_folder(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"_class_name": "ToyDiT", **fields}

    def config_problems(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        return [f"{name} is {config[name]}" for name in fields if config.get(name) != fields[name]]


ADAPTER = ToyWeights()
