"""What the builder makes of the order of collectives and attentions: streams, and who waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.activations import built
from benchmarks.plans import read_plan
from cp_convert.backends import BACKENDS
from cp_convert.engine.build import prepare
from cp_convert.strategies import STRATEGIES

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("name", "collectives", "beside"),
    [("ring", 4, 3), ("stream-kv", 4, 3), ("allgather-kv", 1, 0), ("ulysses", 2, 0)],
)
def test_chunks_travel_beside_attentions(
    name: str, collectives: int, beside: int, tmp_path: Path
) -> None:
    """All of four but one, or all; what is one exchange or gather has nothing to run beside."""
    prepare(BACKENDS["tensorrt-rtx"])
    built(STRATEGIES[name], name, 4, 2048, tmp_path / "engine")
    found = read_plan(tmp_path / "engine").beside()
    own = [count for node, count in found.items() if name.replace("-", "_") in node]
    assert len(own) == collectives
    assert sum(count > 0 for count in own) in ((beside, collectives) if beside else (0,))
