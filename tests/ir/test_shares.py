"""Shares of parameters: every rank's part, and where it lies in the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cp_convert.ir.layout import Layout
from cp_convert.ir.selected import Selected
from cp_convert.ir.shares import Share, Shared
from cp_convert.mesh import Mesh


@given(
    st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 1),
    st.integers(1, 3),
)  # fmt: skip
def test_parts_are_of_every_segment_and_make_up_the_whole(
    size: int, parts: list[int], dim: int, other: int
) -> None:
    layout = Layout.even([size * part for part in parts], size)
    shape = [other, other]
    shape[dim] = layout.length
    whole = torch.arange(layout.length * other).reshape(shape)
    share = Share(dim, layout)
    held = [share.of(whole, member) for member in range(size)]
    assert all(tuple(part.shape) == share.shape(tuple(shape)) for part in held)
    pieces = whole.split([s.length for s in layout.segments], dim)
    for member, part in enumerate(held):
        expected = [piece.chunk(size, dim)[member] for piece in pieces]
        assert torch.equal(part, torch.cat(expected, dim))
        for most in (1, 5):
            some = list(share.pieces(whole, member, most))
            assert torch.equal(torch.cat([piece.reshape(-1) for piece in some]), part.reshape(-1))
            assert max(piece.numel() for piece in some) <= max(most, part[:1].numel())
        place = share.place(tuple(shape), member)
        if place is not None:
            first, count = place
            assert torch.equal(part.reshape(-1), whole.reshape(-1)[first : first + count])
    in_pieces = (dim == 1 and other > 1) or len(parts) > 1
    assert (share.place(tuple(shape), 0) is None) == in_pieces or size == 1


def test_ranks_at_one_place_have_one_tensor() -> None:
    axis = Mesh.of(4, tp=2).axis("tp")
    held = Shared({"w": torch.arange(8)}, {"w": Share(0, Layout.even([8], 2))}, axis)["w"]
    assert held[0] is held[2]
    assert held[1] is held[3]
    assert [part.tolist() for part in held[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nothing_is_made_to_tell_what_there_is() -> None:
    class Unread(Shared):
        def __getitem__(self, name: str) -> tuple[torch.Tensor, ...]:
            raise AssertionError(name)

    axis = Mesh.of(4, tp=2).axis("tp")
    own = Unread({"w": torch.arange(8)}, {"w": Share(0, Layout.even([8], 2))}, axis)
    some = Selected(own, {"v": "w"})
    assert ("w" in own, "v" in own) == (True, False)
    assert ("v" in some, "w" in some, list(some), len(some)) == (True, False, ["v"], 1)
    with pytest.raises(AssertionError, match="w"):
        some["v"]
    assert some.get("w") is None
