"""From patterns, of a policy or of fsdp2.yaml, to modules of one FSDP root."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mm_core.config.patterns import is_class_path
from mm_core.sharding.context_policy import ContextPolicy
from mm_core.sharding.patterns import ModulePaths, Problems, apply_aliases, split_pattern
from mm_core.sharding.plan import ShardingError
from mm_core.sharding.policy import ShardingPolicy

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

COMPOSITE = ("predictor", "low_noise_predictor", "ae", "text_encoder", "diffusion", "i2v_processor")
"""What the parts of a model may be called; patterns begin with one of them."""
_ENCODERS = ("ae", "text_encoder", "i2v_processor")
POLICY_FIELDS = {
    "sub_modules_to_wrap": "units",
    "ignored_modules": "ignored",
    "recompute_modules": "recompute",
    "offload_activations": "offload_activations",
    "compile_modules": "compiled",
    "moe_modules": "experts",
}
"""Field of fsdp2.yaml -> the policy's."""


@dataclass(frozen=True)
class Chosen:
    """The modules that one field names.

    Args:
        source: `fsdp2.yaml` or `policy`.
        paths: module paths, in the order of the patterns.
        authors: module path -> the pattern of fsdp2.yaml that names it; empty for a policy's.
    """

    source: str
    paths: tuple[str, ...]
    authors: Mapping[str, str] = field(default_factory=dict)


class Resolver:
    """Finds the modules of one FSDP root.

    Args:
        paths: of the root's module tree.
        prefix: the root's path in the composite; `""` if it is the whole model.
        neighbours: names that patterns may begin with besides the prefix.
        composite: module tree of the whole model, for classes that only other parts have.
        problems: collects what is wrong; a pattern that is wrong names nothing.
    """

    def __init__(
        self,
        paths: ModulePaths,
        policy: ShardingPolicy,
        fsdp2: Fsdp2Config,
        prefix: str,
        neighbours: Collection[str],
        problems: Problems,
        composite: ModulePaths | None = None,
    ) -> None:
        self.paths, self.policy, self.fsdp2, self.prefix = paths, policy, fsdp2, prefix
        self.neighbours, self.problems, self.composite = neighbours, problems, composite

    def choose(self, name: str) -> Chosen:
        """The modules that a field of fsdp2.yaml names, or else the policy's field of the same meaning."""
        written = self.written(name)
        if written is None:
            return Chosen("policy", self.of_policy(POLICY_FIELDS[name]))
        authors: dict[str, str] = {}
        for pattern, relative in written.items():
            with self.problems.of(name, pattern):
                own = apply_aliases(relative, self.policy.aliases, self.paths) if relative else relative
                for path in self._match(own, name):
                    self._claim(authors, path, pattern, name)
        return Chosen("fsdp2.yaml", tuple(authors), authors)

    def of_policy(self, name: str) -> tuple[str, ...]:
        """The modules that a field of the policy names."""
        where = f"policy of {self.prefix or 'the model'}, {name}"
        owner: dict[str, str] = {}
        for pattern in getattr(self.policy, name):
            with self.problems.of(None, None):
                for path in self._match(pattern, where):
                    self._claim(owner, path, pattern, where)
        return tuple(owner)

    def tensor(self) -> dict[str, str]:
        """The layers that the policy lets tensor parallelism cut, and their styles."""
        where = f"policy of {self.prefix or 'the model'}, tensor"
        owner: dict[str, str] = {}
        for pattern in self.policy.tensor:
            with self.problems.of(None, None):
                for path in self._match(pattern, where):
                    self._claim(owner, path, pattern, where)
        return {path: self.policy.tensor[pattern] for path, pattern in owner.items()}

    def context(self) -> ContextPolicy | None:
        """The policy's split points, with paths in place of patterns."""
        policy = self.policy.context
        if policy is None:
            return None
        where = f"policy of {self.prefix or 'the model'}, context"

        def paths(patterns: Iterable[str], name: str) -> dict[str, str]:
            owner: dict[str, str] = {}
            for pattern in patterns:
                with self.problems.of(None, None):
                    for path in self._match(pattern, f"{where}.{name}"):
                        self._claim(owner, path, pattern, f"{where}.{name}")
            return owner

        points: dict[str, Any] = {
            name: {path: value[pattern] for path, pattern in paths(value, name).items()}
            for name in ("split_inputs", "split_outputs", "split_marked", "dealt", "gather_outputs")
            for value in [getattr(policy, name)]
        }
        return replace(policy, attention=tuple(paths(policy.attention, "attention")), **points)

    def written(self, name: str) -> dict[str, str] | None:
        """A field's patterns for this root, as written -> without the prefix; `None` if the file says nothing
        about it.
        """
        value: Sequence[str] | None = getattr(self.fsdp2, name)
        if value is None or name not in self.fsdp2.model_fields_set:
            return None
        if not value:
            return {}
        own: dict[str, str] = {}
        wrong = False
        for pattern in value:
            with self.problems.of(name, pattern) as problem:
                relative = relative_to(pattern, self.prefix)
                if relative is None and self._is_own_class(pattern):
                    relative = pattern
                if relative is not None:
                    if pattern in own:
                        raise ShardingError(f'{name}: "{pattern}" stands there twice; keep one of them.')
                    own[pattern] = relative
                    continue
                first = split_pattern(pattern, f'{name}: "{pattern}"')[0]
                if first not in self.neighbours and not self._is_class_elsewhere(pattern):
                    if name == "ignored_modules" and first in _ENCODERS:
                        continue  # not built, where features are stored: the same file serves both jobs
                    raise self._unknown_part(name, pattern, first)
            wrong = wrong or problem.found
        # A list that names only other parts (ignored_modules: [ae, text_encoder]) says nothing about this one.
        return own if own or wrong else None

    def _is_own_class(self, pattern: str) -> bool:
        first = pattern.strip().partition(".")[0]
        if first in self.neighbours or not is_class_path(pattern):
            return False
        return pattern in self.policy.aliases or self.paths.has_class(pattern)

    def _is_class_elsewhere(self, pattern: str) -> bool:
        return self.composite is not None and self.composite.has_class(pattern)

    def _match(self, pattern: str, where: str) -> list[str]:
        return self.paths.match(pattern, where=where, prefix=self.prefix) if pattern else [""]

    def _claim(self, owner: dict[str, str], path: str, pattern: str, where: str) -> None:
        if path in owner:
            shown = f"{self.prefix}.{path}" if self.prefix and path else self.prefix or path
            raise ShardingError(
                f'{where}: "{shown}" is claimed twice, by "{owner[path]}" and by "{pattern}"; keep one of them.'
            )
        owner[path] = pattern

    def _unknown_part(self, name: str, pattern: str, first: str) -> ShardingError:
        parts = sorted({part for part in (self.prefix, *self.neighbours) if part})
        if first in COMPOSITE:
            return ShardingError(
                f'{name}: "{pattern}" matches no module: this model has no "{first}" '
                "(its section is absent, or it was not built); take the pattern out."
            )
        if is_class_path(pattern) and (classes := (self.composite or self.paths).closest_classes(pattern)):
            problem = (
                f'{name}: "{pattern}" matches no module: the model has no part and no class of that name.'
            )
            return ShardingError(problem, f"Closest: {', '.join(classes)}.")
        problem = (
            f'{name}: "{pattern}" matches no module: the model has no "{first}", only {", ".join(parts)}.'
        )
        # Only what exists is suggested; a neighbour's tree is not known here.
        if self._exists(pattern):
            return ShardingError(problem, f"Closest: {self.prefix}.{pattern}.")
        rest = pattern.strip().partition(".")[2]
        near = next(iter(difflib.get_close_matches(first, parts, n=1, cutoff=0.6)), None)
        if near is not None and (near != self.prefix or self._exists(rest)):
            better = f"{near}.{rest}" if near == self.prefix else near
            return ShardingError(problem, f"Closest: {better}.")
        closest = self.paths.closest(rest or pattern, self.prefix)
        return ShardingError(problem, f"Closest: {', '.join(closest)}." if closest else "")

    def _exists(self, pattern: str) -> bool:
        return bool(pattern) and self.paths.has(apply_aliases(pattern, self.policy.aliases, self.paths))


def relative_to(pattern: str, prefix: str) -> str | None:
    """A pattern of fsdp2.yaml without the prefix; `None` if it names another part."""
    pattern = pattern.strip()
    if not prefix:
        return pattern
    if pattern == prefix:
        return ""
    return pattern[len(prefix) + 1 :] if pattern.startswith(prefix + ".") else None
