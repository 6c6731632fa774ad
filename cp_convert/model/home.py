"""What surrounds a model file while its model is in use: what ``python model.py`` would give it.

Its folder stands first on ``sys.path``, itself in ``sys.modules`` under its own name, and
``sys.argv`` holds its path alone, so that neighbours can be imported at any time, also by forward.
Nobody answers questions: ``input()`` raises. No torch.
"""

from __future__ import annotations

import ast
import builtins
import io
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final, NoReturn
from unittest.mock import patch

_OWN: Final = Path(__file__).parent.parent


@dataclass(frozen=True)
class Home:
    """Where a model file is imported from.

    Attributes:
        name: under which it stands in ``sys.modules``; with dots where it is part of a package.
        folders: what is put in front of ``sys.path``.
    """

    name: str
    folders: tuple[Path, ...]

    @property
    def package(self) -> str:
        """The package that it belongs to, or nothing."""
        return self.name.rpartition(".")[0]


def find_module(name: str) -> Path | None:
    """The file of the module ``name``, from the current folder or installed; none is imported."""
    spec: ModuleSpec | None = None
    places: Iterable[str] = [str(Path.cwd()), *sys.path]
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), list(places))
        if spec is None:
            return None
        places = spec.submodule_search_locations or ()
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def home_of(path: Path, module: str | None = None) -> Home:
    """How Python would import ``path``.

    A path means what it means in ``python path``. That gives a file no package; one that imports
    relatively is therefore imported as part of its own.

    Args:
        path: the model file.
        module: its dotted name, where it was named by that.
    """
    folder = path.absolute().parent
    if module is not None:
        depth = module.count(".") + (path.name == "__init__.py")
        return Home(module, (path.absolute().parents[depth],))
    name = path.stem.replace(".", "_")
    root, parts = folder, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    folders = (folder,) if root == folder else (folder, root)
    if root != folder and _imports_relatively(path):
        return Home(".".join(parts), folders)
    # Another module of this name may be in use; sys.modules has room for one.
    return Home(f"{name}_model" if name in sys.modules else name, folders)


def _imports_relatively(path: Path) -> bool:
    with suppress(SyntaxError, ValueError, OSError):  # told when it is imported
        nodes = ast.walk(ast.parse(path.read_bytes()))
        return any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    return False


@contextmanager
def at_home(path: Path, module: str | None = None) -> Iterator[None]:
    """Give the model file its surroundings; in the end what was imported from them is forgotten.

    Args:
        path: the model file.
        module: its dotted name, where it was named by that.
    """
    if sys.argv == [str(path)]:  # somebody further out has done it
        yield
        return
    folders = home_of(path, module).folders
    known, entries = set(sys.modules), list(sys.path)
    with (
        patch.object(sys, "argv", [str(path)]),
        patch.object(sys, "path", [*map(str, folders), *sys.path]),
        patch.object(sys, "stdin", io.StringIO()),
        patch.object(builtins, "input", _nobody_answers),
    ):
        try:
            yield
        finally:
            _forget(set(sys.modules) - known, folders, entries)


def _nobody_answers(prompt: object = "", /) -> NoReturn:
    raise EOFError(f"input({str(prompt)!r}) asks, and nobody answers during a conversion")


def _forget(names: Iterable[str], folders: Iterable[Path], entries: Iterable[str]) -> None:
    """Modules from ``folders``: another model file may have other ones of these names.

    What is installed in a folder beneath is not from there: one of ``entries``, which ``sys.path``
    had before, is nearer to it, and parts of it would not find each other again.
    """
    near = {one for folder in folders for one in (folder, folder.resolve())}
    schemes = ("purelib", "platlib", "stdlib", "platstdlib")
    installed = {Path(sysconfig.get_path(name)) for name in schemes} | {_OWN}
    others = (installed | {Path(entry).absolute() for entry in entries}) - near
    files = {name: _file_of(sys.modules[name]) for name in names}
    for name, file in files.items():
        if _nearest(file, near) > _nearest(file, others):
            del sys.modules[name]


def _nearest(file: Path, folders: Iterable[Path]) -> int:
    """How many parts the longest of those paths has that ``file`` is in; none: 0."""
    return max((len(one.parts) for one in folders if file.is_relative_to(one)), default=0)


def _file_of(module: ModuleType) -> Path:
    file = getattr(module, "__file__", None)
    return Path(file or next(iter(getattr(module, "__path__", ())), "/"))
