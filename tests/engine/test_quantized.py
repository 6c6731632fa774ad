"""Engines with quantizers: what is built is read out of the engine, for building proves nothing."""

from pathlib import Path

import pytest

from cp_convert.backends import BACKENDS
from cp_convert.engine.build import build, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.specialise import specialise
from cp_convert.job import STRATEGY_NAMES
from tests.conftest import rewritten, tiny, tiny_inputs
from tests.engine.plans import Plan, read_plan

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])


def exchanging(name: str, world: int, eight: str, path: Path) -> Plan:
    inputs = {key: x.bfloat16() for key, x in tiny_inputs(1).items()}
    stages = rewritten(tiny().bfloat16(), inputs, name, world, eight=eight)
    build(specialise(lower(stages.rewritten), 0), 0, path, ["8.0", "8.9", "12.0"])
    return read_plan(path)


@pytest.mark.parametrize(
    ("name", "kind", "codes"),
    [
        ("ulysses", "all_to_all", 2),
        ("ring", "broadcast", 4),
        ("allgather-kv", "all_gather", 1),
        pytest.param("stream-kv", "all_gather", 4, marks=pytest.mark.slow),
        pytest.param("usp", "all_to_all", 3, marks=pytest.mark.slow),
    ],
)
def test_what_is_built_exchanges_int8(name: str, kind: str, codes: int, tmp_path: Path) -> None:
    assert name in STRATEGY_NAMES
    plan = exchanging(name, 4, "qkvo", tmp_path / "engine")
    assert plan.sent(kind).count("int8") == codes
    plain = exchanging(name, 4, "", tmp_path / "plain")
    assert "int8" not in plain.sent(kind)


def test_only_what_is_asked_for_is_codes(tmp_path: Path) -> None:
    plan = exchanging("ulysses", 2, "kv", tmp_path / "engine")
    assert sorted(plan.sent("all_to_all")) == ["bf16", "bf16", "bf16", "int8"]
