"""The lowerings, and their registration with Torch-TensorRT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from ..ir import extents  # noqa: F401  defines what sizes lowers
from ..ir.nvfp4 import BLOCK_QUANTIZERS
from ..ir.ops import COLLECTIVES
from ..ir.quantize import QUANTIZERS
from ..mesh import split_groups
from ..trt.libraries import (
    ConversionContext,
    ConverterPriority,
    dynamo_tensorrt_converter,
    get_trt_tensor,
    trt,
)
from . import attention, packed16, quantizers, sizes
from .layers import cast
from .workarounds import Workaround

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any
Lowering = Callable[..., Tensor]


def register(workarounds: Mapping[str, Workaround]) -> None:
    """Make the table known to Torch-TensorRT; registering again replaces what was there.

    Args:
        workarounds: by operator, see :func:`.workarounds.active`.
    """
    for operator in (
        *_COLLECTIVES,
        "attention",
        "fused_attention",
        "result",
        *_QUANTIZERS,
        *sizes.LOWERINGS,
    ):
        row = workarounds.get(operator)
        lowering = LOWERINGS[row.instead if row else operator]
        dynamo_tensorrt_converter(
            getattr(torch.ops.cp, operator).default, priority=ConverterPriority.HIGH
        )(partial(_convert, lowering))


def _convert(
    lowering: Lowering,
    ctx: ConversionContext,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    name: str,
) -> Tensor:
    named = dict(zip((a.name for a in target._schema.arguments), args, strict=False))
    return lowering(ctx, name, **{**named, **kwargs})


def _distributed(operator: str) -> Lowering:
    """The lowering of a ``cp::`` operator that is a ``CollectiveOperation`` of the same name."""

    def lowering(
        ctx: ConversionContext,
        name: str,
        x: Any,
        groups: Sequence[int],
        size: int,
        root: int = -1,
        kind: str = "none",
        instead: str | None = None,
    ) -> Tensor:
        operation = getattr(trt.CollectiveOperation, operator.upper())
        return _collective(
            ctx, name, x, operator, operation, groups, size,
            root=root, reduce=kind, instead=instead,
        )  # fmt: skip

    return lowering


def _in_float32(operator: str) -> Lowering:
    """The same with numbers in float32 where they come in bfloat16, and in bfloat16 again after."""
    distributed = _distributed(operator)

    def lowering(ctx: ConversionContext, name: str, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        block = get_trt_tensor(ctx, x, f"{name}_block")
        if block.dtype != trt.bfloat16:
            return distributed(ctx, name, block, *args, **kwargs)
        wide = cast(ctx, f"{name}_wide", block, trt.float32)
        instead = f"{operator}_in_float32"
        moved = distributed(ctx, name, wide, *args, instead=instead, **kwargs)
        return cast(ctx, f"{name}_narrow", moved, trt.bfloat16)

    return lowering


def _broadcast_in_float16(
    ctx: ConversionContext, name: str, x: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Numbers in float16 where they come in bfloat16, and the same in bfloat16 after."""
    block = get_trt_tensor(ctx, x, f"{name}_block")
    if -1 in block.shape:  # a range of sizes, of which the longest dimension may be another
        return _in_float32("broadcast")(ctx, name, block, *args, **kwargs)
    if block.dtype != trt.bfloat16:
        return _distributed("broadcast")(ctx, name, block, *args, **kwargs)
    packed = packed16.pack(ctx, name, block)
    instead = "broadcast_in_float16"
    moved = _distributed("broadcast")(ctx, name, packed, *args, instead=instead, **kwargs)
    return packed16.unpack(ctx, name, moved)


def _all_gather_by_all_to_all(
    ctx: ConversionContext,
    name: str,
    x: Any,
    groups: Sequence[int],
    size: int,
    instead: str = "all_gather_by_all_to_all",
) -> Tensor:
    """Every slot of the exchange holds the same block, so every rank receives every block."""
    block = get_trt_tensor(ctx, x, f"{name}_block")
    slots = ctx.net.add_concatenation([block] * size)
    slots.axis = 0
    slots.name = f"{name}_slots"
    kind = trt.CollectiveOperation.ALL_TO_ALL
    block = slots.get_output(0)
    return _collective(ctx, name, block, "all_gather", kind, groups, size, instead=instead)


def _all_gather_of_parts(
    ctx: ConversionContext, name: str, x: Any, groups: Sequence[int], size: int
) -> Tensor:
    """By all-to-all where the group is a part of the ranks."""
    if len(groups) == size:
        return _distributed("all_gather")(ctx, name, x, groups, size)
    instead = "all_gather_of_parts_by_all_to_all"
    return _all_gather_by_all_to_all(ctx, name, x, groups, size, instead)


def _reduce_scatter_of_parts(
    ctx: ConversionContext, name: str, x: Any, groups: Sequence[int], size: int, kind: str
) -> Tensor:
    """Where the group is a part of the ranks: everyone's block for this one, then reduced here."""
    if len(groups) == size:
        return _distributed("reduce_scatter")(ctx, name, x, groups, size, kind=kind)
    blocks = _collective(
        ctx, name, x, "reduce_scatter", trt.CollectiveOperation.ALL_TO_ALL, groups, size,
        instead="reduce_scatter_of_parts_by_all_to_all",
    )  # fmt: skip
    first, *rest = blocks.shape
    apart = ctx.net.add_shuffle(blocks)
    apart.reshape_dims = (size, first // size, *rest)
    apart.name = f"{name}_blocks"
    reduce = getattr(trt.ReduceOperation, kind.upper())
    layer = ctx.net.add_reduce(apart.get_output(0), reduce, 1, False)
    layer.name = f"{name}_reduced"
    return layer.get_output(0)


def _collective(
    ctx: ConversionContext,
    name: str,
    x: Any,
    operator: str,
    kind: trt.CollectiveOperation,
    groups: Sequence[int],
    size: int,
    *,
    root: int = -1,
    reduce: str = "none",
    instead: str | None = None,
) -> Tensor:
    """One ``IDistCollectiveLayer`` (TensorRT documentation, *IDistCollectiveLayer*).

    ``groups`` are all that communicate alike, this rank's own first.

    The layer's parameters do not read back from a finished network, so they are written into
    its metadata as JSON as well; :func:`cp_convert.engine.build.collectives_of` reads them.
    """
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    own, *others = split_groups(groups, size)
    # TensorRT means all ranks by an empty array, and releases differ in what a full one does.
    group = np.array(own if others else [], dtype=np.int64)
    layer = ctx.net.add_dist_collective(tensor, kind, _REDUCE[reduce], root, group)
    assert layer is not None, f"TensorRT refused a {kind.name} of shape {tensor.shape}"
    layer.num_ranks = size
    layer.name = f"{kind.name.lower()} {name}"
    layer.metadata = json.dumps(
        {"operator": operator, "kind": kind.name, "root": root, "reduce": reduce,
         "group": list(own), "instead": instead}
    )  # fmt: skip
    return layer.get_output(0)


_REDUCE: Final = {
    "none": trt.ReduceOperation.NONE,
    "sum": trt.ReduceOperation.SUM,
    "prod": trt.ReduceOperation.PROD,
    "max": trt.ReduceOperation.MAX,
    "min": trt.ReduceOperation.MIN,
    "avg": trt.ReduceOperation.AVG,
}


def _result(ctx: ConversionContext, name: str, x: Any) -> Tensor:
    layer = ctx.net.add_identity(get_trt_tensor(ctx, x, f"{name}_input"))
    layer.name = f"result {name}"
    return layer.get_output(0)


_COLLECTIVES: Final = tuple(op._schema.name.split("::")[1] for op in COLLECTIVES)
_QUANTIZERS: Final = tuple(
    op._schema.name.split("::")[1] for op in (*QUANTIZERS, *BLOCK_QUANTIZERS)
)
LOWERINGS: Final[Mapping[str, Lowering]] = {
    **{operator: _distributed(operator) for operator in _COLLECTIVES},
    **{f"{operator}_in_float32": _in_float32(operator) for operator in _COLLECTIVES},
    "broadcast_in_float16": _broadcast_in_float16,
    "all_gather_by_all_to_all": _all_gather_by_all_to_all,
    "all_gather_of_parts_by_all_to_all": _all_gather_of_parts,
    "reduce_scatter_of_parts_by_all_to_all": _reduce_scatter_of_parts,
    "attention": attention.attention,
    "attention_of_its_own_query": attention.attention_of_its_own_query,
    "fused_attention": attention.fused_attention,
    "result": _result,
    **{operator: getattr(quantizers, operator) for operator in _QUANTIZERS},
    **sizes.LOWERINGS,
}
