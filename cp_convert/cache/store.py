"""Finished work, kept by what it was made from. No torch, no tensorrt.

An entry is a folder that was put together beside and renamed into place, with the SHA-256 of its
files; one that does not match (a disk that lied, a file that was edited) is removed and made
again. Two conversions may use one cache at once: whoever renames first wins, and both have made
the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import platformdirs

from ..files import sha256, sweep

KINDS: Final = ("traces", "engines", "bundles", "requests", "digests")
ENGINE: Final = "engine"
"""What an engine is called in its entry."""
LIMIT: Final = 20_000_000_000
_LIST: Final = "files.json"
_PARTIAL: Final = ".partial-"


def default_folder() -> Path:
    """The platform's folder for caches."""
    return platformdirs.user_cache_path("cp-convert", appauthor=False)


@dataclass(frozen=True)
class Held:
    """What a cache holds of one kind.

    Attributes:
        kind: one of :data:`KINDS`.
        entries: how many.
        bytes: of all their files. An engine that a bundle still links takes no room of its own.
    """

    kind: str
    entries: int
    bytes: int


class Cache:
    """A folder of entries, by kind and key.

    Args:
        folder: made when it is first written to; ``None`` keeps nothing and finds nothing.
        limit: bytes; beyond, the entries that were not used for longest go.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit

    def find(self, kind: str, key: str) -> Path | None:
        """The folder of an entry that is whole, or ``None``."""
        if self.folder is None:
            return None
        entry = self.folder / kind / key
        try:
            told = msgspec.json.decode((entry / _LIST).read_bytes(), type=dict[str, str])
            whole = all(sha256(entry / name) == digest for name, digest in told.items())
            if whole:
                os.utime(entry)
                return entry
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            pass
        shutil.rmtree(entry, ignore_errors=True)
        return None

    @contextmanager
    def store(self, kind: str, key: str, known: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A folder to fill; it becomes the entry when the block ends.

        What cannot be kept (the disk is full, the folder is not ours) is not: a conversion does
        not fail for its cache.

        Args:
            kind: one of :data:`KINDS`.
            key: of the entry.
            known: SHA-256 of files, by name, where it is known already.
        """
        with tempfile.TemporaryDirectory() as nowhere, suppress(OSError):
            partial = self._partial(kind) or Path(nowhere)
            try:
                yield partial
                names = [str(path.relative_to(partial)) for path in _files(partial)]
                told = {name: (known or {}).get(name) or sha256(partial / name) for name in names}
                (partial / _LIST).write_bytes(msgspec.json.encode(told))
                if self.folder is not None:
                    partial.rename(self.folder / kind / key)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._trim()

    def forget(self, kind: str, key: str) -> None:
        """Remove an entry, if there is one."""
        if self.folder is not None:
            shutil.rmtree(self.folder / kind / key, ignore_errors=True)

    def _partial(self, kind: str) -> Path | None:
        """A folder in which to put an entry together, or ``None`` where that cannot be."""
        if self.folder is None:
            return None
        parent = self.folder / kind
        try:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent, _PARTIAL)
            return Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{os.getpid()}-", dir=parent))
        except OSError:
            return None

    def held(self) -> list[Held]:
        """How much there is of every kind."""
        found = {kind: [] for kind in KINDS}  # type: dict[str, list[int]]
        for kind, _, size in self._entries():
            found[kind].append(size)
        return [Held(kind, len(sizes), sum(sizes)) for kind, sizes in found.items()]

    def clear(self) -> int:
        """Remove every entry; returns how many bytes they had."""
        total = 0
        for _, entry, size in list(self._entries()):
            shutil.rmtree(entry, ignore_errors=True)
            total += size
        return total

    def _entries(self) -> Iterator[tuple[str, Path, int]]:
        for kind in KINDS if self.folder is not None else ():
            parent = Path(str(self.folder)) / kind
            for entry in parent.iterdir() if parent.is_dir() else ():
                if not entry.name.startswith(_PARTIAL):
                    with suppress(OSError):
                        yield kind, entry, sum(path.stat().st_size for path in _files(entry))

    def _trim(self) -> None:
        entries = [(entry.stat().st_mtime, entry, size) for _, entry, size in self._entries()]
        over = sum(size for _, _, size in entries) - self.limit
        for _, entry, size in sorted(entries):
            if over <= 0:
                break
            shutil.rmtree(entry, ignore_errors=True)
            over -= size


def _files(folder: Path) -> list[Path]:
    """All files of an entry, those in folders of its own (a bundle's program) too."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def key_of(parts: Iterable[object]) -> str:
    """SHA-256 of what ``parts`` look like."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(repr(part).encode())
        whole.update(b"\0")
    return whole.hexdigest()
