"""What an export wrote."""

from __future__ import annotations

from pathlib import Path

from .screen import Screen


def exported(screen: Screen, folder: Path, next_step: str) -> None:
    """The folder that was written, its files, and where to read on."""
    if screen.as_json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        screen.document({"folder": str(folder), "files": files})
    else:
        screen.note(f"{folder} was written; its {next_step}.")
