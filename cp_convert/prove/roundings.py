"""The dense model under other roundings that are just as valid, for how far apart they lie.

One run in half precision is one draw: where outputs are few or the loss is small, another order of
the same sums may lose twice as much, and be as right. Monte Carlo arithmetic (D. S. Parker, 1997)
draws more of them: every operator is computed in float32, and its result rounded at random to one
of its two neighbours, the nearer one being likelier. What is exact stays exact. Rounding at random
has twice the variance of rounding to nearest (1/6 and 1/12 of a step's square, on average), so the
errors that are found are divided by the root of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir.program import HALF, with_dtypes
from ..ir.proof import Error
from .errors import worst
from .lockstep import widened

DRAWS: Final = 3
"""How many roundings are drawn beside the one to nearest."""
LARGE: Final = 1 << 30
"""Bytes of parameters from which on none is drawn: a run takes long, and a large model's outputs
are so many that the first draw already shows their spread."""


def spread(
    dense: Callable[[], Sequence[Tensor]], reference: Sequence[Tensor], nbytes: int
) -> tuple[Error, ...]:
    """The dense model's errors under drawn roundings, as of rounding to nearest; finite ones only.

    Args:
        dense: runs the model in the job's precision.
        reference: what its errors are relative to.
        nbytes: size of its parameters.
    """
    found = []
    for seed in range(0 if nbytes >= LARGE else DRAWS):
        with RandomRounding(seed):
            found.append(worst(dense(), reference))
    scale = math.sqrt(2)
    return tuple(Error(e.max / scale, e.rms / scale) for e in found if math.isfinite(e.max))


def unit(outputs: Iterable[Tensor]) -> float:
    """The largest relative error of rounding an output to its type once; 0 for float32."""
    return max((torch.finfo(t.dtype).eps / 2 for t in outputs if t.dtype in HALF), default=0.0)


class RandomRounding(TorchDispatchMode):
    """Half-precision results rounded at random, without bias; the same for the same ``seed``."""

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` in float32 where it would give half precision, and round at random."""
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        halves = [leaf.dtype for leaf in given if isinstance(leaf, Tensor) and leaf.dtype in HALF]
        asked = [leaf for leaf in given if isinstance(leaf, torch.dtype) and leaf in HALF]
        if not (halves or asked) or (not asked and _is_promoted(given)) or not _is_computed(func):
            return func(*args, **kwargs)
        wide = with_dtypes((args, kwargs), dict.fromkeys(HALF, torch.float32))
        args, kwargs = pytree.tree_map(widened, wide)
        result = func(*args, **kwargs)
        if not asked and any(isinstance(leaf, torch.dtype) for leaf in given):
            return result  # a cast to something else
        dtype = asked[0] if asked else halves[0]
        return pytree.tree_map(lambda leaf: self._rounded(leaf, dtype), result)

    def _rounded(self, leaf: Any, dtype: torch.dtype) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float32:
            return leaf
        known = torch.finfo(dtype)
        steps = 1 - int(torch.tensor(known.eps, dtype=torch.float64).log2())
        lowest = int(torch.tensor(known.tiny, dtype=torch.float64).log2()) + 1
        exponent = leaf.frexp().exponent.clamp(min=lowest)
        noise = torch.rand(leaf.shape, generator=self._generator(leaf.device), device=leaf.device)
        # Less than half a step to either side: what the type holds exactly is rounded to itself.
        moved = leaf + (noise - 0.5) * 0.999 * torch.ldexp(torch.ones_like(leaf), exponent - steps)
        return torch.where(leaf.isfinite(), moved, leaf).to(dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _is_promoted(given: Iterable[Any]) -> bool:
    """Whether something wider than half precision decides the result's type."""
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(tensor.dtype not in HALF and tensor.dim() for tensor in tensors)


def _is_computed(func: Any) -> bool:
    """Whether results are new tensors: no views, no writing in place, nothing drawn at random."""
    schema = func._schema
    aliases = any(argument.alias_info is not None for argument in schema.arguments)
    random = torch.Tag.nondeterministic_seeded in func.tags
    return not (aliases or random or schema.is_mutable)
