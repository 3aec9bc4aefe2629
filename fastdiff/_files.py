"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["make_folder", "written_whole"]


def make_folder(path: Path, name: str) -> None:
    """Make a folder and those above it, where they are missing.

    Args:
        name: the option that gave it, for the message.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"{name} must be a folder, or one that can be made"
        raise OSError(f"{rule}, got {path} ({error.strerror})") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end of the block.

    Where the block fails, by a full disk or Ctrl-C, nothing is left of it, and what `path` held
    before stays. A process that is killed leaves a hidden file, `.name.<process>.<thread>.part`.

    Args:
        path: the file to make or to replace, in an existing folder.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
