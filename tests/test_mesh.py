import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_convert.errors import UsageError
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


def test_neighbours_share_weights_and_guidance_is_outermost() -> None:
    mesh = Mesh.of(8, cfg=2, tp=2)
    assert mesh.axis("tp").groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.sequence().groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.axis("cfg").groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.coordinates(6) == {"cfg": 1, "cp": 1, "tp": 0}
    assert mesh.words == "cfg=2,cp=2,tp=2"
    assert mesh.names_groups
    assert not Mesh.of(2, cfg=2).names_groups


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_coordinates_are_places_in_the_groups(cfg: int, cp: int, tp: int) -> None:
    mesh = Mesh.of(cfg * cp * tp, cfg, tp)
    for name, _ in mesh.axes:
        for group in mesh.axis(name).groups:
            assert [mesh.coordinates(rank)[name] for rank in group] == list(range(len(group)))


@pytest.mark.parametrize(
    "text", ["", "cfg", "cfg=", "cfg=0", "cfg=x", "dp=2", "cfg=2,cfg=2", "cfg=-1", "cfg=2,"]
)
def test_a_mesh_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not one of"):
        Mesh.sizes(text)
    assert Mesh.sizes("cfg=2, tp=3,cp=4") == {"cfg": 2, "tp": 3, "cp": 4}


def test_axes_that_leave_no_whole_number_of_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="does not divide the world of 4"):
        Mesh.of(4, cfg=3)
    with pytest.raises(UsageError, match="at least one"):
        Mesh.of(4, cfg=0)


def test_own_groups_stand_beside_no_other_axis() -> None:
    own = Mesh((("a", 2), ("b", 2))).axis("b")
    assert Mesh.of(4).sequence([own]).groups == ((0, 2), (1, 3))
    with pytest.raises(UsageError, match="process groups of its own"):
        Mesh.of(4, cfg=2).sequence([own])
