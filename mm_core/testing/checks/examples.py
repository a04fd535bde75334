"""The example by which the kit tries a component out."""

from __future__ import annotations

import json
import math

from mm_core.testing.case import Case
from mm_core.testing.check import CheckFailed, CheckSkipped, check, load_checks, require
from mm_core.testing.example import Example
from mm_registry.suggestions import closest

# Largest sizes of one sample: a check runs on one core in a fraction of a second.
LIMITS = {"latents": 65_536, "prompt": 65_536, "video": 524_288, "tokens": 1024}
_LENGTHS = {"latents": 4, "prompt": 2, "video": 3}


def _example(case: Case) -> Example:
    from mm_core.testing.execute import load_example

    example = load_example(case)
    if example is None:
        raise CheckSkipped(f'it declares none; add "{case.subject}" to mm_core.examples to choose the sizes')
    return example


@check("its example is one, and names real checks", stage="light")
def example_is_valid(case: Case) -> None:
    """An `Example` with a section of plain data that needs no file, and known failures each with a reason."""
    example = _example(case)
    section = dict(example.section)
    require("model_id" not in section, "the section of its example holds model_id; the kit adds it")
    require(
        not section.get("from_pretrained"), 'its example reads a folder of weights; write "init": "random"'
    )
    try:
        json.dumps(section, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"the section of its example is not plain data: {error}") from error
    checks = load_checks()
    for name, reason in example.known_failures.items():
        near = closest(name, checks, 1)
        mend = f"; did it mean {near[0]!r}?" if near else ""
        require(name in checks, f"its example declares a failure of {name!r}, which is no check{mend}")
        require(isinstance(reason, str) and reason.strip(), f"its example gives no reason why {name!r} fails")


@check("its example is small", stage="light")
def example_is_small(case: Case) -> None:
    """Sizes are positive whole numbers, few enough for a CPU."""
    example = _example(case)
    for name, limit in LIMITS.items():
        size = getattr(example, name)
        if size is None:
            continue
        numbers = (size,) if name == "tokens" else tuple(size)
        length = _LENGTHS.get(name, 1)
        whole = all(
            isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers
        )
        require(
            len(numbers) == length and whole,
            f"{name} of its example is {size!r}, expected {length} positive numbers",
        )
        require(
            math.prod(numbers) <= limit,
            f"{name} of its example is {size!r}: {math.prod(numbers)}, at most {limit}",
        )
