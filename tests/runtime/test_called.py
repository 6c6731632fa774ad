"""A stored program, compiled: it computes what it computes operator by operator."""

import pytest
import torch
from torch import Tensor, nn

from cp_convert.bundle.program import Stored
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.runtime.called import Kind
from tests.conftest import table


class Times(nn.Module):
    """What diffusion transformers do with the time: 3.5 times 1000 is 3504 in bfloat16."""

    def forward(self, time: Tensor) -> Tensor:
        return torch.cos((time * 1000).float() * 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_where_the_program_rounds(dtype: torch.dtype) -> None:
    time = torch.linspace(2.1, 4.9, 64).to(dtype)
    program, _ = trace(Times(), {"time": time}, {})
    stored = Stored(decompose(program, table()), {})
    out = [
        Kind(stored, 0, {}, torch.device("cpu"), compiled=compiled).call(time)[0]
        for compiled in (False, True)
    ]
    assert torch.allclose(out[0], out[1], atol=1e-6)
    wide = torch.cos(time.float() * 1000 * 0.1)
    assert not torch.allclose(out[0], wide, atol=1e-2)
