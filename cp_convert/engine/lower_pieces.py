"""Pieces of a program in the operators that have converters: one of every kind is lowered.

The others are the same operators on other bindings, so FLUX's 57 blocks are two to be lowered.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.kinds import Twin, through
from ..ir.program import Lowered, names_in
from ..ir.records import Draft
from ..ir.split import Pieces
from .lower import lower


def lower_pieces(draft: Draft) -> tuple[Pieces, tuple[Twin, ...]]:
    """All pieces lowered, and whose engine each of them runs.

    Raises:
        CannotLower: see :func:`.lower.lower`.
    """
    pieces, names = draft.pieces, draft.names
    firsts = {n: lower(pieces.all[n].program) for n in dict.fromkeys(t.of for t in draft.twins)}
    twins = tuple(_bound(twin, firsts[twin.of], draft) for twin in draft.twins)
    own = zip(pieces.all, twins, strict=True)
    lowered = tuple(
        replace(one, program=through(firsts[twin.of], names, twin, draft.whole))
        for one, twin in own
    )
    return replace(pieces, all=lowered), twins


def _bound(twin: Twin, built: Lowered, draft: Draft) -> Twin:
    """The same with the bindings that are left."""
    known = {one.name for one in (*built.inputs, *built.outputs)}
    known |= set(names_in(built, draft.names).values())
    return replace(twin, names={n: own for n, own in twin.names.items() if n in known})
