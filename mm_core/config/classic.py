"""MindSpeed-MM's readers of configuration files: `MMConfig` and `ConfigReader`. Imports no torch and no pydantic."""

from __future__ import annotations

import pprint
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_core.config.document import Document, read_document
from mm_core.config.findings import ConfigError, Finding, did_you_mean, show
from mm_core.config.origin import DEFAULT, KeyPath, Origin, dotted

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_FLAGS = {"model": "--mm-model", "data": "--mm-data", "tool": "--mm-tool"}


class ConfigReader:
    """An object of a configuration file; its keys are attributes.

    Objects inside it are readers, lists of objects are lists of readers. As in MindSpeed-MM attributes can be set,
    and the attribute `dtype` is a `torch.dtype`, at any depth; torch is imported when it is asked for. `to_dict`
    has the string of the file.

    A key that has the name of a method (`get`, `keys`, …) is reached as `reader["get"]`.

    Args:
        data: the object. Its dicts and lists are copied.
        file: the file it comes from, for messages.
    """

    __slots__ = ("__file", "__path", "__place", "__values")  # mangled, so that no key can have these names
    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __init__(self, data: Mapping[str, Any], *, file: str = "") -> None:
        self.__fill(Document.from_data(data, Origin("file", file) if file else DEFAULT), (), data)

    @classmethod
    def from_document(cls, document: Document, path: KeyPath = ()) -> ConfigReader:
        """Return a reader of the object at `path` of a file; it knows its lines."""
        reader = cls.__new__(cls)
        reader.__fill(document, path, document.value(path))
        return reader

    def __fill(self, document: Document, path: KeyPath, data: Mapping[str, Any]) -> None:
        origin = document.origin(path)
        put = object.__setattr__
        put(self, "_ConfigReader__file", document.path)
        put(self, "_ConfigReader__path", path)
        put(self, "_ConfigReader__place", "" if origin == DEFAULT else str(origin))
        put(self, "_ConfigReader__values", {key: _wrap(document, (*path, key), data[key]) for key in data})

    # -- reading

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_ConfigReader__")):  # copy and pickle ask before there is a value
            raise AttributeError(name)
        if name not in self.__values:
            raise AttributeError(self.__missing(name))
        return self[name]

    def __getitem__(self, key: str) -> Any:
        if key not in self.__values:
            raise KeyError(self.__missing(key))
        value = self.__values[key]
        return self.__torch_dtype(value) if key == "dtype" and isinstance(value, str) else value

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if it is not written."""
        return self[name] if name in self.__values else default

    def keys(self) -> list[str]:
        """Return the keys, in the order of the file."""
        return list(self.__values)

    def items(self) -> list[tuple[str, Any]]:
        """Return the keys and what their attributes are."""
        return [(key, self[key]) for key in self.__values]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__values)

    def __contains__(self, name: object) -> bool:
        return name in self.__values

    def __len__(self) -> int:
        return len(self.__values)

    def to_dict(self) -> dict[str, Any]:
        """Return a copy as plain data, as it stands in the file: `dtype` is a string."""
        return {key: _plain(value) for key, value in self.__values.items()}

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ConfigReader):
            return self.to_dict() == other.to_dict()
        return self.to_dict() == other if isinstance(other, Mapping) else NotImplemented

    def __repr__(self) -> str:
        where = " ".join(part for part in (self.__place, dotted(self.__path)) if part)
        text = pprint.pformat(self.to_dict(), indent=1, width=100, compact=True, sort_dicts=False)
        return f"<ConfigReader {where}\n{text}>" if where else f"<ConfigReader\n{text}>"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__values})

    # -- writing

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(
                f'"{name}" is a method of ConfigReader; write reader["{name}"] = … for such a key'
            )
        self[name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        self.__values[key] = _wrap(Document.from_data({}), (*self.__path, key), value)

    def __delattr__(self, name: str) -> None:
        if name not in self.__values:
            raise AttributeError(self.__missing(name))
        del self.__values[name]

    def update_unuse(self, **values: Any) -> dict[str, Any]:
        """Set the keys that are there already, and return the other arguments."""
        for name in values.keys() & self.__values.keys():
            self[name] = values[name]
        return {name: value for name, value in values.items() if name not in self.__values}

    # -- copies

    def __getstate__(self) -> tuple[Any, ...]:
        return self.__file, self.__path, self.__place, self.__values

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        for name, value in zip(("file", "path", "place", "values"), state, strict=True):
            object.__setattr__(self, f"_ConfigReader__{name}", value)

    # -- messages

    def __missing(self, name: str) -> str:
        where = self.__place or "this configuration"
        inside = f" {dotted(self.__path)}" if self.__path else ""
        known = [str(key) for key in self.__values]
        mend = did_you_mean(name, known) or "It is empty"
        return f'{where}{inside}: there is no key "{name}". {mend}'

    def __torch_dtype(self, name: str) -> Any:
        import torch

        from mm_core.config.dtypes import short_dtype

        short = short_dtype(name)
        dtype = getattr(torch, _TORCH_NAMES.get(short, short), None)
        if isinstance(dtype, torch.dtype):
            return dtype
        path = dotted((*self.__path, "dtype"))
        text = f"{self.__place} {path}: {show(name)} is no number format of torch".lstrip()
        mend = f"Known: {', '.join(_TORCH_NAMES)}, or torch's own names (int32, …)"
        raise ConfigError([Finding("error", "wrong-value", text, suggestion=mend)])


class MMConfig:
    """The files of a job: attributes `model`, `data` and `tool`, each a `ConfigReader`.

    Args:
        files: `{"model": path, "data": path, "tool": path}`. JSON may have comments. Of a YAML file that has a
            section of that name (a combined one), the section is read. What is left out, or has the path `""` or
            `None`, is not there.

    Nothing is checked but the syntax: `mm check`, or `mm_core.config.check_training_job`, checks keys and values.

    Raises:
        ConfigError: files cannot be read, all of them told, with file, line and column; or `files` has another name.
    """

    model: ConfigReader
    data: ConfigReader
    tool: ConfigReader

    def __init__(self, files: Mapping[str, str | Path | None]) -> None:
        findings: list[Finding] = []
        for name, path in files.items():
            if name not in _FLAGS:
                text = f'MMConfig: there is no file "{name}"'
                findings.append(
                    Finding("error", "unknown-key", text, suggestion=did_you_mean(name, list(_FLAGS)))
                )
            elif path is not None and str(path):
                try:
                    document = read_document(path)
                except ConfigError as error:
                    findings += error.findings
                else:
                    self._set(name, document, _section_of(document, name))
        if findings:
            raise ConfigError(findings)

    @classmethod
    def from_documents(cls, documents: Mapping[str, Document]) -> MMConfig:
        """Return the configuration of files that have been read, perhaps patched: `model`, `data`, `tool`."""
        config = cls({})
        for name, document in documents.items():
            config._set(name, document, ())
        return config

    def _set(self, name: str, document: Document, path: KeyPath) -> None:
        reader = ConfigReader.from_document(document, path)
        if "$schema" in reader:
            delattr(reader, "$schema")  # for editors
        setattr(self, name, reader)

    def __getattr__(self, name: str) -> Any:
        if name in _FLAGS:
            raise AttributeError(f"the job has no {name} file; {_FLAGS[name]} FILE names one")
        raise AttributeError(
            f'MMConfig has no attribute "{name}". {did_you_mean(name, list(_FLAGS), what="name")}'
        )

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, MMConfig) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        return (
            "\n".join(f"{name}: {reader!r}" for name, reader in vars(self).items())
            or "MMConfig without files"
        )


def _section_of(document: Document, name: str) -> KeyPath:
    """Return where a section stands: at the top of a file of its own, or under its name in a combined one."""
    if Path(document.path).suffix.lower() != ".json":
        for key in (name, "tools") if name == "tool" else (name,):
            if isinstance(document.data.get(key), dict):
                return (key,)
    return ()


def _wrap(document: Document, path: KeyPath, value: Any) -> Any:
    if isinstance(value, ConfigReader):
        return value
    if isinstance(value, Mapping):
        reader = ConfigReader.__new__(ConfigReader)
        reader._ConfigReader__fill(document, path, value)
        return reader
    if isinstance(value, list):
        return [_wrap(document, (*path, index), item) for index, item in enumerate(value)]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigReader):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else value
