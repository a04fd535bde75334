"""Which checks must have passed for another to say anything: one cause is one failure, not forty.

What cannot be imported cannot be built, what cannot be built cannot be called. A check that needs one that failed is not
tried, and says which it was.
"""

from __future__ import annotations

from collections.abc import Mapping

from mm_core.testing.check import Check

_STEPS: Mapping[str, tuple[str, ...]] = {
    "predictor": (
        "builds-a-module",
        "builds-on-meta",
        "first-values-are-complete",
        "predicts-the-latents-shape",
    ),
    "transformers_model": (
        "builds-a-module",
        "builds-on-meta",
        "first-values-are-complete",
        "reads-tokens-and-images",
    ),
    "ae": ("builds-a-module", "encodes-to-its-latent-shape"),
    "text_encoder": ("builds-a-module", "encodes-to-embeddings-and-mask"),
    "diffusion": ("diffusion-builds",),
    "i2v_processor": ("makes-the-promised-conditions",),
    "dataset": ("dataset-has-items",),
    "task": ("task-builds",),
    "callback": ("callback-runs-through",),
    "pipeline": ("pipeline-signature-fits", "pipeline-makes-videos"),
}
"""Role -> what a check that builds and calls a component relies on; each step relies on those before it."""

LAST_STEPS = frozenset(steps[-1] for steps in _STEPS.values())
"""What was not run, where one of these was skipped."""

_BUILDS_ONLY: Mapping[str, str] = {
    "build-changes-no-global-setting": "builds-a-module",
    "parameters-are-fp32": "builds-a-module",
    "no-tensor-is-shared-by-accident": "builds-a-module",
    "train-and-eval-reach-every-part": "builds-a-module",
    "comes-frozen-and-in-eval-mode": "builds-a-module",
    "random-weights-are-the-same-everywhere": "builds-a-module",
    "missing-folder-is-a-user-error": "builds-a-module",
    "post-build-is-idempotent": "builds-a-module",
    "latent-sizes-are-whole-numbers": "builds-a-module",
    "config-agrees-with-the-module": "builds-a-module",
    "build-reads-no-weights": "builds-a-module",
    "meta-and-cpu-have-the-same-tensors": "builds-on-meta",
    "adapter-is-one-to-one": "builds-on-meta",
    "adapter-knows-its-config": "builds-a-module",
    "policy-makes-a-plan": "builds-on-meta",
    "policy-covers-each-parameter-once": "builds-on-meta",
    "units-are-worth-it": "builds-on-meta",
    "aliases-name-modules": "builds-on-meta",
    "fp32-inputs-are-arguments": "builds-on-meta",
    "state-is-registered": "first-values-are-complete",
    "first-values-are-keyed": "first-values-are-complete",
    "first-values-are-the-constructors": "first-values-are-complete",
    "buffers-survive-meta": "first-values-are-complete",
    "frozen-modules-are-the-ones": "builds-on-meta",
    "attention-is-of-known-parts": "builds-a-module",
    "repeated-numbers-have-places": "builds-a-module",
}
"""Checks that do not call what they build -> the last step that they rely on."""

_STAGES: Mapping[str, tuple[str, ...]] = {
    "metadata": (),
    "light": ("can-be-used", "companions-can-be-used"),
    "build": ("target-exists", "section-is-accepted", "constructor-takes-its-section"),
    "ranks": ("policy-makes-a-plan",),
}

_TO_READ = ("companions-exist", "hooks-can-be-activated")
_OWN: Mapping[str, tuple[str, ...]] = {
    "can-be-used": ("declares-its-api-range",),
    "companions-can-be-used": ("can-be-used",),
    "hooks-can-be-activated": ("declares-its-api-range",),
    "hooks-keep-to-their-own": ("hooks-can-be-activated",),
    "hooks-keep-their-input": ("hooks-can-be-activated",),
    "hooks-are-idempotent": ("section-is-accepted",),
    "example-is-valid": ("companions-exist",),
    "example-is-small": ("companions-exist",),
    "config-is-light": ("companions-exist",),
    "policy-is-light": ("companions-exist",),
    "weights-adapter-is-light": ("companions-exist",),
    "example-is-light": ("companions-exist",),
    "import-touches-no-cuda": ("companions-exist",),
    "import-starts-no-process-group": ("companions-exist",),
    "import-keeps-torch-state": ("companions-exist",),
    "import-keeps-the-environment": ("companions-exist",),
    "import-keeps-the-interpreter": ("companions-exist",),
    "import-writes-no-files": ("companions-exist",),
    "import-starts-no-threads": ("companions-exist",),
    "import-prints-nothing": ("companions-exist",),
    "section-is-accepted": _TO_READ,
    "config-refuses-unknown-keys": _TO_READ,
    "config-has-a-schema": ("companions-exist",),
    "config-refuses-wrong-types": ("target-exists", "section-is-accepted"),
    "config-defaults-validate": ("section-is-accepted",),
    "fields-are-plain-data": ("section-is-accepted",),
    "policy-is-one": ("section-is-accepted",),
    "weights-adapter-is-one": ("section-is-accepted",),
    "constructor-takes-its-section": ("target-builds", "section-is-accepted"),
    "target-builds": ("target-exists",),
    "has-the-methods-of-its-role": ("target-builds",),
    "pickles-by-id": ("target-exists",),
    "spawned-worker-resolves-it": ("target-exists", "companions-exist"),
    "predicts-the-latents-shape": ("has-the-methods-of-its-role",),
    "encodes-to-its-latent-shape": ("has-the-methods-of-its-role",),
    "encodes-to-embeddings-and-mask": ("has-the-methods-of-its-role",),
    "adapter-is-one-to-one": ("weights-adapter-is-one",),
    "adapter-knows-its-config": ("weights-adapter-is-one",),
    "weights-folder-round-trip": ("adapter-is-one-to-one",),
    "policy-makes-a-plan": ("policy-is-one",),
    "policy-covers-each-parameter-once": ("policy-makes-a-plan",),
    "units-are-worth-it": ("policy-makes-a-plan",),
    "units-run-in-order": ("policy-makes-a-plan",),
    "mixed-precision-works": ("bf16-parameters-work",),
    "aliases-name-modules": ("policy-is-one",),
    "fp32-inputs-are-arguments": ("policy-is-one",),
}
"""Check -> what it needs besides what its stage and its role's steps say."""


def prerequisites(check: Check) -> tuple[str, ...]:
    """Names of the checks that it needs directly, causes before what they cause."""
    if check.whole_plugin:
        return _OWN.get(check.name, ())
    found = [*_STAGES[check.stage], *_OWN.get(check.name, ())]
    if check.stage in ("build", "ranks"):
        for role, steps in _STEPS.items():
            if check.roles is None or role in check.roles:
                found += _steps_before(check.name, steps)
    return tuple(dict.fromkeys(found))


def cause(check: Check, checks: Mapping[str, Check], failed: Mapping[str, str]) -> str | None:
    """Return the first check that failed among those that one needs, and those that they need; None if none did.

    Args:
        checks: all checks by name.
        failed: name -> how it ended, of the same subject or of the plugin as a whole.
    """
    return next((name for name in _all_needed(check, checks) if name in failed), None)


def in_order(checks: Mapping[str, Check]) -> dict[str, Check]:
    """The same checks, each after those that it needs, else as they were."""
    ordered: dict[str, Check] = {}
    for check in checks.values():
        for name in (*_all_needed(check, checks), check.name):
            ordered.setdefault(name, checks[name])
    return ordered


def _steps_before(name: str, steps: tuple[str, ...]) -> tuple[str, ...]:
    if name in steps:
        return steps[: steps.index(name)]
    last = _BUILDS_ONLY.get(name)
    return steps if last not in steps else steps[: steps.index(last) + 1]


def _all_needed(check: Check, checks: Mapping[str, Check]) -> list[str]:
    """Everything that a check needs, at any distance; each after what it needs itself."""
    found: dict[str, None] = {}

    def add(name: str) -> None:
        if name not in found and name in checks:
            for needed in prerequisites(checks[name]):
                add(needed)
            found[name] = None

    for name in prerequisites(check):
        add(name)
    return list(found)
