"""A block of tensor-parallel layers, to be converted for context parallelism beside that.

Every rank holds its own heads and its own share of the hidden layer (Megatron-LM, Shoeybi et al.,
arXiv:1909.08053), so ``build_model`` is called with every rank. Neighbours form a tensor-parallel
group of two; the sequence is shared by the ranks across such groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

PEERS = 2
WIDTH, HEADS, HIDDEN = 64, 4, 128
c10d = torch.ops._c10d_functional


def process_groups(world: int) -> dict[str, list[list[int]]]:
    """Which ranks the name ``tp`` means: 0 and 1, 2 and 3, and so on."""
    return {"tp": [list(range(first, first + PEERS)) for first in range(0, world, PEERS)]}


def summed(x: Tensor) -> Tensor:
    """The sum over the tensor-parallel group."""
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", "tp"))


class Block(nn.Module):
    """Attention and a feed-forward layer, of which one rank holds its share."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH // PEERS, bias=False)
        self.out = nn.Linear(WIDTH // PEERS, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN // PEERS, bias=False)
        self.down = nn.Linear(HIDDEN // PEERS, WIDTH, bias=False)
        self.leave = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, 8]`` to ``[B, S, 8]``."""
        x = self.enter(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS // PEERS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + summed(self.out(mixed))
        x = x + summed(self.down(functional.gelu(self.up(x), approximate="tanh")))
        return self.leave(x)


def full_weights() -> dict[str, Tensor]:
    """The weights of the whole block, as a checkpoint would hold them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "enter.weight": (WIDTH, 8),
        "enter.bias": (WIDTH,),
        "qkv.weight": (3, HEADS, WIDTH // HEADS, WIDTH),
        "out.weight": (WIDTH, WIDTH),
        "up.weight": (HIDDEN, WIDTH),
        "down.weight": (WIDTH, HIDDEN),
        "leave.weight": (8, WIDTH),
        "leave.bias": (8,),
    }
    return {
        name: torch.randn(shape, generator=generator) * 2 / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


_SPLIT = {"qkv.weight": 1, "out.weight": 1, "up.weight": 0, "down.weight": 1}


def build_model(rank: int) -> nn.Module:
    """The block with this rank's share of the weights."""
    shares = {
        name: value.chunk(PEERS, _SPLIT[name])[rank % PEERS] if name in _SPLIT else value
        for name, value in full_weights().items()
    }
    shares["qkv.weight"] = shares["qkv.weight"].flatten(0, 2)
    block = Block()
    block.load_state_dict(shares)
    return block


def example_inputs() -> dict[str, Tensor]:
    """64 tokens."""
    torch.manual_seed(1)
    return {"x": torch.randn(1, 64, 8)}
