"""Kinds of devices as text: their names, the variables that hide some of them, and what `--distributed-backend` may
say. Imports no torch: a wrong spelling is told before anything heavy is loaded.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping

from mm_core.config.environment import read
from mm_core.config.findings import closest
from mm_registry.errors import UserError

#: In the order in which they are looked for.
TYPES = ("cuda", "npu", "cpu")

#: What ranks talk through, by the type of device that their tensors are on.
COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}

#: The variables by which a process sees some of a machine's devices only.
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}

_FLAG = "--distributed-backend"
_FORMS = (
    "use nccl, hccl or gloo, or pairs of device and backend such as cpu:gloo,npu:hccl, "
    "or leave the flag out for the device's own"
)


def visible_devices(device: str, environ: Mapping[str, str] | None = None) -> list[str] | None:
    """The devices that this process may see, as its variable names them; None if it may see all of them.

    Drivers stop at the first entry that means nothing, such as -1, which hides all that follow.
    """
    text = read(VISIBLE[device], environ) if device in VISIBLE else None
    if text is None:
        return None
    seen: list[str] = []
    for part in text.split(","):
        if not part.strip() or part.strip().startswith("-"):
            break
        seen.append(part.strip())
    return seen


def read_backend(text: str) -> dict[str, str]:
    """The parts of `--distributed-backend`: device → backend. A backend without device is told of `""`.

    `nccl` and `hccl` are kept as written; `communication` gives them the meaning that they have on a device.

    Raises:
        UserError: a part names no device or backend that can be meant.
    """
    parts: dict[str, str] = {}
    for part in text.lower().split(","):
        device, colon, backend = (piece.strip() for piece in part.partition(":"))
        if not colon:
            device, backend = "", device
        if device and device not in TYPES:
            raise UserError(
                f'{_FLAG} "{text}": "{device}" is no type of device{_near(device, TYPES)}; {_FORMS}.'
            )
        if backend not in COLLECTIVES.values():
            raise UserError(
                f'{_FLAG} "{text}": "{backend}" is no backend that training can use'
                f"{_near(backend, COLLECTIVES.values())}; {_FORMS}."
            )
        if device == "cpu" and backend != "gloo":
            raise UserError(
                f'{_FLAG} "{text}": tensors on the CPU travel through gloo alone; write cpu:gloo.'
            )
        if device in parts:
            raise UserError(f'{_FLAG} "{text}" says twice what {device or "the device"} uses; {_FORMS}.')
        parts[device] = backend
    if "" in parts and len(parts) > 1:
        raise UserError(f'{_FLAG} "{text}": next to a pair, "{parts[""]}" needs its device too; {_FORMS}.')
    return parts


def communication(text: str | None, device: str) -> tuple[str, str]:
    """What torch's `init_process_group` is given, and what there is to say about it (often nothing).

    Tensors on the host always get gloo: offloaded parameters and gathered objects travel through it. Parts about
    devices other than this process's are without effect. `nccl` means hccl on an NPU, as scripts for NPUs write it
    (torch_npu maps the name too), and hccl means nccl on a CUDA device.

    Args:
        text: the flag's value; None if it was not given.
        device: `cpu`, `cuda` or `npu`.

    Raises:
        UserError: it is misspelt, or has nothing for this device.
    """
    own = COLLECTIVES[device]
    full = own if device == "cpu" else f"cpu:gloo,{device}:{own}"
    if text is None:
        return full, ""
    parts = read_backend(text)
    wanted = parts.get("", parts.get(device))
    if wanted is None:
        raise UserError(
            f'{_FLAG} "{text}" has nothing for the {device} device of this process; use "{full}" or leave the flag out.'
        )
    if device == "cpu" or wanted == own:
        said = (
            ""
            if wanted == own
            else f'"{wanted}" is for accelerators; this process computes on the CPU and uses gloo'
        )
        return full, said
    if wanted == "gloo":
        if device == "npu":
            raise UserError(
                f'{_FLAG} "{text}": gloo moves no tensors of NPUs; use "{full}" or leave the flag out.'
            )
        return f"cpu:gloo,{device}:gloo", "gloo copies every tensor through the host; nccl is faster by far"
    return full, f'"{wanted}" is another maker\'s; {own} is used on this {device} device'


def torch_npu_failure(error: BaseException) -> str | None:
    """The sentence for an error that the import of torch_npu ended with, whoever asked for it: torch itself (which adds
    an error of its own), diffusers, transformers. None for any other error.
    """
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.walk_tb(seen.__traceback__)
        if any(
            frame.f_code.co_name == "<module>"
            and str(frame.f_globals.get("__name__")).startswith("torch_npu")
            for frame, _ in frames
        ):
            return broken_torch_npu(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def broken_torch_npu(error: BaseException) -> str:
    """What is wrong where torch_npu is installed and cannot be imported, and how to mend it."""
    why = " ".join(str(error).split()).rstrip(".")
    return (
        f"torch_npu is installed, but cannot be imported ({type(error).__name__}: {why}): install the CANN that its "
        "version asks for and source its set_env.sh; on a machine without NPUs, remove it (pip uninstall torch-npu), "
        "for diffusers and transformers import it wherever they find it."
    )


def _near(word: str, known: Iterable[str]) -> str:
    found = closest(word, known)
    return f' (did you mean "{found}"?)' if found else ""
