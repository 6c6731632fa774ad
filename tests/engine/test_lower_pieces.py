"""Pieces of one kind are lowered once, and are together what the whole is when it is lowered."""

from __future__ import annotations

import pytest
import torch

from cp_convert.backends import BACKENDS
from cp_convert.engine import lower_pieces as module
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.lower_pieces import lower_pieces
from cp_convert.ir.blocks import places_of
from cp_convert.ir.kinds import twins_of
from cp_convert.ir.program import Lowered, module_path, source_line
from cp_convert.ir.records import Draft, Emitted
from cp_convert.ir.split import RESIDUAL, split
from cp_convert.prove.chain import run_pieces
from cp_convert.prove.lockstep import run
from tests.ir.test_split import inputs, nodes, program

prepare(BACKENDS["tensorrt-rtx"])
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def draft(whole: Lowered, modules: tuple[str, ...] = ()) -> Draft:
    names = {node: f"weight {node}" for node in whole.state}
    pieces = split(whole, modules, places_of(BLOCKS))
    return Draft(whole, pieces, twins_of(pieces.programs, names), names)


def emitted(cut: Draft) -> Emitted:
    pieces, twins = lower_pieces(cut)
    return Emitted(cut.whole, None, "shared", cut.names, {}, pieces, twins=twins, draft=cut)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("modules", [(), ("blocks.0", "blocks.2")])
def test_the_whole_is_what_it_would_be_uncut(
    monkeypatch: pytest.MonkeyPatch, world: int, modules: tuple[str, ...]
) -> None:
    whole, lowered = program(world), list[Lowered]()

    def counted(one: Lowered) -> Lowered:
        lowered.append(one)
        return lower(one)

    monkeypatch.setattr(module, "lower", counted)
    cut = draft(whole, modules)
    one = emitted(cut)
    together, twins = one.program, one.twins
    assert len(lowered) == len({twin.of for twin in twins}) < len(twins)
    assert together.inputs == whole.inputs
    assert [one.name for one in together.outputs] == [one.name for one in whole.outputs]
    wanted = run(lower(whole), inputs(), world)
    for found in (run(together, inputs(), world), run_pieces(one.programs, inputs(), world)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    handed = {b.name for piece in one.programs[:-1] for b in piece.outputs}
    assert (RESIDUAL in handed) == bool(modules)


def test_operators_tell_of_the_block_that_they_are_of() -> None:
    whole = program(2)
    together = emitted(draft(whole)).program
    found = {path for node in nodes(together) if (path := module_path(node)).startswith("blocks.")}
    assert {f"blocks.{n}.attn.qkv" for n in range(3)} <= found
    lines = {source_line(node) for node in nodes(whole)}
    assert {source_line(node) for node in nodes(together)} <= lines


def test_every_name_is_of_a_binding_of_the_engine() -> None:
    cut = draft(program(2))
    pieces, twins = lower_pieces(cut)
    for one, twin in zip(pieces.programs, twins, strict=True):
        known = {b.name for b in (*one.inputs, *one.outputs)}
        first = {cut.names[node] for node in pieces.programs[twin.of].state}
        assert set(twin.names) >= first
        assert known <= set(twin.names.values())
