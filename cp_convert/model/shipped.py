"""The TOML files that are installed with the package. No torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped(package: str) -> dict[str, Path]:
    """The TOML files of ``package``, by name without the ending."""
    folder = Path(str(resources.files(package)))
    return {file.name.removesuffix(".toml"): file for file in folder.glob("*.toml")}
