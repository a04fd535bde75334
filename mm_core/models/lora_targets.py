"""Which layers and parameters of a network a job's LoRA names mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mm_core.config.lora import ALL_LINEAR, LoraConfig
from mm_registry.errors import UserError
from mm_registry.suggestions import closest

#: What has a LoRA layer of PEFT whose product can be added to the weight.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Targets:
    """What gets adapters, by full names.

    Attributes:
        modules, parameters: names in the network.
        parts: paths inside which they lie; `("",)` is the whole network.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    parts: tuple[str, ...]


def find_targets(
    network: nn.Module, config: LoraConfig, *, name: str = "", aliases: Mapping[str, str] | None = None
) -> Targets:
    """Find what a configuration names in a network. Frozen parts, and parts that `apply_modules` leaves out, have none.

    A target is the end of a name, as in PEFT: `q_proj` means every `….q_proj`. Where a target has a meaning only as an
    alias, all targets are read as aliases first, for they come from the same place.

    Args:
        network: without adapters, on any device; what is frozen has `requires_grad` False.
        name: of the component, which parts may begin with.
        aliases: of the sharding policy: names that users bring from elsewhere -> ours, `{*}` for a number.

    Raises:
        UserError: a name means nothing, or only what is frozen.
    """
    modules = dict(network.named_modules())
    layers = [path for path, module in modules.items() if path and isinstance(module, _LAYERS)]
    linear = [path for path in layers if isinstance(modules[path], nn.Linear)]
    parameters = dict(network.named_parameters())
    frozen = {path for path in layers if not any(p.requires_grad for p in modules[path].parameters())}
    frozen |= {path for path, parameter in parameters.items() if not parameter.requires_grad}
    parts = _parts(config.apply_modules, name, modules, aliases or {})
    wanted = [target for target in config.target_modules if target != ALL_LINEAR]
    found = _matched("lora_target_modules", wanted, layers, aliases or {})
    if ALL_LINEAR in config.target_modules:
        output = getattr(network, "get_output_embeddings", lambda: None)()
        found[ALL_LINEAR] = [path for path in linear if modules[path] is not output]
    of_parameters = _matched(
        "lora_target_parameters", config.target_parameters, list(parameters), aliases or {}
    )
    chosen: list[list[str]] = []
    for flag, by_target in (("lora_target_modules", found), ("lora_target_parameters", of_parameters)):
        chosen.append([])
        for target, paths in by_target.items():
            left = [
                path for path in paths if path not in frozen and any(_inside(path, part) for part in parts)
            ]
            if not left:
                where = (
                    "parts that are frozen"
                    if all(path in frozen for path in paths)
                    else "no part that gets LoRA"
                )
                raise UserError(
                    f"--{flag.replace('_', '-')}: {target} means {_few(paths)}, which lie in {where}; set the part's "
                    '"freeze" to false (its own weights stay as they are all the same), name the part in '
                    '"lora_apply_modules", or leave the target out'
                )
            chosen[-1] += left
    order = {path: i for i, path in enumerate([*modules, *parameters])}
    first, second = (tuple(sorted(set(paths), key=order.__getitem__)) for paths in chosen)
    return Targets(first, second, parts)


def shortest(targets: Iterable[str], chosen: Collection[str], known: Iterable[str]) -> list[str]:
    """The targets as they were written if these mean just what was chosen to whoever reads them, PEFT; else full names."""
    written = sorted(set(targets) - {ALL_LINEAR})
    meant = {path for path in known if any(_ends(path, target) for target in written)}
    return written if meant == set(chosen) else sorted(chosen)


def _matched(
    flag: str, targets: Sequence[str], paths: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, list[str]]:
    literal = {target: [path for path in paths if _ends(path, target)] for target in targets}
    by_alias = {target: _of_alias(target, paths, aliases) for target in targets}
    foreign = any(by_alias[target] and not literal[target] for target in targets)
    found = {t: (by_alias[t] or literal[t]) if foreign else literal[t] for t in targets}
    for target, of_target in found.items():
        if not of_target:
            raise _unknown(flag, target, paths, aliases)
    return found


def _unknown(flag: str, target: str, paths: Sequence[str], aliases: Mapping[str, str]) -> UserError:
    depth = target.count(".") + 1
    ends = dict.fromkeys(_numbers_away(".".join(path.split(".")[-depth:])) for path in paths)
    foreign = [_numbers_away(".".join(alias.replace("{*}", "0").split(".")[-depth:])) for alias in aliases]
    near = closest(target, [*ends, *foreign], 1)
    shown = [end for end in ends if not end.isdigit()]
    mend = (
        f"did you mean {near[0]}?"
        if near
        else f"there are {', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}"
    )
    what = "layer" if flag.endswith("modules") else "parameter"
    return UserError(f"--{flag.replace('_', '-')}: {target}: the network has no {what} of that name; {mend}")


def _numbers_away(end: str) -> str:
    """`3.q_proj` is the end of no name that anybody would write."""
    parts = end.split(".")
    while len(parts) > 1 and parts[0].isdigit():
        parts.pop(0)
    return ".".join(parts)


def _of_alias(target: str, paths: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    for alias, ours in aliases.items():
        if _ends(alias, target):
            pattern = re.compile(re.escape(ours).replace(re.escape("{*}"), r"[^.]+"))
            found += [path for path in paths if pattern.fullmatch(path)]
    return found


def _parts(
    names: Sequence[str], component: str, modules: Mapping[str, nn.Module], aliases: Mapping[str, str]
) -> tuple[str, ...]:
    """Paths of the parts of the network that get adapters."""
    if not names:
        return ("",)
    found = []
    for name in names:
        inner = name.removeprefix(f"{component}.") if component else name
        path = next(
            (p for p in (name, aliases.get(name, name), inner, aliases.get(inner, inner)) if p in modules),
            None,
        )
        if path is None and name != component:
            near = closest(name, [path for path in [*modules, *aliases] if path.count(".") < 3], 1)
            hint = f"did you mean {near[0]}?" if near else "`mm check --build` shows its parts"
            raise UserError(f'"lora_apply_modules": {name}: the network has no part of that name; {hint}')
        found.append(path or "")
    return tuple(found)


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _inside(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")


def _few(paths: Sequence[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
