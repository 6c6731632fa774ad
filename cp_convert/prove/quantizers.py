"""The proof of a program with quantizers, whose rounding is too coarse to compare with. ADR 22.

A difference of one part in a million may put a number beside the code that its twin has, a step of
a whole percent; and so two programs that mean the same may differ by more than a mistake would.
So what quantizers do is taken apart:

- *Unrounded*: a quantizer divides and multiplies by its scale, and leaves the rounding out. All
  ranks must then agree with the dense model to ``1e-5``, as without quantizers. What is moved to
  the wrong place, or measured by the scale of another, shows here.
- *Rounded*: quantizers as they are, in float32 arithmetic, against the dense program with the same
  quantizers. Codes may flip where a number lies within ``1e-5`` of a tie; how many do, and what
  that does to the output, is measured by flipping them in the dense program (*Nudged*).
- *Loss*: that dense program against the model without quantizers. No proof: what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ProofFailed
from ..ir import attention8, nvfp4
from ..ir.ops import ATTENTION
from ..ir.program import Executable
from ..ir.proof import FLOOR, Codes, Error
from ..ir.quantize import (
    FP8,
    QUANTIZE,
    QUANTIZE_DEQUANTIZE,
    from_codes,
    scaled,
    to_codes,
)
from .bounds import MARGIN
from .errors import worst
from .lockstep import run
from .measure import Truth, rounded

DRAWS: Final = 2
"""How often ties are drawn."""


class Unrounded(TorchDispatchMode):
    """Quantizers that keep their scale and do not round: codes are numbers in float32."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, a quantizer without its rounding."""
        if func is QUANTIZE:
            return scaled(args[0], args[1])
        if func is QUANTIZE_DEQUANTIZE:
            return from_codes(scaled(args[0], args[1]), args[1], _type_of(args))
        if func is nvfp4.QUANTIZE_BLOCKS:
            return nvfp4.ratios(*args, rounded=False)
        if func is nvfp4.QUANTIZE_DEQUANTIZE_BLOCKS:
            both = nvfp4.ratios(*args[:2], rounded=False)
            return nvfp4.times_blocks(*both, args[1], _type_of(args, 2))
        if func is ATTENTION and kwargs and kwargs.get("steps"):
            return attention8.attention(*args, **kwargs, coding=_Scaled())
        return func(*args, **(kwargs or {}))


def _type_of(args: Any, place: int = 3) -> torch.dtype:
    """What ``cp::quantize_dequantize`` returns, given its arguments, ``to`` among them."""
    given = args[place] if len(args) > place else None
    to: torch.dtype = args[0].dtype if given is None else given
    return to


@contextmanager
def unrounded(wanted: bool) -> Iterator[None]:
    """:class:`Unrounded`, where it is wanted."""
    if not wanted:
        yield
        return
    with Unrounded():
        yield


class Nudged(TorchDispatchMode):
    """Quantizers of numbers that are off by up to ``FLOOR`` of the tensor's largest, at random.

    Attributes:
        codes: how many there were.
        flipped: how many of them are others than they would have been.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.codes = self.flipped = 0
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``; a quantizer on numbers that are a little off."""
        if func is QUANTIZE:
            return self.coded(*args)
        if func is QUANTIZE_DEQUANTIZE:
            return from_codes(self.coded(*args[:3]), args[1], _type_of(args))
        if func is nvfp4.QUANTIZE_DEQUANTIZE_BLOCKS:
            return nvfp4.times_blocks(*self._blocks(*args[:2]), args[1], _type_of(args, 2))
        if func is ATTENTION and kwargs and kwargs.get("steps"):
            return attention8.attention(*args, **kwargs, coding=_Off(self))
        return func(*args, **(kwargs or {}))

    def coded(self, x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Their codes."""
        ratio = scaled(x, scale)
        return self.counted(to_codes(self.off(ratio), dtype), to_codes(ratio, dtype))

    def counted(self, nudged: Tensor, codes: Tensor) -> Tensor:
        """``nudged``, those of them counted that are not ``codes``."""
        self.codes += nudged.numel()
        self.flipped += int((nudged.float() != codes.float()).sum())
        return nudged

    def _blocks(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """NVFP4: a code is another one where its block's scale is."""
        codes, blocks = nvfp4.quantize_blocks(x, scale)
        nudged, of_nudged = nvfp4.quantize_blocks(self.off(x.float()), scale)
        others = (of_nudged.float() != blocks.float())[..., None]
        self.codes += codes.numel()
        self.flipped += int((nvfp4.in_blocks(nudged != codes) | others).sum())
        return nudged, of_nudged

    def off(self, x: Tensor) -> Tensor:
        """Numbers that are a little off."""
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        own = self._generators[x.device]
        noise = 2 * torch.rand(x.shape, generator=own, device=x.device) - 1
        return x + noise * (FLOOR * x.abs().amax())


class _Scaled(attention8.Coding):
    """Attention's quantizers without their rounding."""

    def codes(self, x: Tensor, step: float) -> Tensor:
        """Numbers, as codes would measure them."""
        return scaled(x, step)


class _Off(attention8.Coding):
    """Those of numbers that are a little off: probabilities, as their scores are."""

    def __init__(self, mode: Nudged) -> None:
        self._mode = mode

    def codes(self, x: Tensor, step: float) -> Tensor:
        """See :class:`Nudged`."""
        return self._mode.coded(x, step, FP8)

    def shares(self, scores: Tensor, softmax: Callable[[Tensor], Tensor], step: float) -> Tensor:
        """Scores are off by up to ``FLOOR`` of the largest, masks not among them."""
        right, nudged = (softmax(x) for x in (scores, self._mode.off(scores)))
        codes = (to_codes(scaled(x, step), FP8) for x in (nudged, right))
        return self._mode.counted(*codes)


def measure_codes(
    truth: Truth, whole: Truth, program: Executable, inputs: Mapping[str, Tensor], world: int
) -> tuple[Truth, Codes]:
    """What the dense program with quantizers returns and loses, and how its codes may flip.

    Args:
        truth: of the model without rounding.
        whole: of the model as it is.
        program: the dense one with them.
        inputs: by binding.
        world: how many ranks a program has that communicates by itself.

    Returns:
        its own truth, against which all ranks are held in the job's precision, and the same in
        float32 arithmetic, its ``ranks`` still empty.
    """

    def computed() -> list[Tensor]:
        return run(program, inputs, world, widen=not truth.is_wide)[0]

    reference = tuple(computed())
    spread, nudged = [], [Nudged(seed) for seed in range(DRAWS)]
    for mode in nudged:
        with mode:
            spread.append(worst(computed(), reference))
    bound = Error(
        max(FLOOR, *(MARGIN * e.max for e in spread)), max(FLOOR, *(MARGIN * e.rms for e in spread))
    )
    codes = Codes(
        ranks=(),
        bound=bound,
        codes=nudged[0].codes,
        flipped=max(mode.flipped for mode in nudged),
        loss=worst(reference, whole.reference),
        reference=reference,
    )
    own = replace(truth, reference=reference)
    return (own if truth.is_wide else rounded(own, program, inputs, world)), codes


def check_codes(codes: Codes, outputs: Iterable[list[Tensor]], what: str) -> tuple[Error, ...]:
    """Every rank's error with rounding quantizers in float32 arithmetic.

    Raises:
        ProofFailed: it is beyond the bound.
    """
    errors = tuple(worst(of_rank, codes.reference) for of_rank in outputs)
    if not all(error.within(codes.bound) for error in errors):
        off = max(error.max for error in errors)
        raise ProofFailed(
            f"{what} round to other codes than the dense model does: relative error {off:.1e}, "
            f"and codes that lie next to a tie explain {codes.bound.max:.1e}.",
            hint="without rounding all ranks are right, so a quantizer rounds in another way, or "
            "in another place; please report it.",
        )
    return errors


def check_loss(codes: Codes, allowed: float | None) -> None:
    """Refuse a loss by quantization that is more than was allowed.

    Raises:
        ProofFailed: it is.
    """
    if allowed is not None and not codes.loss.rms <= allowed:
        raise ProofFailed(
            f"quantization costs {codes.loss.rms:.1e} of the output (root mean square), and "
            f"--max-loss allows {allowed:.1e}.",
            hint="allow more; or, where --quantize is given, keep more layers as they are "
            "(--keep), and where --exchange is, send less by it (int8:kv).",
        )
