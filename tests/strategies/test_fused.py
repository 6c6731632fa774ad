"""TensorRT's own multi-device attention: proven down to the network, refused where it is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cp_convert.backends import BACKENDS
from cp_convert.engine.build import network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import BackendMissing, ProofFailed, UsageError
from cp_convert.job import Job
from cp_convert.mesh import Axis
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import measure, prove, prove_networks
from cp_convert.prove.measure import flat_inputs
from cp_convert.strategies import choose
from cp_convert.trt import offline
from tests.conftest import axis_of, rewritten, tiny, tiny_inputs
from tests.strategies.test_strategies import site_of

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_program_and_networks_are_proven(world: int) -> None:
    module = tiny()
    cast_module(module, torch.bfloat16)
    inputs = cast_inputs(tiny_inputs(), torch.bfloat16)
    stages = rewritten(module, inputs, "fused", world)
    proof = prove(measure(module, inputs), inputs, stages)
    lowered = lower(stages.rewritten)
    held = [network_of(specialise(lowered, rank)) for rank in range(world)]
    networks = [read_network(one.ctx.net) for one in held]
    fused = [x for x in networks[0].layers if x.parameters.get("num_ranks", 1) == world]
    assert [x.kind for x in fused if x.kind != "DIST_COLLECTIVE"] == ["ATTENTION_INPUT"]
    prove_networks(networks, flat_inputs(lowered, inputs), proof, lowered)


def test_ranks_that_are_left_out_are_noticed() -> None:
    module, inputs = tiny(), tiny_inputs()
    stages = rewritten(module, inputs, "fused", 2)
    proof = prove(measure(module, inputs), inputs, stages)
    for node in stages.rewritten.graph_module.graph.nodes:
        if node.target is torch.ops.cp.fused_attention.default:
            node.args = (*node.args[:-2], [0, 1], 1)
    lowered = lower(stages.rewritten)
    held = [network_of(specialise(lowered, rank)) for rank in range(2)]
    networks = [read_network(one.ctx.net) for one in held]
    with pytest.raises(ProofFailed, match="go astray"):
        prove_networks(networks, flat_inputs(lowered, inputs), proof, stages.dense)


def test_masks_padding_and_groups_are_refused() -> None:
    fused, axis = choose("fused"), axis_of(2)
    assert fused.why_not(site_of(2), axis) is None
    refusals = [
        fused.why_not(site_of(2, mask=(1, 1, 8, 8)), axis),
        fused.why_not(site_of(2, causal=True), axis),
        fused.why_not(site_of(2), Axis("cp", ((0, 2), (1, 3)))),
    ]
    assert all(refusal is not None and refusal.hint for refusal in refusals)


def test_what_cannot_have_it_is_refused(
    model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendMissing, match="tensorrt-rtx has no multi-device attention"):
        prepare(BACKENDS["tensorrt-rtx"], fused=True)
    with pytest.raises(UsageError, match="FP16 and BF16"):
        Job(model_file(), "fused", 2, Path("out"), precision="fp32")
    monkeypatch.setattr(offline, "has_driver", lambda: True)
    monkeypatch.setattr(offline, "capability", lambda: (9, 0))
    with pytest.raises(BackendMissing, match=r"this GPU has 9\.0"):
        prepare(BACKENDS["tensorrt"], fused=True)
