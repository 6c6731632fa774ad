import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_convert.mesh import Mesh, split_groups

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(sizes)
def test_every_axis_partitions_the_ranks(lengths: list[int]) -> None:
    mesh = Mesh(tuple((f"a{i}", n) for i, n in enumerate(lengths)))
    for name, size in mesh.axes:
        axis = mesh.axis(name)
        assert axis.size == size
        assert sorted(axis.flat) == list(mesh.ranks)
        assert tuple(split_groups(axis.flat, axis.size)) == axis.groups


@given(sizes)
def test_axes_together_reach_every_rank_once(lengths: list[int]) -> None:
    mesh = Mesh(tuple((f"a{i}", n) for i, n in enumerate(lengths)))
    reached = [0]
    for name, _ in mesh.axes:
        axis = mesh.axis(name)
        reached = [peer for rank in reached for g in axis.groups if rank in g for peer in g]
    assert sorted(reached) == list(mesh.ranks)


def test_the_last_axis_varies_fastest() -> None:
    mesh = Mesh((("ring", 2), ("ulysses", 4)))
    assert mesh.axis("ulysses").groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert mesh.axis("ring").groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.whole.groups == (tuple(range(8)),)


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(KeyError, match="no axis 'tp' in mesh"):
        Mesh.line(2).axis("tp")
