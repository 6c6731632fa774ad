"""A folder that is there as a whole or not at all, and never replaces another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bundle.folder import staged
from ..errors import OutputError
from ..files import sync_folder


def check_new(out: Path) -> None:
    """Refuse, before anything is written, a folder that is there or cannot be.

    Raises:
        OutputError: ``out`` exists, or nothing can be written where it would be.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(
            f"{out} exists; it is not replaced.",
            hint="name another one, or remove it yourself.",
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder.", hint="name another one.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} is not writable.", hint="name another one.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` when the block ends well, and else is removed.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    with staged(out) as folder:
        whole = folder / out.name
        whole.mkdir()
        yield whole
        sync_folder(whole)
        whole.rename(out.absolute())
        sync_folder(out.absolute().parent)
