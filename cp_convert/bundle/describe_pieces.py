"""The pieces of a program, as the manifest tells them."""

from __future__ import annotations

from ..ir.program import Binding, Lowered
from ..ir.records import Made
from . import manifest as m
from .folder import piece_folder


def pieces_entry(made: Made) -> list[m.Piece]:
    """What every rank runs one after another; nothing where that is one engine."""
    pieces, within = made.emitted.pieces, made.loaded.within
    if pieces is None:
        return []
    return [
        m.Piece(
            after=one.after,
            before=one.before,
            folder=f"{within}{piece_folder(twin.of)}",
            io=io_entries(one.program),
            weights=[twin.names[name] for name in made.emitted.names_in(one.program).values()],
            kind=None if twin.of == number else twin.of,
            names={} if twin.of == number else dict(twin.names),
        )
        for number, (one, twin) in enumerate(zip(pieces.all, made.emitted.twins, strict=True))
    ]


def step_entry(made: Made) -> m.Step | str | None:
    """What a cache over steps may skip, or why it cannot skip anything."""
    pieces = made.emitted.pieces
    if pieces is None or pieces.step is None:
        return None if pieces is None else pieces.why_not
    step = pieces.step
    streams = [m.Stream(entered=entered, left=left) for entered, left in step.streams]
    return m.Step(residual=step.residual, streams=streams, first=step.first, last=step.last)


def io_entries(program: Lowered) -> list[m.Io]:
    """What a program takes at every call, and what it returns."""
    inputs = [_io(one, "input") for one in program.inputs]
    return inputs + [_io(one, "output") for one in program.outputs]


def _io(binding: Binding, mode: str) -> m.Io:
    return m.Io(
        name=binding.name,
        mode=mode,  # type: ignore[arg-type]
        dtype=str(binding.dtype).removeprefix("torch."),
        shape=list(binding.shape),
    )
