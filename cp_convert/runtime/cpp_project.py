"""The C++ runner as a project of the user's own; no torch, no tensorrt.

The sources are in the folder ``cpp`` beside this module and are handed out as they are; their
README tells how they are compiled and used.
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from .new_folder import check_new, new_folder


def export(out: Path) -> None:
    """Write the project into ``out``, whole or not at all.

    Raises:
        OutputError: ``out`` exists, or cannot be written.
    """
    check_new(out)
    with new_folder(out) as folder, as_file(files(__package__) / "cpp") as source:
        shutil.copytree(source, folder, dirs_exist_ok=True)
