"""Known defects of TensorRT releases and the equivalent that works, in one table. No tensorrt.

A row applies where the backend's version lies in its range; the first row wins. A collective's
lowering writes its name beside what it adds, and manifests list these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import Version


@dataclass(frozen=True)
class Workaround:
    """An operator that is lowered differently on some releases.

    Attributes:
        backend: the backend's name.
        versions: the releases that have the defect.
        operator: the ``cp::`` operator's name.
        instead: name of the lowering to use, a key of ``lowerings.LOWERINGS``.
        reason: what goes wrong otherwise.
    """

    backend: str
    versions: str
    operator: str
    instead: str
    reason: str


WORKAROUNDS: Final = (
    Workaround(
        backend="tensorrt-rtx",
        versions=">=1.6,<1.7",
        operator="all_gather",
        instead="all_gather_by_all_to_all",
        # Seen in some networks and not in others (tests/engine/test_build.py has a minimal one that
        # fails; the examples happen to build either way), so all of them take the equivalent.
        reason="an ALL_GATHER whose output reaches an attention layer can fail at build "
        "('AllGather requires world_size (> 1) to be set for shape inference'); sending the same "
        "block to every rank by ALL_TO_ALL moves the same bytes",
    ),
    *(
        Workaround(
            backend="tensorrt-rtx",
            versions=">=1.7,<1.8",
            operator=operator,
            instead=f"{operator}_of_parts_by_all_to_all",
            # Seen with 1.7.1 wherever the same engine has any collective of more ranks.
            reason="the builder takes the most ranks that any collective of the engine has for the "
            "size of each ('In op comm_allgather, expected shape [8,...] but got [4,...]'); an "
            "ALL_TO_ALL keeps its shape, and moves the same bytes",
        )
        for operator in ("all_gather", "reduce_scatter")
    ),
    Workaround(
        backend="tensorrt-rtx",
        versions=">=1.7,<1.8",
        operator="attention",
        instead="attention_of_its_own_query",
        # Seen with 1.7.1: attentions of one query over different keys, in float32 always, in
        # bfloat16 in some networks (a ring of three ranks over heads of 64) and not in others.
        reason="the builder ends by SIGSEGV where attentions share their query; a power of two on "
        "the query and its inverse on the keys change no number of float32 and bfloat16",
    ),
    Workaround(
        backend="tensorrt-rtx",
        versions=">=1.7,<1.8",
        operator="broadcast",
        instead="broadcast_in_float16",
        reason="collectives with a root are refused in bfloat16 ('TRT does not support BF16 "
        "asymmetric DistCollective ops'); float16, scaled by the largest number's power of two, "
        "holds every such number down to 2**-30 of the largest, in the same bytes",
    ),
    *(
        Workaround(
            backend="tensorrt-rtx",
            versions=">=1.7,<1.8",
            operator=operator,
            instead=f"{operator}_in_float32",
            reason="collectives with a root are refused in bfloat16 ('TRT does not support BF16 "
            "asymmetric DistCollective ops'); float32 holds every such number, at twice the bytes",
        )
        for operator in ("reduce", "gather", "scatter")
    ),
)


def active(backend: str, version: str) -> dict[str, Workaround]:
    """The workarounds for one backend release, by operator."""
    release = Version(version)
    found: dict[str, Workaround] = {}
    for row in WORKAROUNDS:
        if row.backend == backend and SpecifierSet(row.versions).contains(release):
            found.setdefault(row.operator, row)
    return found
