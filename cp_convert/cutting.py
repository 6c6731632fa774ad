"""A program in pieces, and which of them one engine serves; nothing of it is lowered yet.

The program of all ranks comes in, and what was asked for; its pieces go out, each with the number
of the one whose engine it runs. Nothing where every rank has one engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import CannotShard
from .ir.blocks import blocks_of, places_of
from .ir.cuts import Place
from .ir.kinds import Twin, twins_of
from .ir.program import Lowered
from .ir.records import Draft, Rewritten
from .ir.split import Pieces, split
from .job import BLOCKS


def in_pieces(rewritten: Rewritten, program: Lowered, names: Mapping[str, str]) -> Draft | None:
    """The pieces that ``program`` is cut into, and their kinds; ``None`` where it stays whole.

    Args:
        rewritten: knows what was asked for, and where attentions are.
        program: the same program, its weights folded.
        names: by placeholder, the binding of a weight that is an engine's input.

    Raises:
        UsageError: it cannot be cut where that is asked for.
        CannotShard: it has no blocks that could share an engine.
    """
    job, places = rewritten.job, list[Place]()
    if job.layout == BLOCKS:
        places = places_of(blocks_of([one.site.module for one in rewritten.outcomes]))
    if not job.split_after and not places:
        if job.layout == BLOCKS:
            raise _no_blocks()
        return None
    pieces = split(program, job.split_after, places)
    twins = twins_of(pieces.programs, names)
    if job.layout == BLOCKS:
        _check_kinds(pieces, twins)
    return Draft(program, pieces, twins, names)


def _check_kinds(pieces: Pieces, twins: Sequence[Twin]) -> None:
    """Refuse what has no two blocks that one engine could serve."""
    if len(pieces.all) == 1:
        raise _no_blocks()
    if len({twin.of for twin in twins}) == len(twins):
        raise CannotShard(
            f"--layout blocks: no two of the {len(twins)} pieces are equal but for their weights, "
            "so that no engine could serve several.",
            hint="--layout shared or per-rank: one engine of the whole.",
        )


def _no_blocks() -> CannotShard:
    return CannotShard(
        "--layout blocks: the program has no numbered blocks with attentions behind which it is "
        "narrow.",
        hint="--layout shared; --split-after MODULE where there should be several engines.",
    )
