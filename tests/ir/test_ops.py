"""The meaning of every cp:: operator against definitions written another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_convert.ir import ops
from cp_convert.mesh import Mesh

worlds = st.integers(1, 5)


def values(world: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(world)]


def on_all(name: str, xs: list[torch.Tensor], *args: object) -> list[torch.Tensor]:
    target = getattr(torch.ops.cp, name).default
    world = len(xs)
    results = ops.on_all_ranks(target, xs, [*args, list(range(world)), world])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = target(mode.from_tensor(xs[0]), *args, list(range(world)), world)
    assert all(result.shape == fake.shape and result.dtype == fake.dtype for result in results)
    return results


@given(worlds, st.integers(1, 3))
@settings(max_examples=20)
def test_shard_then_gather_is_the_identity(world: int, length: int) -> None:
    x = torch.randn(length * world, 2)
    parts = on_all("shard", [x] * world, 0)
    assert all(torch.equal(p, x[i * length : (i + 1) * length]) for i, p in enumerate(parts))
    assert all(torch.equal(y, x) for y in on_all("all_gather", parts))


@given(worlds)
@settings(max_examples=20)
def test_all_to_all_is_a_transpose_of_blocks(world: int) -> None:
    xs = values(world, 2 * world, 3)
    sent = torch.stack(xs).unflatten(1, (world, 2))
    received = torch.stack(on_all("all_to_all", xs)).unflatten(1, (world, 2))
    assert torch.equal(received, sent.transpose(0, 1))
    assert torch.equal(torch.stack(on_all("all_to_all", on_all("all_to_all", xs))), torch.stack(xs))


@given(worlds, st.data())
@settings(max_examples=20)
def test_broadcast_is_the_roots_value(world: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, world - 1))
    xs = values(world, 2, 3)
    assert all(torch.equal(y, xs[root]) for y in on_all("broadcast", xs, root))


def test_groups_do_not_mix() -> None:
    axis = Mesh((("ring", 2), ("ulysses", 2))).axis("ring")
    xs = values(4, 2)
    gathered = ops.on_all_ranks(torch.ops.cp.all_gather.default, xs, [axis.flat, axis.size])
    assert torch.equal(gathered[0], torch.cat((xs[0], xs[2])))
    assert torch.equal(gathered[3], torch.cat((xs[1], xs[3])))
    sent = ops.on_all_ranks(torch.ops.cp.broadcast.default, xs, [1, axis.flat, axis.size])
    assert [next(r for r in range(4) if y is xs[r]) for y in sent] == [2, 3, 2, 3]


def test_one_rank_alone_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        ops.all_gather(torch.ones(2), Mesh.line(2).whole)


@given(st.integers(2, 5), st.sampled_from(["sum", "prod", "max", "min", "avg"]), st.data())
@settings(max_examples=30)
def test_reductions_agree_with_numpy(world: int, kind: str, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, world - 1))
    xs = values(world, 2 * world, 3)
    reduce = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min, "avg": np.mean}[kind]
    truth = torch.from_numpy(reduce(np.stack([x.numpy() for x in xs]), axis=0))
    for y in on_all("all_reduce", xs, kind):
        torch.testing.assert_close(y, truth)
    scattered = torch.cat(on_all("reduce_scatter", xs, kind))
    torch.testing.assert_close(scattered, truth)
    for rank, y in enumerate(on_all("reduce", xs, kind, root)):
        if rank == root:
            torch.testing.assert_close(y, truth)
        else:
            assert y.isnan().all()


@given(worlds, st.data())
@settings(max_examples=20)
def test_gather_to_a_root_and_scatter_from_it(world: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, world - 1))
    xs = values(world, 2, 3)
    gathered = on_all("gather", xs, root)
    assert torch.equal(gathered[root], torch.cat(xs))
    assert all(y.isnan().all() for rank, y in enumerate(gathered) if rank != root)
    assert all(
        torch.equal(a, b) for a, b in zip(on_all("scatter", gathered, root), xs, strict=True)
    )
