"""Build the pretend NPU's library, once for a version of its sources and of torch.

    python tests/pretend_npu/build.py

prints the path of the library. The tests call it in a process of its own: loading the library adds a device to torch.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("devices.cpp", "operators.cpp", "collectives.cpp")
NAME = "pretend_npu_library"


def missing() -> str | None:
    """What this machine lacks to build it; None if it lacks nothing."""
    _find_ninja()
    if sys.platform != "linux":
        return "it is built on Linux only"
    return next(
        (f"no {tool} on this machine" for tool in ("g++", "ninja") if shutil.which(tool) is None), None
    )


def build() -> Path:
    """Return the library, built if it was not there. Processes that ask at once build it once."""
    import torch
    from torch.utils import cpp_extension

    _find_ninja()
    files = [HERE / name for name in (*SOURCES, "npu.h")]
    version = hashlib.sha256(b"".join(file.read_bytes() for file in files) + torch.__version__.encode())
    folder = Path(tempfile.gettempdir()) / f"mmzoo-pretend-npu-{getpass.getuser()}-{version.hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{NAME}.so"
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            cpp_extension.load(
                NAME, [str(HERE / name) for name in SOURCES],
                extra_cflags=["-O1", "-Wall"], build_directory=str(folder),
            )  # fmt: skip
            (folder / "done").touch()
    return library


def _find_ninja() -> None:
    """A virtual environment's own ninja counts, whether it is activated or not."""
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((os.environ["PATH"], folder))


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
