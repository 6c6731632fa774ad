"""The part of the manifest that tells what is quantized, and what that costs. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from .call import Count, Struct


class Error(Struct, frozen=True):
    """Relative errors: largest, and root mean square, each over that of the reference."""

    max: float
    rms: float


class Exchange(Struct, frozen=True):
    """What attention sends in 8 bits: of queries, keys, values and outputs, by their letters.

    Every head of every token is divided by its largest magnitude over 127, and that magnitude is
    sent beside, by a collective of its own.
    """

    codes: Literal["int8"]
    operands: list[Literal["q", "k", "v", "o"]]


class Layer(Struct, frozen=True):
    """A linear layer that multiplies codes, and the scales: what a code of 1 stands for.

    ``loss`` is its own: what its output differs by with the example inputs (root mean square); null
    where nothing was computed (``--proof none`` and a checkpoint that has all scales).
    ``given`` says which of the two scales are the checkpoint's; the others come from inputs. No
    ``input_scale``: each token has its own. ``rows``: so has each row of the weight, of which
    ``weight_scale`` is the largest. ``smooth``: columns of the input are multiplied before. In
    NVFP4 each block of 16 numbers has a scale as well, by which these are multiplied. ``codes`` are
    those of the bundle's layers where it is null, as in bundles of an earlier version.
    """

    module: str
    input_scale: float | None
    weight_scale: float
    loss: float | None
    given: Literal["both", "weight", "none"] = "none"
    rows: bool = False
    smooth: bool = False
    codes: Literal["fp8", "int8", "nvfp4"] | None = None


class Kept(Struct, frozen=True):
    """A linear layer, or an attention, that is left in the precision, if only its product.

    Where ``reason`` begins with "only its weight is codes", that stays so.
    """

    module: str
    reason: str


class Linears(Struct, frozen=True):
    """What linear layers multiply.

    Scales that no checkpoint gives come from ``sets`` sets of inputs; none do where that is 0.
    ``products`` counts all linear layers by the type that they multiply.
    """

    codes: Literal["fp8", "int8", "nvfp4", "mixed"]
    layers: list[Layer]
    kept: list[Kept]
    sets: Count
    products: dict[str, Count] = msgspec.field(default_factory=dict)


class CodedAttention(Struct, frozen=True):
    """An attention over FP8 codes, and the scales: what a code of 1 stands for.

    Probabilities become codes as well, of which 448 stands for one. ``loss`` is its own, as a
    linear layer's. ``given``: ``both`` where the scales are the checkpoint's, ``none`` where they
    come from inputs.
    """

    module: str
    query_scale: float
    key_scale: float
    value_scale: float
    loss: float | None
    given: Literal["both", "none"] = "none"


class Attentions(Struct, frozen=True):
    """What attentions are computed with; ``kept`` are those in the precision.

    ``products`` counts all of them by the type that they multiply; of ``sets``, see
    :class:`Linears`.
    """

    codes: Literal["fp8"]
    layers: list[CodedAttention]
    kept: list[Kept]
    sets: Count
    products: dict[str, Count]


class Codes(Struct, frozen=True):
    """All ranks with quantizers that round, in float32 arithmetic.

    ``ranks`` and ``networks`` are their errors against the dense program with the same quantizers.
    Of its ``codes``, ``flipped`` lie so near to a tie that they may be others; what that does to
    the output is the ``bound``.
    """

    ranks: list[Error]
    networks: list[Error]
    bound: Error
    codes: Count
    flipped: Count


class Quantization(Struct, frozen=True):
    """What is quantized. ``loss`` is what that costs: the dense program with these quantizers.

    It is measured in float32 arithmetic against the model without. ``codes`` and ``loss`` are null
    where nothing was proven.
    """

    exchange: Exchange | None
    linears: Linears | None
    codes: Codes | None
    loss: Error | None
    attentions: Attentions | None = None
