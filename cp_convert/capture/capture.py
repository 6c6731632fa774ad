"""A model as a dense program of core operators: traced and decomposed, or found in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import msgspec

from ..cache.store import Cache
from ..errors import CannotLower
from ..ir.records import Captured
from ..ir.serialize import pack, read_packed, unpack
from ..ir.signature import Signature
from ..ir.source import Source
from ..progress import Clock
from .decompose import decompose
from .trace import trace

_PROGRAM: Final = "program.safetensors"
_SIGNATURE: Final = "signature.json"


def capture(
    source: Source, table: Mapping[Any, Any], cache: Cache, key: str | None, clock: Clock
) -> Captured:
    """Trace and decompose, unless the cache knows the result by ``key``.

    Raises:
        CannotTrace, CannotShard, CannotLower: see :func:`.trace.trace`, :func:`.decompose`.
    """
    if key is not None:
        with clock.stage("recall"):
            found = _recalled(source, cache, key)
        if found is not None:
            return found
    with clock.stage("trace"):
        traced, applied = trace(
            source.module,
            source.inputs,
            source.plan,
            source.freeze,
            peers=source.peers,
            groups=source.groups,
        )
    with clock.stage("decompose"):
        dense = decompose(traced, table)
    frozen = {constant.name: repr(constant.value) for constant in traced.frozen}
    signature = Signature(dict(traced.parameters), frozen, applied)
    if key is not None:
        # What has no name to be found by again is traced every time.
        with clock.stage("keep"), suppress(CannotLower), cache.store("traces", key) as folder:
            pack(dense, described=dense.state).write(folder / _PROGRAM)
            (folder / _SIGNATURE).write_bytes(msgspec.json.encode(signature))
    return Captured(dense, signature)


def _recalled(source: Source, cache: Cache, key: str) -> Captured | None:
    entry = cache.find("traces", key)
    if entry is None:
        return None
    signature = msgspec.json.decode((entry / _SIGNATURE).read_bytes(), type=Signature)
    held = dict(source.module.named_parameters(remove_duplicate=False))
    dense = unpack(read_packed(entry / _PROGRAM))
    state = {node: held[signature.parameters[node]].detach() for node in dense.state}
    return Captured(replace(dense, state=state), signature)
