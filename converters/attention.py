"""The lowerings of attentions: one ``IAttention`` each, whose query is scaled before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import torch

from ..ir.attention8 import OF_PROBABILITIES
from ..ir.numbers import holds
from ..trt.libraries import ConversionContext, get_trt_tensor, trt
from . import quantizers
from .layers import cast, constant, elementwise

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any
_TORCH: Final = {
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.float32: torch.float32,
}


def attention(
    ctx: ConversionContext,
    name: str,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    steps: Sequence[float] | None = None,
) -> Tensor:
    """One ``IAttention``, whose query is scaled before (documentation, *IAttention*).

    Torch-TensorRT's lowering of scaled_dot_product_attention makes the scale a half constant,
    which shifts all logits the same way (bfloat16: by up to 0.4 percent).

    With ``steps`` over FP8 codes, see :func:`_over_codes`.
    """
    q, k, v = (get_trt_tensor(ctx, x, f"{name}_{i}") for i, x in enumerate((query, key, value)))
    layer = (
        _over_codes(ctx, name, (q, k, v), scale, steps)
        if steps
        else _attention_layer(ctx, name, q, k, v, scale)
    )
    layer.decomposable = True
    if is_causal:
        layer.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
    elif attn_mask is not None:
        layer.mask = _mask(ctx, name, attn_mask, q)
    return layer.get_output(0)


def attention_of_its_own_query(
    ctx: ConversionContext,
    name: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """The same, and different from all that were added before, where these share its query.

    Codes are every attention's own.
    """
    if others.get("steps"):
        return attention(ctx, name, query, key, value, scale=scale, **others)
    q, k = get_trt_tensor(ctx, query, f"{name}_0"), get_trt_tensor(ctx, key, f"{name}_1")
    if q.dtype in (trt.float32, trt.bfloat16):  # whose exponents have room for the factor
        layers = (ctx.net.get_layer(i) for i in range(ctx.net.num_layers))
        before = [x for x in layers if x.name.endswith(_SCALED) and x.get_input(0).name == q.name]
        if before:
            scale = (q.shape[-1] ** -0.5 if scale is None else scale) * 2.0 ** len(before)
            k = _scaled(ctx, f"{name}_key", k, 2.0 ** -len(before))
    return attention(ctx, name, q, k, value, scale=scale, **others)


def _attention_layer(
    ctx: ConversionContext, name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> Any:
    scaled = _scaled(ctx, name, q, q.shape[-1] ** -0.5 if scale is None else scale)
    return _added(ctx, scaled, k, v)


def _over_codes(
    ctx: ConversionContext,
    name: str,
    operands: tuple[Tensor, Tensor, Tensor],
    scale: float | None,
    steps: Sequence[float],
) -> Any:
    """Over codes of all three, whose probabilities become codes as well (:mod:`..ir.attention8`).

    Measured (TensorRT-RTX 1.7.1): the kernel takes the product of the dequantizing scales as its
    own, in float32, so the factor of scores belongs there. A product between the queries' codes and
    the attention is absorbed in the queries' type alone; with casts around it, or without the
    probabilities' type, everything is computed in half precision, without a word. That scale has to
    be in the queries' type.
    """
    q, k, v = operands
    of_q, of_k, of_v = steps
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    coded = [
        quantizers.there_and_back(ctx, f"{name}_{letter}", x, step, torch.float8_e4m3fn, back)
        for letter, x, step, back in (
            ("q", q, of_q, of_q * factor),
            ("k", k, of_k, of_k),
            ("v", v, of_v, of_v),
        )
    ]
    layer = _added(ctx, *coded)
    layer.normalization_quantize_to_type = trt.fp8
    # A float32 constant that is cast: the proof in float32 arithmetic leaves casts out.
    of_p = quantizers.scale_of(ctx, f"{name}_shares", OF_PROBABILITIES)
    layer.normalization_quantize_scale = cast(ctx, f"{name}_shares_cast", of_p, q.dtype)
    return layer


def _added(ctx: ConversionContext, q: Tensor, k: Tensor, v: Tensor) -> Any:
    norm, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    layer = ctx.net.add_attention_v2(q, k, v, norm, causal)
    assert layer is not None, f"TensorRT refused an attention of {q.shape} over {k.shape}"
    return layer


def _scaled(ctx: ConversionContext, name: str, q: Tensor, scale: float) -> Tensor:
    """``q * scale``, rounded once to its type; see :mod:`cp_convert.engine.opmath`."""
    whole = q if holds(scale, _TORCH[q.dtype]) else cast(ctx, f"{name}_wide", q, trt.float32)
    # A float32 constant that is cast: the proof in float32 arithmetic leaves casts out.
    factor = constant(ctx, f"{name}_scale", q, scale)
    factor = cast(ctx, f"{name}_scale_cast", factor, whole.dtype)
    product = elementwise(ctx, f"{name}{_SCALED}", whole, factor, "PROD")
    return cast(ctx, f"{name}_scaled_cast", product, q.dtype)


_SCALED: Final = "_scaled"


def _mask(ctx: ConversionContext, name: str, mask: Any, q: Tensor) -> Tensor:
    """A mask with the query's dimensions; of booleans, or of numbers in the query's type."""
    given = get_trt_tensor(ctx, mask, f"{name}_mask")
    if given.dtype != trt.bool:
        given = cast(ctx, f"{name}_mask_cast", given, q.dtype)
    missing = len(q.shape) - len(given.shape)
    if missing == 0:
        return given
    layer = ctx.net.add_shuffle(given)
    layer.reshape_dims = (*(1,) * missing, *given.shape)
    layer.name = f"{name}_mask_shape"
    return layer.get_output(0)


def fused_attention(
    ctx: ConversionContext,
    name: str,
    query: Any,
    key: Any,
    value: Any,
    scale: float | None,
    groups: Sequence[int],
    size: int,
) -> Tensor:
    """One ``IAttention`` that exchanges K and V (documentation, *Multi-Device Attention*)."""
    q, k, v = (get_trt_tensor(ctx, x, f"{name}_{i}") for i, x in enumerate((query, key, value)))
    layer = _attention_layer(ctx, name, q, k, v, scale)
    layer.name = f"fused attention {name}"
    layer.num_ranks = size
    return layer.get_output(0)
