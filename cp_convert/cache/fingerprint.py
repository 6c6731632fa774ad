"""Keys of what is made from a traced program, and of whole conversions: equal keys, equal results.

A trace itself has no key: it is made every time, and the program that came out of it is part of
the key of everything that follows (:mod:`cp_convert.ir.identity`). Beside it stand our own code
and the versions of the packages that do the rest.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..backends import Backend
from ..ir.identity import identity, settings
from ..ir.records import Traced
from .store import key_of

_OWN: Final = "cp-convert"


def tool_key(backend: Backend) -> str:
    """Of this program's own code, Python, torch, TensorRT and all that these require."""
    folder = Path(__file__).parent.parent
    code = [(str(f.relative_to(folder)), f.read_bytes()) for f in sorted(folder.rglob("*.py"))]
    used = versions((_OWN, "torch", backend.distribution, *backend.tensorrt))
    used.pop(_OWN, None)  # its code tells more
    built = torch.version.git_version
    return key_of(
        [backend.name, sys.version, torch.__version__, built, sorted(used.items()), *code]
    )


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of the named distributions and of all that they require, where installed."""
    found: dict[str, str] = {}
    waiting = list(distributions)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            one = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = one.version
        waiting += _required(one)
    return found


def _required(one: metadata.Distribution) -> list[str]:
    """Names of what a distribution requires here, without its extras."""
    needed = (Requirement(text) for text in one.requires or ())
    return [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def program_key(tool: str, trace: Traced) -> str | None:
    """Of what is made from a traced program; ``None`` for one that gets no key."""
    if trace.program.peers:
        return None
    digest = identity(trace.program, trace.applied)
    return None if digest is None else key_of([tool, digest, sorted(settings().items())])


def code_key() -> str:
    """Of the code that runs when the model is called, as far as it is imported.

    The proof's reference is the model itself, called; what it does only then is in no trace. All
    that is installed counts, imported or not: TensorRT may or may not be imported already.
    """
    known = [sysconfig.get_path(n) for n in ("purelib", "platlib", "stdlib", "platstdlib")]
    known.append(str(Path(__file__).parent.parent))
    found = {one.name: one.version for one in metadata.distributions()}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # torch.classes, for one, only says that it has a file.
        if file.endswith(".py") and not file.startswith(tuple(known)) and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return key_of(sorted(found.items()))
