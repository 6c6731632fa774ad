"""Real classes of diffusers, small: the plans that they declare, and the ones that are found."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import zoo
from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.ir.program import Lowered
from cp_convert.ir.sharded import Sharded
from cp_convert.prove import flat_inputs
from cp_convert.prove.errors import worst
from cp_convert.prove.lockstep import run
from cp_convert.prove.measure import dense_outputs
from cp_convert.prove.replay import replay
from cp_convert.sharding.shard import shard
from cp_convert.strategies import STRATEGIES
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import axis_of, networks_of, table

PLANNED = sorted(name for name, kind in zoo.classes().items() if getattr(kind, "_cp_plan", None))
pytestmark = pytest.mark.engine

NAMED = (
    "Cosmos3OmniTransformer", "CosmosTransformer3DModel", "SD3Transformer2DModel",
    "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel", "PixArtTransformer2DModel",
    "MochiTransformer3DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel",
    "SanaVideoTransformer3DModel",
)  # fmt: skip


@cache
def dense(name: str, plan: str) -> tuple[Lowered, dict[str, Any], list[Tensor]]:
    """The whole program in core operators, its inputs, and what the model returns."""
    prepare(BACKENDS["tensorrt-rtx"])
    module, inputs = zoo.build(name), zoo.example_inputs(name)
    truth = dense_outputs(module, inputs)
    declared = module._cp_plan if plan == "declared" else {}
    traced, _ = trace(module, inputs, declared, zoo.CASES[name].freeze)
    return decompose(traced, table()), inputs, truth


def gathers(found: Sharded) -> int:
    return sum(move.kind == "gather" for move in found.moves)


def rewritten(name: str, plan: str, strategy: str, world: int) -> Lowered:
    """The program of all ranks, which computes what the model does."""
    program, inputs, truth = dense(name, plan)
    axis = axis_of(world)
    done, _ = rewrite(shard(program, axis), STRATEGIES[strategy], strategy, axis, table())
    for outputs in run(done, flat_inputs(done, inputs), world):
        assert worst(outputs, truth).max < 1e-5
    return done


def agrees(name: str, plan: str, strategy: str, world: int) -> None:
    """The program, and the networks made of it, compute what the model does."""
    _, inputs, truth = dense(name, plan)
    lowered = lower(rewritten(name, plan, strategy, world))
    for outputs in replay(networks_of(lowered, world), flat_inputs(lowered, inputs)):
        assert worst(outputs, truth).max < 1e-5


def test_all_classes_that_declare_a_plan_are_known() -> None:
    assert len(PLANNED) >= 9
    assert set(zoo.CASES) == set(zoo.classes())


def among_themselves(found: Sharded) -> int:
    """Attentions whose queries and keys are the same tokens; others may as well read whole keys."""
    return sum(queries == keys for queries, keys in found.places.values())


LONG = {
    "ChronoEditTransformer3DModel", "Flux2Transformer2DModel", "HeliosTransformer3DModel",
    "LTX2VideoTransformer3DModel", "LTXVideoTransformer3DModel", "MiniMaxH3Transformer3DModel",
}  # fmt: skip


WAYS = (("allgather-kv", 2), ("ring", 4), ("ulysses", 4))
"""Networks take five times as long as programs: a class has those of one way, the next of another.

What converters make of a class's operators is the same in all of them, and what they make of a
strategy's is looked at with every example.
"""


def turn(name: str) -> tuple[str, int]:
    return WAYS[PLANNED.index(name) % len(WAYS)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in PLANNED]
)
def test_declared_plans(name: str) -> None:
    """They convert, and the plan that is found is as good as the declared one.

    All strategies at both worlds, down to the engines: ``python -m benchmarks.models``.
    """
    for way in WAYS:
        (agrees if way == turn(name) else rewritten)(name, "declared", *way)
    own, found = (shard(dense(name, plan)[0], axis_of(4)) for plan in ("declared", "inferred"))
    assert among_themselves(found) >= among_themselves(own) > 0
    more = max(0, len(found.places) - len(own.places))  # a text's own attentions, say
    assert gathers(found) <= gathers(own) + more


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_networks_of_the_other_ways(name: str) -> None:
    for way in WAYS:
        if way != turn(name):
            agrees(name, "declared", *way)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(n, list(STRATEGIES)[i % 3], marks=[pytest.mark.slow] if i > 3 else [])
        for i, n in enumerate(NAMED)
    ],
)
def test_found_plans(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    agrees(name, "inferred", strategy, 4)
