"""Programs and networks on another device, for which torch's meta device stands in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cp_convert.backends import BACKENDS
from cp_convert.engine.build import network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import UsageError
from cp_convert.job import Job
from cp_convert.prove import measure, prove
from cp_convert.prove.device import Mover, check_device, on
from cp_convert.prove.lockstep import run
from cp_convert.prove.replay import replay
from tests.conftest import axis_of, rewritten, sharpened, tiny, tiny_inputs

META = torch.device("meta")


class MakesTensors(nn.Module):
    """Constants of its own, which name the device they are made on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.register_buffer("table", torch.arange(24.0), persistent=False)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.table[:, None] * torch.full((24, 1), 0.1, device=x.device)
        return self.inner(x, text)


def test_nothing_stays_behind() -> None:
    """On another device every operator would fail, or fall back, where a tensor was left behind."""
    stages = rewritten(sharpened(MakesTensors()), tiny_inputs(), "ring", 2, {})
    mover = Mover(META)
    moved = stages.on(mover)
    assert all(t.is_meta for t in moved.rewritten.state.values())
    assert not any(t.is_meta for t in stages.rewritten.state.values())
    shared = [moved.dense.state[n] is moved.lowered.state[n] for n in moved.dense.state]
    assert shared
    assert all(shared)
    seen: set[torch.device] = set()
    for program in (moved.dense, moved.rewritten):
        outputs = run(
            program,
            mover.tree(tiny_inputs()),
            2,
            watch=lambda node, values: seen.update(
                v.device for v in values.values if isinstance(v, Tensor)
            ),
        )
        assert outputs[1][0].shape == (2, 24, 8)
    assert seen == {META}


@pytest.mark.parametrize("strategy", ["ulysses", "allgather-kv", "ring", "stream-kv"])
def test_padding_and_masks_are_made_there(strategy: str) -> None:
    """Two ranks do not divide 23 tokens: zeros and masks of our own stand in the program."""
    inputs = tiny_inputs()
    inputs["x"] = inputs["x"][:, :23]
    stages = rewritten(tiny(), inputs, strategy, 2)
    mover = Mover(META)
    moved = stages.on(mover)
    seen: set[tuple[str, torch.device]] = set()
    run(
        moved.rewritten,
        mover.tree(inputs),
        2,
        watch=lambda node, values: seen.update(
            (node.name, v.device) for v in values.values if isinstance(v, Tensor)
        ),
    )
    assert any("full" in name for name, _ in seen)
    assert {device for _, device in seen} == {META}


@pytest.mark.engine
def test_networks_move_too() -> None:
    prepare(BACKENDS["tensorrt-rtx"])
    lowered = lower(rewritten(tiny(), tiny_inputs(), "ulysses", 2).rewritten)
    held = [network_of(specialise(lowered, rank)) for rank in range(2)]
    mover = Mover(META)
    networks = mover.networks([read_network(one.ctx.net) for one in held])
    ((first,), _) = replay(networks, mover.tree(tiny_inputs()))
    assert first.is_meta
    assert first.shape == (2, 24, 8)


def test_a_module_comes_back() -> None:
    module = tiny()
    truth = [p.clone() for p in module.parameters()]
    with on(module, torch.device("cpu")):
        assert measure(module, tiny_inputs()).is_wide
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), truth, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_whole_proof_on_a_gpu() -> None:
    device = torch.device("cuda")
    module, inputs = tiny(), tiny_inputs()
    stages = rewritten(module, inputs, "ulysses", 4)
    proof = prove(measure(module, inputs, device), inputs, stages, device=device)
    assert stages.axis == axis_of(4)
    assert proof.reference[0].is_cuda
    assert next(module.parameters()).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_missing_gpu_is_told(model_file: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="no CUDA GPU here"):
        check_device("cuda")
    with pytest.raises(UsageError, match="not one of cpu, cuda"):
        Job(model_file(), "ring", 2, Path("out"), proof_device="tpu")
