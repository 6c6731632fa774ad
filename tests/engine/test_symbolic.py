"""A lifted program as a network with shapes as tensors: all ranks, replayed at every size."""

from __future__ import annotations

from operator import getitem

import pytest
import torch
from torch import fx, nn

from cp_convert.backends import select
from cp_convert.engine.build import network_of, prepare
from cp_convert.engine.readback import read_network
from cp_convert.engine.symbolic import symbolic
from cp_convert.errors import CannotLower
from cp_convert.ir.lift import Range, lift
from cp_convert.ir.writer import Writer
from cp_convert.prove.replay import replay
from tests.ir.test_lift import SIZES, THIRDS, program

aten, cp = torch.ops.aten, torch.ops.cp
GROUPS = ([0, 1, 2], 3)


def spread(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    """Rows padded, split over three ranks, repeated, gathered, and without their padding."""
    slots = -(-n // 3)
    zeros = write.op(aten.full.default, [3 * slots - n, 2], 0, dtype=torch.float32)
    whole = write.op(aten.cat.default, [x, zeros], 0)
    own = write.op(cp.shard.default, whole, 0, *GROUPS)
    twice = write.op(aten.expand.default, write.op(aten.unsqueeze.default, own, 0), [2, slots, 2])
    first, second = (write.op(aten.select.int, twice, 0, i) for i in range(2))
    added = write.op(aten.add.Tensor, first, second)
    joined = write.op(cp.all_gather.default, added, *GROUPS)
    parts = write.op(aten.view.default, joined, [3, slots, 2])
    flat = write.op(aten.view.default, parts, [3 * slots, 2])
    real = write.op(aten.slice.Tensor, flat, 0, 0, n)
    half = write.op(aten.split_with_sizes.default, real, [2, n - 2], 0)
    one, two = (write.graph.call_function(getitem, (half, i)) for i in range(2))
    one.meta["val"], two.meta["val"] = half.meta["val"]
    back = write.op(aten.cat.default, [one, two], 0)
    return write.op(cp.result.default, back)


def test_ranks_networks_are_the_programs_at_every_size() -> None:
    prepare(select("auto"))
    packed = lift({n: program(n, spread) for n in SIZES}, Range("n", 4, 11, 1, (THIRDS,)))
    made = [network_of(symbolic(packed, rank)) for rank in range(3)]
    networks = [read_network(one.ctx.net) for one in made]
    assert networks[0].inputs[0].shape == (-1, 2)
    (name,) = [one.name for one in networks[0].inputs]
    for n in range(4, 12):
        x = torch.randn(n, 2)
        for (own,) in replay(networks, {name: x}):
            assert torch.equal(own, 2 * x)


def test_what_follows_the_size_and_is_not_known() -> None:
    def rolled(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
        return write.op(aten.narrow_copy.default, x, 0, 0, n - 1)

    packed = lift({n: program(n, rolled) for n in SIZES}, Range("n", 4, 11, 1, (THIRDS,)))
    with pytest.raises(CannotLower, match=r"narrow_copy.* follows the size"):
        symbolic(packed, 0)
