"""One conversion at a time writes a bundle: a lock beside it, which ends with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other conversions from writing ``out``, which need not exist; its folder must.

    The lock is the system's, on a hidden file beside ``out``: one that is left over by a process
    that was killed locks nothing. Where the file system knows no locks, there is none.

    Raises:
        OutputError: another conversion is writing it.
        OSError: the folder cannot be written.
    """
    path = out.with_name(f".{out.name}.lock")
    descriptor = _taken(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked: see _taken
        os.close(descriptor)


def _taken(path: Path, out: Path) -> int:
    """An open file that is locked and still stands under its name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
            if _is_named(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise OutputError(
                f"another conversion is writing {out}"
                + (f" (process {holder})." if holder.isdigit() else "."),
                hint="choose another --out, or wait until it is done.",
            ) from error
        os.close(descriptor)  # its last owner has removed it since it was opened


def _lock(descriptor: int) -> None:
    if os.name != "posix":
        return
    import fcntl  # late: other systems have none, and read bundles too

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
