"""Transposed convolutions: one or two dimensions, weights inside and outside, three precisions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import build, network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import read_network
from cp_convert.engine.specialise import specialise
from cp_convert.ir.program import Lowered
from cp_convert.prove.replay import replay
from tests.conftest import table

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def upsampling(dims: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d
    module = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    x = torch.randn(1, 4, *(8,) * dims)
    return module.eval().requires_grad_(False).to(dtype), {"input": x.to(dtype)}


def lowered(module: nn.Module, inputs: dict[str, Tensor]) -> Lowered:
    return specialise(lower(decompose(trace(module, inputs, {})[0], table())), 0)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2])
def test_the_network_computes_what_torch_does(dims: int, dtype: torch.dtype, outside: bool) -> None:
    module, inputs = upsampling(dims, dtype)
    program = lowered(module, inputs)
    names = {node: f"w.{node}" for node in program.state} if outside else {}
    interpreter = network_of(program, names)
    given = inputs | {name: program.state[node] for node, name in names.items()}
    ((ours,),) = replay([read_network(interpreter.ctx.net)], given)
    theirs = module.float()(inputs["input"].float()).to(dtype)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * unit, atol=2 * unit)


def test_the_builder_takes_bfloat16(tmp_path: Path) -> None:
    program = lowered(*upsampling(1, torch.bfloat16))
    assert build(program, 0, tmp_path / "engine", ()).size
