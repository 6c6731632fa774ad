"""Where a program is cut so that equal blocks are pieces of one kind.

The paths of modules with attentions come in, cuts go out: behind every block, and before the first
of a list of blocks. A block is the outermost numbered module around an attention:
``transformer_blocks.3`` of ``transformer_blocks.3.attn``. Where the program is not narrow behind
one (a residual over several blocks, two streams of blocks beside one another) it is not cut there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..errors import UsageError
from .cuts import Cut, Place, Wiring, check_narrow, cut_before, cut_of, is_end


def blocks_of(modules: Sequence[str]) -> list[str]:
    """The blocks around modules, each once, in their order."""
    found: dict[str, None] = {}
    for path in modules:
        names = path.split(".")
        number = next((i for i, name in enumerate(names) if i and name.isdecimal()), None)
        if number is not None:
            found[".".join(names[: number + 1])] = None
    return list(found)


def places_of(blocks: Sequence[str]) -> list[Place]:
    """Behind every block, and before the first of every list."""
    firsts: dict[str, str] = {}
    for block in blocks:
        firsts.setdefault(block.rpartition(".")[0], block)
    found = []
    for block in blocks:
        if block in firsts.values():
            found.append(Place(block, enters=True))
        found.append(Place(block))
    return found


def cuts_between(wiring: Wiring, named: Sequence[Cut], places: Sequence[Place]) -> list[Cut]:
    """The cuts that are named, and those of ``places`` that go with them, in their order.

    Args:
        wiring: of the program.
        named: in their order; they are all among the result.
        places: where the program may be cut; it is where it is narrow.
    """
    known = {cut.place for cut in named}
    others = [place for place in places if place not in known]
    offered = [*named, *(cut for place in others for cut in _narrow(wiring, place))]
    offered.sort(key=lambda cut: (len(cut.before), cut.place not in known))
    taken: list[Cut] = []
    for number, cut in enumerate(offered):
        if cut.place in known:
            taken.append(cut)
            continue
        later = next((one for one in offered[number:] if one.place in known), None)
        follows = not taken or taken[-1].before < cut.before
        precedes = later is None or cut.before < later.before
        if cut.before and follows and precedes and not is_end(cut, wiring):
            taken.append(cut)
    return taken


def _narrow(wiring: Wiring, place: Place) -> Iterator[Cut]:
    """The cut at ``place``, if it can be made there."""
    with suppress(UsageError):
        cut = (cut_before if place.enters else cut_of)(wiring, place.module)
        check_narrow(cut, wiring)
        yield cut
