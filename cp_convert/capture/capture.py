"""A traced program as a dense one of core operators: decomposed, or found in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from ..cache.fingerprint import program_key
from ..cache.store import Cache
from ..errors import CannotLower
from ..ir.frozen_value import digest_of
from ..ir.program import Lowered
from ..ir.records import Captured, Seen, Traced
from ..ir.serialize import pack, read_packed, unpack
from ..ir.signature import Signature
from ..ir.source import Source
from ..model.meta import with_memory
from ..progress import Clock
from .decompose import decompose
from .trace import trace

_PROGRAM: Final = "program.safetensors"
_SIGNATURE: Final = "signature.json"


def traced(source: Source, clock: Clock) -> Traced:
    """Trace the model; always, as nobody can tell what forward reads while it is traced.

    Raises:
        CannotTrace, CannotShard: see :func:`.trace.trace`.
    """
    with clock.stage("trace"), with_memory(source.module):
        program, applied = trace(
            source.module,
            source.inputs,
            source.plan,
            source.freeze,
            peers=source.peers,
            groups=source.groups,
        )
    return Traced(program, applied)


def see(
    source: Source,
    trace: Traced | None,
    table: Mapping[Any, Any],
    cache: Cache,
    tool: str,
    clock: Clock,
) -> Seen:
    """Trace, unless that is done, and decompose what the cache does not know, see :func:`capture`.

    Args:
        source: the model.
        trace: its program, where it was traced already.
        table: the backend's decompositions.
        cache: where to look.
        tool: key of our own code and of the versions below it.
        clock: times the stages.

    Raises:
        ConvertError: see :func:`traced` and :func:`capture`.
    """
    trace = traced(source, clock) if trace is None else trace
    key = program_key(tool, trace) if cache.folder is not None else None
    return Seen(capture(source, trace, table, cache, key, clock), key)


def capture(
    source: Source,
    trace: Traced,
    table: Mapping[Any, Any],
    cache: Cache,
    key: str | None,
    clock: Clock,
) -> Captured:
    """Decompose what was traced, unless the cache knows the result.

    Args:
        source: the model.
        trace: its program.
        table: the backend's decompositions.
        cache: where to look.
        key: of the traced program, see :func:`cp_convert.cache.fingerprint.program_key`.
        clock: times the stages.

    Raises:
        CannotShard, CannotLower: see :func:`.decompose`.
    """
    found = None if key is None else _recalled(source, cache, key)
    if found is not None:
        return found
    with clock.stage("decompose"):
        dense = _without_lent(source, trace, decompose(trace.program, table))
    frozen = {constant.name: repr(constant.value) for constant in trace.program.frozen}
    hashed = {constant.name: digest_of(constant.value) for constant in trace.program.frozen}
    digests = {name: digest for name, digest in hashed.items() if digest is not None}
    program = trace.program
    signature = Signature(
        dict(program.parameters), frozen, digests, trace.applied, program.returned
    )
    if key is not None:
        # What has no name to be found by again is decomposed every time.
        with clock.stage("keep"), suppress(CannotLower), cache.store("traces", key) as folder:
            write(Captured(dense, signature), folder)
    return Captured(dense, signature)


def write(captured: Captured, folder: Path) -> None:
    """Write the program, without parameters' numbers, for :func:`captured_in`.

    Raises:
        CannotLower: it has a value that no file can hold.
    """
    pack(captured.dense, described=captured.dense.state).write(folder / _PROGRAM)
    (folder / _SIGNATURE).write_bytes(msgspec.json.encode(captured.signature))


def captured_in(folder: Path, source: Source) -> Captured:
    """What :func:`write` wrote there, with the parameters of ``source``."""
    signature = msgspec.json.decode((folder / _SIGNATURE).read_bytes(), type=Signature)
    held = dict(source.module.named_parameters(remove_duplicate=False))
    dense = unpack(read_packed(folder / _PROGRAM))
    state = {node: held[signature.parameters[node]].detach() for node in dense.state}
    return Captured(replace(dense, state=state), signature)


def _without_lent(source: Source, trace: Traced, dense: Lowered) -> Lowered:
    """Parameters without numbers have none again: what is computed from them fails, or is none."""
    held = dict(source.module.named_parameters(remove_duplicate=False))
    named = trace.program.parameters
    empty = {n: held[named[n]].detach() for n in dense.state if held[named[n]].is_meta}
    return replace(dense, state={**dense.state, **empty})


def _recalled(source: Source, cache: Cache, key: str) -> Captured | None:
    entry = cache.find("traces", key)
    return None if entry is None else captured_in(entry, source)
