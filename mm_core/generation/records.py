"""Where videos are written, and the JSON beside each that says how to make it again."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.config.document import expanded
from mm_core.generation.video import move_to_free_name
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.generation_job import GenerationJob

_LIBRARIES = ("torch", "diffusers", "transformers")


def targets_of(save_path: Path, texts: Sequence[str]) -> list[Path]:
    """Return the file of each video: `save_path` itself if it ends in .mp4, numbered if there are several; else files in
    that folder, by number and prompt.
    """
    if save_path.suffix.lower() == ".mp4":
        if len(texts) == 1:
            return [save_path]
        return [save_path.with_name(f"{save_path.stem}-{index:03d}.mp4") for index in range(len(texts))]
    return [save_path / f"{index:03d}-{_slug(text)}.mp4" for index, text in enumerate(texts)]


@contextmanager
def folder_of_videos(folder: Path, save_path: Path) -> Iterator[None]:
    """Make the folder and try to write into it; if what follows fails and leaves it empty, what was made of
    it is removed again.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileExistsError as error:
            raise UserError(
                f"save_path {save_path}: {folder} is a file; give a folder, or a name ending in .mp4"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a name with NUL
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"save_path {save_path}: videos cannot be written there: {reason.lower()}"
            ) from error
        yield
    except BaseException:
        for path in made:
            with suppress(OSError, ValueError):  # something is in it, or it was never made
                path.rmdir()
        raise


def versions_of(job: GenerationJob) -> dict[str, str]:
    """Versions of the libraries and plugins that a video depends on."""
    return {name: version(name) for name in ("mmzoo-core", *_LIBRARIES)} | dict(job.plugins)


def image_record(file: str | None) -> dict[str, str] | None:
    """What a record says of a given frame: its file, absolute, and the SHA-256 of it."""
    if file is None:
        return None
    path = expanded(file)
    return {"path": str(path.resolve()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_record(video: Path, record: dict[str, Any]) -> None:
    """Write a video's JSON beside it.

    Raises:
        UserError: it cannot be written.
    """
    path = video.with_suffix(".json")
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        move_to_free_name(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def _slug(text: str) -> str:
    """A prompt as part of a file name; short in bytes too, for scripts of three bytes a letter."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-_")
    return words.encode()[:60].decode(errors="ignore").rstrip("-_") or "video"
