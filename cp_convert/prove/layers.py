"""What every layer of a TensorRT network means, as torch functions: one table.

The source is TensorRT's operator documentation. A function gets the layer and its inputs and
returns its result in any type that the declared one can be rounded from. What is not implemented
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ProofFailed
from ..ir.attention8 import Coding, with_coded_shares
from ..ir.network import FP4, Layer
from ..ir.nvfp4 import BLOCK, from_pairs, quantize_blocks, times_blocks
from ..ir.quantize import FP8, dequantize, quantize

Values = Sequence[Tensor | None]


def _given(values: Values, index: int) -> Tensor:
    value = values[index]
    assert value is not None
    return value


def _dims(mask: int, rank: int) -> list[int]:
    """TensorRT's axes are a bit mask, bit i for dimension i."""
    return [dim for dim in range(rank) if mask >> dim & 1]


def _constant(layer: Layer, values: Values) -> Tensor:
    value: Tensor = layer.parameters["value"]
    return from_pairs(value) if layer.outputs[0].dtype == FP4 else value


def _identity(layer: Layer, values: Values) -> Tensor:
    return _given(values, 0)


def _cast(layer: Layer, values: Values) -> Tensor:
    """Between floating types the rounding is left to the declared type of the result."""
    x, dtype = _given(values, 0), layer.parameters["to_type"]
    return x if x.is_floating_point() and dtype.is_floating_point else x.to(dtype)


def _shuffle(layer: Layer, values: Values) -> Tensor:
    """Transpose, reshape (0 copies a dimension, -1 infers one), transpose."""
    p = layer.parameters
    x = _given(values, 0).permute(p["first"][: p["rank"]])
    dims = _given(values, 1).tolist() if len(values) > 1 else p["dims"]
    if dims is not None:
        sizes = [
            x.shape[i] if size == 0 and p["zero_is_placeholder"] else size
            for i, size in enumerate(dims)
        ]
        x = x.reshape(sizes)
    return x.permute(p["second"][: x.dim()])


def _matrix_multiply(layer: Layer, values: Values) -> Tensor:
    a, b = _given(values, 0), _given(values, 1)
    operands = []
    for x, how in ((a, layer.parameters["op0"]), (b, layer.parameters["op1"])):
        if how not in ("NONE", "TRANSPOSE"):
            raise ProofFailed(f"{layer.name}: a matrix operation {how} is not understood.")
        operands.append(x.transpose(-1, -2) if how == "TRANSPOSE" else x)
    return operands[0] @ operands[1]


_ELEMENTWISE: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "POW": torch.pow,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


def _elementwise(layer: Layer, values: Values) -> Tensor:
    a, b = _given(values, 0), _given(values, 1)
    if a.dtype != b.dtype or a.dim() != b.dim():
        raise ProofFailed(
            f"{layer.name}: operands of {a.dtype}{list(a.shape)}, {b.dtype}{list(b.shape)}."
        )
    return _ELEMENTWISE[_known(layer, "op", _ELEMENTWISE)](a, b)


def _known(layer: Layer, name: str, table: Mapping[str, Any]) -> str:
    value = layer.parameters[name]
    if value not in table:
        raise ProofFailed(f"{layer.name}: the {layer.kind} {name} {value} is not understood.")
    return str(value)


_UNARY: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
}


def _unary(layer: Layer, values: Values) -> Tensor:
    return _UNARY[_known(layer, "op", _UNARY)](_given(values, 0))


_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor, float, float], Tensor]]] = {
    "RELU": lambda x, a, b: functional.relu(x),
    "SIGMOID": lambda x, a, b: torch.sigmoid(x),
    "TANH": lambda x, a, b: torch.tanh(x),
    "LEAKY_RELU": lambda x, a, b: functional.leaky_relu(x, a),
    "ELU": lambda x, a, b: functional.elu(x, a),
    "CLIP": lambda x, a, b: x.clamp(a, b),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "GELU_ERF": lambda x, a, b: functional.gelu(x),
    "GELU_TANH": lambda x, a, b: functional.gelu(x, approximate="tanh"),
    "SOFTPLUS": lambda x, a, b: a * torch.log1p(torch.exp(b * x)),
}


def _activation(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    return _ACTIVATIONS[_known(layer, "op", _ACTIVATIONS)](_given(values, 0), p["alpha"], p["beta"])


def _slice(layer: Layer, values: Values) -> Tensor:
    """``out[i] = x[start + i * stride]`` along the axes; a stride of 0 repeats."""
    p = layer.parameters
    x = _given(values, 0)
    start, size, stride, axes = (
        _list_at(values, index, p[name])
        for index, name in ((1, "start"), (2, "shape"), (3, "stride"), (5, "axes"))
    )
    mode = p["mode"]
    if mode not in ("STRICT_BOUNDS", "CLAMP", "WRAP", "FILL"):
        raise ProofFailed(f"{layer.name}: a slice with mode {mode} is not understood.")
    dims = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    for dim, first, count, step in zip(dims, start, size, stride, strict=True):
        # On the CPU whatever the device: which numbers are read is decided from them.
        index, length = first + step * torch.arange(count), x.shape[dim]
        if mode == "WRAP":
            index = index % length
        beyond = (index < 0) | (index >= length)
        if mode == "STRICT_BOUNDS" and bool(beyond.any()):
            raise ProofFailed(f"{layer.name} reads beyond dimension {dim} of {list(x.shape)}.")
        x = _taken(x, dim, index.clamp(0, length - 1), step)
        if mode == "FILL" and bool(beyond.any()):
            fill = values[4] if len(values) > 4 else None
            shape = [-1 if d == dim else 1 for d in range(x.dim())]
            outside = beyond.reshape(shape).to(x.device)
            x = torch.where(outside, 0 if fill is None else fill.to(x.dtype), x)
    return x


def _taken(x: Tensor, dim: int, index: Tensor, step: int) -> Tensor:
    """A view where there is one."""
    count = len(index)
    if count and step == 0:
        first = int(index[0])
        return x.narrow(dim, first, 1).expand(*x.shape[:dim], count, *x.shape[dim + 1 :])
    if count and step == 1 and int(index[-1]) - int(index[0]) == count - 1:
        return x.narrow(dim, int(index[0]), count)
    return x.index_select(dim, index.to(x.device))


def _list_at(values: Values, index: int, attribute: Any) -> Any:
    """An optional input's numbers, or the layer's own attribute."""
    value = values[index] if len(values) > index else None
    return attribute if value is None else value.reshape(-1).tolist()


def _concatenation(layer: Layer, values: Values) -> Tensor:
    parts = [_given(values, i) for i in range(len(values))]
    return torch.cat(parts, dim=layer.parameters["axis"])


def _normalization(layer: Layer, values: Values) -> Tensor:
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the masked axes."""
    p = layer.parameters
    x, scale, bias = (_given(values, i).float() for i in range(3))
    if p["num_groups"] != 1:
        return _group_normalization(x, scale, bias, p["num_groups"], p["epsilon"])
    dims = _dims(p["axes"], x.dim())
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + p["epsilon"]) * scale + bias


def _group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, groups: int, epsilon: float
) -> Tensor:
    """Channels (dimension 1) in groups, each normalized on its own; one scale and bias a group."""
    parts = x.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(
        parts, dim=list(range(2, parts.dim())), correction=0, keepdim=True
    )
    normal = (parts - mean) / torch.sqrt(variance + epsilon)
    result: Tensor = (normal * scale.unsqueeze(2) + bias.unsqueeze(2)).flatten(1, 2)
    return result


def _reduce(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    x = _given(values, 0)
    dims = _dims(p["axes"], x.dim())
    keep = p["keep_dims"]
    table: dict[str, Callable[[], Tensor]] = {
        "SUM": lambda: x.sum(dims, keepdim=keep),
        "AVG": lambda: x.float().mean(dims, keepdim=keep),
        "MAX": lambda: x.amax(dims, keepdim=keep),
        "MIN": lambda: x.amin(dims, keepdim=keep),
    }
    return table[_known(layer, "op", table)]()


def _softmax(layer: Layer, values: Values) -> Tensor:
    x = _given(values, 0)
    (dim,) = _dims(layer.parameters["axes"], x.dim())
    return torch.softmax(x.float(), dim)


def _shape(layer: Layer, values: Values) -> Tensor:
    x = _given(values, 0)
    return torch.tensor(x.shape, dtype=torch.int64, device=x.device)


def _gather(layer: Layer, values: Values) -> Tensor:
    """Mode DEFAULT: ``x[..., indices, ...]`` along the axis, the indices' shape in its place."""
    p = layer.parameters
    x, indices = _given(values, 0), _given(values, 1)
    if p["mode"] != "DEFAULT" or p["num_elementwise_dims"] != 0:
        raise ProofFailed(f"{layer.name}: gather mode {p['mode']} is not understood.")
    axis = p["axis"]
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1).long()
    taken = x.index_select(axis, flat)
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _unsqueeze(layer: Layer, values: Values) -> Tensor:
    x, axes = _given(values, 0), _given(values, 1).reshape(-1).tolist()
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(layer: Layer, values: Values) -> Tensor:
    x, axes = _given(values, 0), _given(values, 1).reshape(-1).tolist()
    return x.squeeze([a % x.dim() for a in axes])


def _select(layer: Layer, values: Values) -> Tensor:
    return torch.where(_given(values, 0), _given(values, 1), _given(values, 2))


def _kernel(layer: Layer, values: Values) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a convolution is given: as inputs or, else, as weights of its own."""
    p = layer.parameters
    if p["padding_mode"] != "EXPLICIT_ROUND_DOWN":
        raise ProofFailed(f"{layer.name}: padding mode {p['padding_mode']} is not understood.")
    x = _given(values, 0)
    kernel = _given(values, 1) if len(values) > 1 else p["kernel"]
    bias = _given(values, 2) if len(values) > 2 else p["bias"]
    return x, kernel.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _convolution(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    x, kernel, bias = _kernel(layer, values)
    spatial = len(p["stride_nd"])
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[spatial]
    x = functional.pad(x, _pads(p))
    return convolve(
        x,
        kernel,
        bias,
        stride=p["stride_nd"],
        dilation=p["dilation_nd"],
        groups=p["num_groups"],
    )


def _pads(p: Mapping[str, Any]) -> list[int]:
    """Padding as functional.pad wants it: the last dimension first, each as (before, after)."""
    pairs = list(zip(p["pre_padding"], p["post_padding"], strict=True))
    return [n for pair in reversed(pairs) for n in pair]


def _deconvolution(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    x, kernel, bias = _kernel(layer, values)
    spatial = len(p["stride_nd"])
    spread = {
        1: functional.conv_transpose1d,
        2: functional.conv_transpose2d,
        3: functional.conv_transpose3d,
    }[spatial]
    whole = spread(
        x,
        kernel,
        bias,
        stride=p["stride_nd"],
        dilation=p["dilation_nd"],
        groups=p["num_groups"],
    )
    # Here padding takes away from the result.
    return functional.pad(whole, [-n for n in _pads(p)])


def _pooling(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    if p["padding_mode"] != "EXPLICIT_ROUND_DOWN" or p["type"] not in ("MAX", "AVERAGE"):
        raise ProofFailed(f"{layer.name}: {p['type']} pooling is not understood.")
    if p["pre_padding"] != p["post_padding"]:
        raise ProofFailed(f"{layer.name}: one-sided padding is not understood.")
    spatial, x = len(p["window_size_nd"]), _given(values, 0)
    window = {
        "kernel_size": p["window_size_nd"],
        "stride": p["stride_nd"],
        "padding": p["pre_padding"],
    }
    if p["type"] == "MAX":
        pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
        result: Tensor = pool[spatial](x, **window)
        return result
    mean = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
    counted = not p["average_count_excludes_padding"]
    averaged: Tensor = mean[spatial](x, **window, count_include_pad=counted)
    return averaged


def _scatter(layer: Layer, values: Values) -> Tensor:
    """``ND``: rows of updates at indices; ``ELEMENT``: numbers at indices along one axis."""
    p = layer.parameters
    data, indices, updates = (_given(values, i) for i in range(3))
    if p["mode"] == "ELEMENT":
        return data.scatter(p["axis"], indices.long(), updates)
    if p["mode"] != "ND":
        raise ProofFailed(f"{layer.name}: the SCATTER mode {p['mode']} is not understood.")
    return data.index_put(tuple(indices.long().unbind(-1)), updates)


class _Quantized(Coding):
    def codes(self, x: Tensor, step: float) -> Tensor:
        """By the operator, which a proof may replace."""
        return quantize(x, step, FP8)


def _attention(layer: Layer, values: Values) -> Tensor:
    """``softmax(Q K^T + mask) V`` over ``[B, H, S, D]``; the scale is not the layer's business.

    Of several ranks' attention the replayer has joined K and V before.
    """
    p = layer.parameters
    understood = {
        "norm_op": "SOFTMAX",
        "query_form": "PADDED_BHND",
        "key_value_form": "PADDED_BHND",
    }
    for name, value in understood.items():
        if p[name] != value:
            raise ProofFailed(f"{layer.name}: attention with {name} {p[name]} is not understood.")
    q, k, v = (_given(values, i) for i in range(3))
    # The kinds differ in where the diagonal begins, which is the same in a square.
    causal = p["causal_kind"] in ("LOWER_RIGHT", "UPPER_LEFT")
    if (causal and q.shape[2] != k.shape[2]) or (not causal and p["causal_kind"] != "NONE"):
        raise ProofFailed(f"{layer.name}: attention, {p['causal_kind']}, is not understood.")
    mask = values[3]
    grouped = q.shape[1] != k.shape[1]
    if p["shares"] is not None:
        shares = _given(values, 4)
        if shares.numel() != 1 or p["shares"] != FP8:
            raise ProofFailed(f"{layer.name}: such codes of probabilities are not understood.")
        step = float(shares.item())
        return with_coded_shares(q, k, v, mask, step, causal=causal, coding=_Quantized())
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=grouped
    )


def _scale_of(layer: Layer, values: Values) -> float:
    """One number for the whole tensor; what else there is, we do not write."""
    scale = _given(values, 1)
    if len(values) > 2 or scale.numel() != 1:
        raise ProofFailed(f"{layer.name}: a {layer.kind} by channels or blocks is not understood.")
    return float(scale.item())


def _quantize(layer: Layer, values: Values) -> Tensor:
    return quantize(_given(values, 0), _scale_of(layer, values), layer.outputs[0].dtype)


def _quantize_dynamically(layer: Layer, values: Values) -> tuple[Tensor, Tensor]:
    """To NVFP4: codes as the numbers that they are, and the scales of their blocks."""
    x, told = _given(values, 0), layer.parameters
    wanted = {
        "axis": x.dim() - 1,
        "block_size": BLOCK,
        "to_type": FP4,
        "scale_type": FP8,
    }
    if any(told[name] != value for name, value in wanted.items()):
        raise ProofFailed(f"{layer.name}: a DYNAMIC_QUANTIZE of {told} is not understood.")
    return quantize_blocks(x, _scale_of(layer, values))


def _is_by_blocks(codes: Tensor, scale: Tensor) -> bool:
    """Whether codes of 4 bits, which are float32 here, have a scale for each block of 16."""
    return (
        codes.dtype == torch.float32
        and scale.is_floating_point()
        and tuple(scale.shape) == (*codes.shape[:-1], codes.shape[-1] // BLOCK)
    )


def _dequantize(layer: Layer, values: Values) -> Tensor:
    """In float32; the rounding is left to the declared type of the result."""
    codes, scale = _given(values, 0), _given(values, 1)
    if len(values) == 2 and _is_by_blocks(codes, scale) and layer.parameters["axis"] == -1:
        return times_blocks(codes, scale, 1.0, torch.float32)
    return dequantize(_given(values, 0), _scale_of(layer, values), torch.float32)


Results = Tensor | tuple[Tensor, ...]
LAYERS: Final[Mapping[str, Callable[[Layer, Values], Results]]] = {
    "ACTIVATION": _activation,
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": _identity,
    "CAST": _cast,
    "CONCATENATION": _concatenation,
    "CONSTANT": _constant,
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
    "DEQUANTIZE": _dequantize,
    "DYNAMIC_QUANTIZE": _quantize_dynamically,
    "POOLING": _pooling,
    "QUANTIZE": _quantize,
    "SCATTER": _scatter,
    "ELEMENTWISE": _elementwise,
    "GATHER": _gather,
    "IDENTITY": _identity,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "NORMALIZATION": _normalization,
    "REDUCE": _reduce,
    "SELECT": _select,
    "SHAPE": _shape,
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "SOFTMAX": _softmax,
    "SQUEEZE": _squeeze,
    "UNARY": _unary,
    "UNSQUEEZE": _unsqueeze,
}
