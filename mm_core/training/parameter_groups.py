"""Learning rates and weight decay by module: which parameters `--lr-scale-modules` and `--weight-decay-exclude-modules`
mean.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mm_core.config import ConfigError, Finding, TrainFlags
from mm_core.config.optimizer_flags import factor_of
from mm_core.models.sora import EXPERTS
from mm_core.sharding.patterns import ModulePaths, PatternError, apply_aliases
from mm_core.sharding.plan import bare_name, is_inside
from mm_core.sharding.policy import ShardingPolicy
from mm_registry.suggestions import closest

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class GroupSettings:
    """What parameters of one group of the optimizer share.

    Attributes:
        lr_mult: the learning rate of the step is multiplied by it.
        weight_decay: decoupled.
    """

    lr_mult: float
    weight_decay: float


def group_settings(
    modules: Mapping[str, nn.Module], flags: TrainFlags, policies: Mapping[str, ShardingPolicy]
) -> dict[nn.Parameter, GroupSettings]:
    """The settings of each parameter that is trained. What the flags name and this rank does not have is passed over.

    Args:
        modules: name of component -> what is trained of it, sharded or not.
        policies: of the components; their aliases are names that users bring from elsewhere.
    """
    plain = GroupSettings(1.0, flags.weight_decay)
    found: dict[nn.Parameter, GroupSettings] = {}
    for name, module in modules.items():
        names = _Names(name, module, policies.get(name, ShardingPolicy()).aliases)
        scaled = _scaled(names, flags)
        undecayed = {p for entry in flags.weight_decay_exclude_modules or () for p in names.matched(entry)}
        for path, parameter in names.parameters.items():
            decay = 0.0 if path in undecayed else flags.weight_decay
            # Of a tied parameter the first name counts.
            found.setdefault(parameter, GroupSettings(scaled.get(path, plain.lr_mult), decay))
    _tell(found.values(), flags)
    return found


def check_groups(
    modules: Mapping[str, nn.Module], flags: TrainFlags, policies: Mapping[str, ShardingPolicy]
) -> None:
    """Each name of the flags must mean something that is trained.

    Args:
        modules: whole, on the meta device.

    Raises:
        ConfigError: one means nothing, with the closest name there is, or only what is frozen.
    """
    names = [_Names(n, m, policies.get(n, ShardingPolicy()).aliases) for n, m in modules.items()]
    findings = []
    for flag in ("lr_scale_modules", "weight_decay_exclude_modules"):
        for entry in getattr(flags, flag) or ():
            key = factor_of(entry)[0] if flag == "lr_scale_modules" else entry
            findings += list(_problems(flags, flag, key, names))
    if findings:
        raise ConfigError(findings)


def _problems(flags: TrainFlags, flag: str, key: str, names: Sequence[_Names]) -> Iterator[Finding]:
    if any(one.matched(key) for one in names):
        return
    if any(one.matched(key, frozen=True) for one in names):
        text = f'"{key}" means parameters that are frozen, so that nothing of it is trained'
        yield flags.finding(flag, "no-match", text, "Leave it out")
        return
    parts = dict.fromkeys(part for one in names for part in one.parts() if not part.isdigit())
    near = closest(key.rpartition(".")[2], list(parts), 3)
    mend = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(list(parts)[:12])}, …"
    yield flags.finding(flag, "no-match", f'no parameter that is trained has "{key}" in its name', mend)


def _scaled(names: _Names, flags: TrainFlags) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in flags.lr_scale_modules or ():
        key, factor = factor_of(entry)
        for path in names.matched(key):
            found.setdefault(path, flags.lr_mult if factor is None else factor)
    return found


def _tell(settings: Iterable[GroupSettings], flags: TrainFlags) -> None:
    counts: dict[GroupSettings, int] = {}
    for one in settings:
        counts[one] = counts.get(one, 0) + 1
    if not (flags.lr_scale_modules or flags.weight_decay_exclude_modules):
        return
    told = [
        f"{n} × lr {flags.lr:g} · {one.lr_mult:g}, weight decay {one.weight_decay:g}"
        for one, n in sorted(counts.items())
    ]
    log.info("parameters by learning rate and weight decay: %s", "; ".join(told))


class _Names:
    """The parameters of one component by name, and what names of the flags mean among them."""

    def __init__(self, component: str, module: nn.Module, aliases: Mapping[str, str]) -> None:
        self.component, self.module, self.aliases = component, module, aliases
        named = {bare_name(name): p for name, p in module.named_parameters()}
        self.frozen = [name for name, p in named.items() if not p.requires_grad]
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self._foreign = [
            (re.compile(re.escape(ours).replace(re.escape("{*}"), r"([^.]+)") + r"(?=\.|$)"), alias)
            for alias, ours in aliases.items()
        ]

    def matched(self, key: str, *, frozen: bool = False) -> list[str]:
        """Names of parameters whose names, with the component's before it, have `key` in them, in any case; or those in the
        modules of a pattern, if it is one. Names from elsewhere count where ours say nothing. What begins with the name of an
        expert means that one alone.
        """
        paths = self.frozen if frozen else list(self.parameters)
        if any(character in key for character in "{}*?"):
            modules = self._modules(key)
            return [path for path in paths if any(is_inside(path, module) for module in modules)]
        key = key.lower()
        whole = key.partition(".")[0] in EXPERTS  # the name of the one is within the other's

        def means(path: str) -> bool:
            full = f"{self.component}.{path}".lower()
            return full.startswith(key) if whole else key in full

        return [path for path in paths if means(path)] or [
            p for p in paths if any(map(means, self._known_as(p)))
        ]

    def parts(self) -> Iterator[str]:
        """What names consist of, those from elsewhere last."""
        yield self.component
        for path in self.parameters:
            yield from path.split(".")
        for alias in self.aliases:
            yield from (part for part in alias.split(".") if part != "{*}")

    def _modules(self, pattern: str) -> list[str]:
        paths = ModulePaths([bare_name(path) for path, _ in self.module.named_modules()])
        relative = pattern.removeprefix(f"{self.component}.")
        try:
            return paths.match(apply_aliases(relative, self.aliases, paths))
        except PatternError:
            return []

    def _known_as(self, path: str) -> Iterator[str]:
        for ours, alias in self._foreign:
            if match := ours.match(path):
                numbers = iter(match.groups())
                yield re.sub(r"\{\*\}", lambda _: next(numbers), alias) + path[match.end() :]  # noqa: B023 - used at once
