"""``python -m fastdiff.integrations.comfyui install PATH_TO_COMFYUI``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# not "fastdiff": a node that puts custom_nodes on Python's path would make it hide the package
FOLDER = "comfyui_fastdiff"
TEXT = "from fastdiff.integrations.comfyui import *\n"


def install(root: Path) -> Path:
    """Write the file that ComfyUI loads; writing it again changes nothing.

    Args:
        root: folder of ComfyUI, with custom_nodes in it.

    Returns:
        the file.

    Raises:
        ValueError: there is no custom_nodes folder, or the file is there with another text.
    """
    nodes = root / "custom_nodes"
    if not nodes.is_dir():
        raise ValueError(f"install: PATH_TO_COMFYUI must hold a custom_nodes folder, got {root}")
    file = nodes / FOLDER / "__init__.py"
    if file.exists() and file.read_text(encoding="utf-8") != TEXT:
        raise ValueError(f"install: {file} must hold what install wrote, got another text")
    file.parent.mkdir(exist_ok=True)
    file.write_text(TEXT, encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where it was refused."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.integrations.comfyui")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("install", help="write the node's file into custom_nodes")
    command.add_argument("root", metavar="PATH_TO_COMFYUI", type=Path)
    try:
        file = install(parser.parse_args(arguments).root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{file} written; restart ComfyUI with this Python ({sys.executable})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
