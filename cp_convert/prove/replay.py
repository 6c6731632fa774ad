"""A TensorRT network, run layer by layer with torch, all ranks in lockstep.

What runs is what was handed to TensorRT's builder (``cp_convert.network``), with the meaning that
TensorRT's operator documentation gives each layer. An unknown layer, or an attribute whose meaning
is not implemented, is an error and never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..errors import ProofFailed
from ..network import Layer, Network
from .lockstep import HalfMatmulsInFloat32, PerRank

_HALF: Final = (torch.float16, torch.bfloat16)
Values = Sequence[Tensor | None]


def replay(
    networks: Sequence[Network], inputs: Mapping[str, Tensor], *, widen: bool = False
) -> list[list[Tensor]]:
    """Run every rank's network on the same full inputs.

    Args:
        networks: one for every rank, rank 0 first.
        inputs: by binding name.
        widen: compute in float32 wherever a network says float16 or bfloat16.

    Returns:
        Every rank's outputs, in the order of the networks' own.

    Raises:
        ProofFailed: the ranks' networks are not of one program, or a layer is not understood.
    """
    world = len(networks)
    _check_alike(networks)
    env: dict[str, PerRank] = {
        b.name: PerRank((_in(inputs[b.name], b.dtype, widen),)) for b in networks[0].inputs
    }
    dying = _last_uses(networks[0])
    with torch.no_grad(), HalfMatmulsInFloat32():
        for position, layer in enumerate(networks[0].layers):
            alike = [network.layers[position] for network in networks]
            env[_result_of(layer)] = _run(alike, env, world, widen=widen)
            for name in dying.get(position, ()):
                env.pop(name, None)
    outputs = networks[0].outputs
    return [[env[b.name][rank] for b in outputs] for rank in range(world)]


def _check_alike(networks: Sequence[Network]) -> None:
    """Ranks run one program: the same layers in the same order, on the same names."""
    first = networks[0]
    for rank, network in enumerate(networks):
        shape = [(x.kind, x.name, x.inputs, x.outputs) for x in network.layers]
        if shape != [(x.kind, x.name, x.inputs, x.outputs) for x in first.layers]:
            raise ProofFailed(f"rank {rank}'s network is not of the same program as rank 0's.")
        if network.inputs != first.inputs or network.outputs != first.outputs:
            raise ProofFailed(f"rank {rank}'s network has other bindings than rank 0's.")


def _result_of(layer: Layer) -> str:
    assert len(layer.outputs) == 1, f"{layer.kind} with {len(layer.outputs)} outputs"
    return layer.outputs[0].name


def _in(tensor: Tensor, dtype: torch.dtype, widen: bool) -> Tensor:
    """An input as the binding takes it (TensorRT has no float64)."""
    tensor = tensor.to(dtype)
    return tensor.float() if widen and dtype in _HALF else tensor


def _last_uses(network: Network) -> dict[int, list[str]]:
    last: dict[str, int] = {}
    for position, layer in enumerate(network.layers):
        for name in (*_reads(layer), _result_of(layer)):
            last[name] = position
    kept = {b.name for b in network.outputs}
    dying: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in kept:
            dying.setdefault(position, []).append(name)
    return dying


def _reads(layer: Layer) -> list[str]:
    mask = layer.parameters.get("mask")
    return [name for name in (*layer.inputs, mask) if name is not None]


def _run(
    layers: Sequence[Layer], env: Mapping[str, PerRank], world: int, *, widen: bool
) -> PerRank:
    first = layers[0]
    reads = [env[name] for name in _reads(first)]
    if first.kind == "DIST_COLLECTIVE":
        return _collective(layers, [reads[0][rank] for rank in range(world)])
    compute = LAYERS.get(first.kind)
    if compute is None:
        raise ProofFailed(f"the network proof does not know the layer {first.kind}: {first.name}.")
    alike = all(_same(layer.parameters, first.parameters) for layer in layers)
    count = 1 if alike and all(value.is_common for value in reads) else world
    results = []
    for rank in range(count):
        arguments = [None if n is None else env[n][rank] for n in layers[rank].inputs]
        mask = layers[rank].parameters.get("mask")
        if first.kind == "ATTENTION_INPUT":
            arguments.append(None if mask is None else env[mask][rank])
        result = compute(layers[rank], arguments)
        results.append(_out(result, first, widen=widen))
    return PerRank(tuple(results))


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(
        a[key] is b[key] or (not isinstance(a[key], Tensor) and a[key] == b[key]) for key in b
    )


def _out(result: Tensor, layer: Layer, *, widen: bool) -> Tensor:
    """The result in the tensor's declared type; a layer may compute in a wider one."""
    declared = layer.outputs[0]
    if tuple(result.shape) != declared.shape:
        raise ProofFailed(
            f"{layer.name} gives {list(result.shape)} but declares {list(declared.shape)}."
        )
    if result.dtype != declared.dtype and not _may_convert(result.dtype, declared.dtype):
        raise ProofFailed(f"{layer.name} gives {result.dtype} but declares {declared.dtype}.")
    is_wide = widen and declared.dtype in _HALF
    return result.float() if is_wide else result.to(declared.dtype)


def _may_convert(have: torch.dtype, want: torch.dtype) -> bool:
    integers = (torch.int32, torch.int64)
    return (have.is_floating_point and want.is_floating_point) or (
        have in integers and want in integers
    )


_OPERATORS: Final = {
    "ALL_GATHER": torch.ops.cp.all_gather.default,
    "ALL_TO_ALL": torch.ops.cp.all_to_all.default,
    "BROADCAST": torch.ops.cp.broadcast.default,
}


def _collective(layers: Sequence[Layer], values: Sequence[Tensor]) -> PerRank:
    """From all ranks' values; every rank's own layer says who its peers are."""
    flat: list[int] = []
    kind, root = layers[0].parameters["kind"], layers[0].parameters["root"]
    for rank, layer in enumerate(layers):
        told = layer.parameters
        group = told["group"]
        if rank not in group or told["num_ranks"] != len(group):
            raise ProofFailed(
                f"{layer.name} on rank {rank} names the group {group} of {told['num_ranks']}."
            )
        if (told["kind"], told["root"]) != (kind, root):
            raise ProofFailed(f"{layer.name}: the ranks disagree on what is communicated.")
        if layers[group[0]].parameters["group"] != group:
            raise ProofFailed(f"{layer.name}: rank {group[0]} does not name rank {rank} its peer.")
        if rank == group[0]:
            flat += group
    if kind not in _OPERATORS or sorted(flat) != list(range(len(layers))):
        raise ProofFailed(f"{layers[0].name}: a {kind} over {flat} is not understood.")
    rest = [root] if kind == "BROADCAST" else []
    size = layers[0].parameters["num_ranks"]
    results = ops.on_all_ranks(_OPERATORS[kind], values, [*rest, flat, size])
    same = all(result is results[0] for result in results)
    return PerRank((results[0],) if same else tuple(results))


def _given(values: Values, index: int) -> Tensor:
    value = values[index]
    assert value is not None
    return value


def _dims(mask: int, rank: int) -> list[int]:
    """TensorRT's axes are a bit mask, bit i for dimension i."""
    return [dim for dim in range(rank) if mask >> dim & 1]


def _constant(layer: Layer, values: Values) -> Tensor:
    value: Tensor = layer.parameters["value"]
    return value


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
    if p["mode"] != "STRICT_BOUNDS":
        raise ProofFailed(f"{layer.name}: a slice with mode {p['mode']} is not understood.")
    dims = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    for dim, first, count, step in zip(dims, start, size, stride, strict=True):
        index = first + step * torch.arange(count, device=x.device)
        if count and not 0 <= int(index.min()) <= int(index.max()) < x.shape[dim]:
            raise ProofFailed(f"{layer.name} reads beyond dimension {dim} of {list(x.shape)}.")
        if step == 0:
            x = x.narrow(dim, first, 1).expand(*x.shape[:dim], count, *x.shape[dim + 1 :])
        elif step == 1:
            x = x.narrow(dim, first, count)
        else:
            x = x.index_select(dim, index)
    return x


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
    if p["num_groups"] != 1:
        raise ProofFailed(f"{layer.name}: group normalization is not understood.")
    x, scale, bias = (_given(values, i).float() for i in range(3))
    dims = _dims(p["axes"], x.dim())
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + p["epsilon"]) * scale + bias


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
    return torch.tensor(_given(values, 0).shape, dtype=torch.int64)


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


def _convolution(layer: Layer, values: Values) -> Tensor:
    p = layer.parameters
    if p["padding_mode"] != "EXPLICIT_ROUND_DOWN":
        raise ProofFailed(f"{layer.name}: padding mode {p['padding_mode']} is not understood.")
    x = _given(values, 0)
    kernel = _given(values, 1) if len(values) > 1 else p["kernel"]
    bias = _given(values, 2) if len(values) > 2 else p["bias"]
    pads = [n for pair in zip(p["pre_padding"], p["post_padding"], strict=True) for n in pair][::-1]
    # functional.pad wants the last dimension first, each as (before, after).
    pads = [n for i in range(0, len(pads), 2) for n in (pads[i + 1], pads[i])]
    spatial = len(p["stride_nd"])
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[spatial]
    x = functional.pad(x, pads)
    bias = None if bias is None else bias.to(x.dtype)
    return convolve(
        x,
        kernel.to(x.dtype),
        bias,
        stride=p["stride_nd"],
        dilation=p["dilation_nd"],
        groups=p["num_groups"],
    )


def _attention(layer: Layer, values: Values) -> Tensor:
    """``softmax(Q K^T + mask) V`` over ``[B, H, S, D]``; the scale is not the layer's business."""
    p = layer.parameters
    understood = {
        "norm_op": "SOFTMAX",
        "query_form": "PADDED_BHND",
        "key_value_form": "PADDED_BHND",
    }
    for name, value in understood.items():
        if p[name] != value:
            raise ProofFailed(f"{layer.name}: attention with {name} {p[name]} is not understood.")
    if p["causal_kind"] != "NONE" or p["num_ranks"] != 1:
        raise ProofFailed(f"{layer.name}: causal or multi-device attention is not understood.")
    q, k, v = (_given(values, i) for i in range(3))
    mask = values[3]
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=1.0, enable_gqa=grouped
    )


LAYERS: Final[Mapping[str, Callable[[Layer, Values], Tensor]]] = {
    "ACTIVATION": _activation,
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": _identity,
    "CAST": _cast,
    "CONCATENATION": _concatenation,
    "CONSTANT": _constant,
    "CONVOLUTION": _convolution,
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
