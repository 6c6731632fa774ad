"""Lines of a plan that do not fit: module, argument, dimension and the line are named."""

from collections.abc import Mapping
from typing import Any

import pytest

from cp_convert import ContextParallelInput as Split
from cp_convert import ContextParallelOutput as Gather
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotShard
from tests.conftest import tiny, tiny_inputs


@pytest.mark.parametrize(
    ("plan", "message", "where"),
    [
        ({"entr": {"input": Split(1)}}, "a module 'entr'", "cp_plan['entr']"),
        ({"enter": {"inptu": Split(1)}}, "inptu of enter, and Linear", "cp_plan['enter']['inptu']"),
        ({"enter": {"input": Split(7)}}, "along dimension 7.*24, 8", "cp_plan['enter']['input']"),
        ({"enter": {"input": Split(-4)}}, "along dimension -4", "cp_plan['enter']['input']"),
        ({"enter": {"input": Split(4, 3)}}, "split_dim 4 does not exist", "cp_plan['enter']['in"),
        ({"enter": {"input": Gather(1)}}, "no integer split_dim", "cp_plan['enter']['input']"),
        ({"leave": Split(1)}, "no integer gather_dim", "cp_plan['leave']"),
        ({"leave": [None, Gather(1)]}, "leave, which has 1 tensor", "cp_plan['leave'][1]"),
        ({"enter": {"input": Split(1, None, True)}}, "with|calls it 'input'", "cp_plan['enter']"),
        ({1: Gather(1)}, "no module name", "cp_plan"),
    ],
)
def test_a_line_that_does_not_fit(plan: Mapping[str, Any], message: str, where: str) -> None:
    plan = {"enter": {"input": Split(1)}, **plan}
    with pytest.raises(CannotShard, match=message) as caught:
        trace(tiny(), tiny_inputs(), plan)
    assert (caught.value.where or "").startswith(where)
