"""What stands is not looked through."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from cp_convert.collecting import set_aside


@pytest.fixture(autouse=True)
def nothing_aside() -> Iterator[None]:
    """The tests' own process sets its modules aside."""
    gc.unfreeze()
    yield
    gc.freeze()


@set_aside()
def fails() -> None:
    assert gc.get_freeze_count() > 0
    raise ZeroDivisionError


def test_what_is_alive_is_set_aside_and_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.get_freeze_count() == 0


def test_what_a_caller_set_aside_stays_so() -> None:
    with set_aside():
        outer = gc.get_freeze_count()
        with set_aside():
            assert gc.get_freeze_count() == outer
        assert gc.get_freeze_count() == outer
