"""Which sizes of a range a program is lifted from, and at which it is proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_convert.common import shared_by
from cp_convert.errors import UsageError
from cp_convert.job import Job, Span
from cp_convert.model import preset


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("text=64:512", Span("text", 64, 512)),
        ("rows=6:40:8", Span("rows", 6, 38, 8)),  # the last size that the steps reach
        ("batch=1:2:1", Span("batch", 1, 2)),
    ],
)
def test_reading(text: str, wanted: Span) -> None:
    assert Span.read(text) == wanted
    assert Span.read(wanted.words) == wanted


@pytest.mark.parametrize(
    "text", ["", "text", "text=64", "text=64:", "text=a:b", "1=2:3", "text=1:2:3:4", "text=-1:5"]
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match="it is no NAME=FIRST:LAST"):
        Span.read(text)


@pytest.mark.parametrize("text", ["text=0:4", "text=4:4", "text=9:4", "text=1:9:0"])
def test_what_is_no_range_of_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="begins at 1 or more, and ends later"):
        Span.read(text)


def test_a_range_can_be_too_fine() -> None:
    assert len(Span.read("tokens=1:65536").values) == 65536
    with pytest.raises(UsageError, match="more than 65536 sizes"):
        Span.read("tokens=1:65537")


def test_sizes_have_padding_where_any_has() -> None:
    span = Span("text", 64, 512)
    fitted, proven = span.fitted(8), span.proven(8)
    assert all(n % 8 for n in fitted)
    assert len({n % 8 for n in fitted}) > 1  # else padding could not be told from a constant
    assert {64, 512, *fitted} == set(proven)  # the ends have none
    span = Span("text", 65, 511)
    assert [n for n in span.proven(8) if n % 8 == 0]


def test_sizes_that_ranks_divide_have_none() -> None:
    span = Span("text", 64, 512, 8)
    assert span.divides(8) and not span.divides(16)
    assert span.fitted(8)[0] == 64 and span.proven(8)[-1] == 512


def test_a_range_can_be_too_short() -> None:
    with pytest.raises(UsageError, match=r"4 sizes that 8 does not divide, .* has 3"):
        Span("text", 13, 16).fitted(8)
    with pytest.raises(UsageError, match="the range has 2"):
        Span("batch", 1, 2).fitted(1)


def job(**options: Any) -> Job:
    usual: dict[str, Any] = {"strategy": "ulysses", "world": 2, "out": Path("out"), "tiny": True}
    path = preset.path_of("flux.1-dev")
    assert path is not None
    return Job(model=path, **usual | options)


def test_two_ranks_pad_to_two_slots() -> None:
    """Else all odd lengths had one slot of padding, and one could be any number of the program."""
    span = Span("text", 9, 40)
    assert job(dynamic=span).unit == 2 and job(dynamic=span).multiple == 4
    assert job(dynamic=replace(span, first=10, step=2)).unit == 1
    assert job(dynamic=span, world=3).unit == 1
    assert job().unit == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic": Span("height", 64, 512)}, "a preset's range is of batch or text"),
        ({"texts": (16,)}, "--dynamic text=9:40 and --text"),
        ({"batches": (1, 2)}, "several --batch"),
        ({"resolutions": ("1024x1024", "1360x768")}, "several --resolution"),
        ({"quantize": "int8"}, "--quantize int8"),
        ({"exchange": "int8"}, "--exchange int8"),
        ({"cfg": 2}, "--mesh cfg=2"),
        ({"strategy": "auto"}, "--strategy auto"),
        ({"strategy": "usp", "ulysses": 2}, "--strategy usp"),
        ({"split_after": ("transformer_blocks.0",)}, "--split-after"),
    ],
)
def test_what_a_range_does_not_go_with(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        job(**{"dynamic": Span("text", 9, 40), "world": 4} | options)
    assert words in refused.value.message
    alone = options.keys() & {"quantize", "cfg"}  # variants do not go with these either
    assert ("a bundle for each size" if alone else "variants") in str(refused.value.hint)


def test_jobs_of_other_worlds_trace_a_range_at_other_sizes() -> None:
    span = Span("text", 9, 40)
    same, other = (shared_by(job(dynamic=span, world=world)) for world in (3, 4))
    assert same == shared_by(job(dynamic=span, world=3, strategy="ring")) != other
    assert shared_by(job(world=3)) == shared_by(job(world=4))


def test_one_of_what_is_not_the_size_is_taken() -> None:
    found = job(dynamic=Span("text", 9, 40), batches=(2,), resolutions=("1360x768",)).shapes
    assert {(one.batch, one.resolution) for one in found} == {(2, "1360x768")}
    assert [one.text for one in found] == [one.size for one in found]
    assert found[0].size == 40  # whose record the bundle's is
