"""Token order and padding, by hypothesis against a plain list of tokens."""

from hypothesis import given
from hypothesis import strategies as st

from cp_convert.ir.layout import Layout

layouts = st.builds(
    Layout.even, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 8)
)


def parts(layout: Layout) -> list[list[int | None]]:
    """What every rank holds, slot by slot; ``None`` is padding."""
    held: list[list[int | None]] = [[] for _ in range(layout.size)]
    begin = 0
    for segment in layout.segments:
        tokens: list[int | None] = list(range(begin, begin + segment.length))
        tokens += [None] * (layout.size * segment.local - segment.length)
        for rank in range(layout.size):
            held[rank] += tokens[rank * segment.local : (rank + 1) * segment.local]
        begin += segment.length
    return held


def spread(ranges: list[tuple[int, int]]) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


@given(layouts)
def test_slots_tokens_and_order_agree_with_the_parts(layout: Layout) -> None:
    held = parts(layout)
    joined = [token for part in held for token in part]
    assert len(held[0]) == layout.local
    assert joined.count(None) == layout.padding
    assert spread(layout.order) == [t for t in joined if t is not None]
    assert spread(layout.slots) == [i for i, t in enumerate(joined) if t is not None]
    for rank, part in enumerate(held):
        assert spread(layout.tokens_of(rank)) == [t for t in part if t is not None]
        assert spread(layout.slots_of(rank)) == [i for i, t in enumerate(part) if t is not None]


@given(layouts)
def test_plain_means_the_models_own_order(layout: Layout) -> None:
    joined = [token for part in parts(layout) for token in part]
    if layout.is_plain:
        assert joined == list(range(layout.length))


@given(layouts, st.data())
def test_a_range_of_segments_is_a_layout_of_its_own(layout: Layout, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.sampled_from(layout.cuts)] * 2)))
    found = layout.between(start, stop)
    if start == stop:
        assert found is None
        return
    assert found is not None
    part, begin = found
    for whole, own in zip(parts(layout), parts(part), strict=True):
        moved = [None if token is None else token + start for token in own]
        assert whole[begin : begin + part.local] == moved


def test_a_range_that_cuts_a_segment_is_none() -> None:
    assert Layout.even([4, 8], 2).between(2, 12) is None


def test_scaling_is_exact_or_refused() -> None:
    assert Layout.even([6], 2).scaled(4, 1) == Layout.even([24], 2)
    assert Layout.even([24], 2).scaled(1, 4) == Layout.even([6], 2)
    assert Layout.even([6], 2).scaled(1, 4) is None
    assert Layout.even([6], 4).scaled(1, 2) == Layout.even([3], 4)
