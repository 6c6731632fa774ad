"""Files on this machine: digests, names of one file in two places, folders that are put together.

What comes in: paths. What goes out: digests and folders. No torch; bundle and cache stand on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Final

import psutil

_CHUNK: Final = 1 << 28


def sweep(parent: Path, prefix: str) -> None:
    """Remove what conversions that were killed have left behind."""
    for stale in parent.glob(f"{prefix}*"):
        owner = re.match(r"\d+", stale.name.removeprefix(prefix))
        if owner and not psutil.pid_exists(int(owner.group())):
            shutil.rmtree(stale, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` written to the disk; they outlive a loss of power then."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, offset: int = 0, size: int | None = None) -> str:
    """The SHA-256 of a file, or of ``size`` bytes at ``offset``; shorter where the file ends."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    end = total if size is None else min(total, offset + size)
    if offset < end:
        with path.open("rb") as file, mmap(file.fileno(), total, access=ACCESS_READ) as pages:
            # Large pieces: between two of them, a thread that hashes waits for the interpreter.
            for start in range(offset, end, _CHUNK):
                with memoryview(pages)[start : min(end, start + _CHUNK)] as piece:
                    digest.update(piece)
    return digest.hexdigest()


def place(file: Path, target: Path) -> None:
    """``file`` under another name; a copy where the two are not on one file system."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def file_state(file: Path) -> tuple[object, ...]:
    """What changes when a file is written or replaced."""
    state = file.stat()
    return str(file), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
