"""A process that builds one engine: TensorRT holds Python's interpreter while it builds.

It also takes over the signals that arrive then (its compiler, LLVM, installs handlers of its own
that end the process), which is one more reason not to build where files must be tidied up.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import errors
from ..backends import Backend
from ..bundle.folder import output_error
from ..errors import BuildFailed, ConvertError
from ..ir.engine import Engine, NetworkCollective
from ..ir.lift import fill_last
from ..ir.serialize import Packed, read_packed, unpack
from .build import build, collectives_of, network_of, prepare
from .specialise import specialise
from .symbolic import symbolic


@dataclass(frozen=True)
class Task:
    """One engine to build; all that a worker is told.

    Attributes:
        rank: whose engine.
        program: file of the packed program (:mod:`cp_convert.ir.serialize`), of all ranks.
        path: where the engine goes.
        backend: which TensorRT builds.
        fused: whether the program has TensorRT's own multi-device attention.
        targets: compute capabilities; empty for the backend's own choice.
        external: by placeholder, the binding of a parameter that becomes an input.
        network: whether the network is read back for the proof.
        dynamic: whether the program is for a range of sizes.
    """

    rank: int
    program: Path
    path: Path
    backend: Backend
    fused: bool
    targets: tuple[str, ...]
    external: Mapping[str, str]
    network: bool
    dynamic: bool = False

    @property
    def log(self) -> Path:
        """Where the worker's process writes what libraries say on stdout and stderr."""
        return self.path.with_suffix(".log")


def run(task: Task, answer: Connection) -> None:
    """Build, and send what was built or the :class:`ConvertError` that was raised.

    A worker that cannot say what went wrong ends with a traceback and a non-zero exit code; the
    traceback, and whatever libraries write, stands in the task's log.
    """
    begin(task.log)
    try:
        said = _built(task)
    except ConvertError as error:
        said = pickle.dumps((error.as_dict(), _peak()))
    except OSError as error:
        said = pickle.dumps((output_error(error, task.path).as_dict(), _peak()))
    with suppress(BrokenPipeError):  # the parent has been stopped
        answer.send_bytes(said)


def begin(log: Path) -> None:
    """What every process does first that works for a conversion: it ends when that does.

    Args:
        log: where it, and what libraries it calls, write from now on.
    """
    _write_into(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a terminal tells all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()


def _built(task: Task) -> bytes:
    prepare(task.backend, fused=task.fused)
    packed = read_packed(task.program)
    made = symbolic(packed, task.rank) if task.dynamic else specialise(unpack(packed), task.rank)
    known = [tensor.reshape(-1) for tensor in packed.tensors.values()] if task.network else None
    engine = build(made, task.rank, task.path, task.targets, known=known, external=task.external)
    if task.dynamic:
        engine = replace(engine, collectives=_at_most(packed, task))
    return dumps((engine, _peak()), packed.tensors)


def _at_most(packed: Packed, task: Task) -> tuple[NetworkCollective, ...]:
    """What a program for a range sends at its largest size: its network knows no sizes."""
    program = specialise(unpack(fill_last(packed)), task.rank)
    return tuple(collectives_of(network_of(program, task.external).ctx.net))


def dumps(value: Any, known: Mapping[str, Tensor]) -> bytes:
    """Pickle ``value``; tensors that are (views of) known ones by name instead of by number."""
    names = {(t.data_ptr(), t.numel(), t.dtype): name for name, t in known.items()}
    buffer = io.BytesIO()

    class Named(pickle.Pickler):
        def persistent_id(self, one: Any) -> Any:
            if isinstance(one, Tensor):
                name = names.get((one.data_ptr(), one.numel(), one.dtype))
                if name is not None and one.is_contiguous():
                    return name, tuple(one.shape)
            return None

    Named(buffer).dump(value)
    return buffer.getvalue()


def loads(data: bytes, known: Mapping[str, Tensor]) -> Any:
    """The value that :func:`dumps` was given.

    Raises:
        ConvertError: the one that the worker raised.
    """

    class Named(pickle.Unpickler):
        def persistent_load(self, told: Any) -> Tensor:
            name, shape = told
            return known[name].contiguous().view(shape)

    return Named(io.BytesIO(data)).load()


def answered(data: bytes, known: Mapping[str, Tensor]) -> tuple[Engine, int]:
    """What a worker sent: the engine, and the most memory in bytes that it held.

    Raises:
        ConvertError: what the worker raised.
    """
    first, peak = loads(data, known)
    if isinstance(first, dict):
        kind: Any = getattr(errors, str(first["kind"]), BuildFailed)
        raise kind(str(first["message"]), where=first["where"], hint=first["hint"])
    return first, peak


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_into(log: Path) -> None:
    """Let this process, its native libraries too, write into ``log`` from now on."""
    with suppress(OSError), log.open("wb") as file:  # a full disk is told by what is built
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers; Linux does it then."""
    if sys.platform == "linux":
        parent_death = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)
