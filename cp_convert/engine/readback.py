"""A finished ``INetworkDefinition`` as plain data, for the proof.

TensorRT's Python binding hands out every layer as a plain ``ILayer``; its own attributes read back
once the object's class is set to the layer's. Those of ``IDistCollectiveLayer`` do not (but for
``num_ranks``), so they come from the metadata that the converter wrote.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ProofFailed
from ..ir.network import FP4, Layer, Network, Result
from ..ir.program import Binding
from ..trt.libraries import trt

DTYPES: Final = {
    trt.float32: torch.float32,
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.int64: torch.int64,
    trt.int32: torch.int32,
    trt.int8: torch.int8,
    trt.fp8: torch.float8_e4m3fn,
    trt.fp4: FP4,
    trt.uint8: torch.uint8,
    trt.bool: torch.bool,
}


def read_network(network: Any, known: Iterable[Tensor] = ()) -> Network:
    """Everything that the builder is given.

    Args:
        network: a finished ``INetworkDefinition``.
        known: tensors that are alive anyway (the model's parameters, other ranks' constants);
            a constant that equals one of them is replaced by it instead of being copied.

    Raises:
        ProofFailed: a layer that cannot be read, or a tensor name that is used twice.
    """
    pool = _Pool(known)
    layers = tuple(_layer(network.get_layer(i), pool) for i in range(network.num_layers))
    names = [result.name for layer in layers for result in layer.outputs]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ProofFailed(f"the network has several tensors called {', '.join(twice)}.")
    return Network(
        layers,
        tuple(_binding(network.get_input(i)) for i in range(network.num_inputs)),
        tuple(_binding(network.get_output(i)) for i in range(network.num_outputs)),
    )


def constants_of(networks: Iterable[Network]) -> list[Tensor]:
    """All weights that the networks hold, for the next :func:`read_network`."""
    return [
        value
        for network in networks
        for layer in network.layers
        for value in layer.parameters.values()
        if isinstance(value, Tensor)
    ]


class _Pool:
    """Shares equal constants, so that W networks hold one copy of the weights.

    TensorRT keeps a reference to the numbers it is given, so most constants are found by address.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.by_address: dict[int, Tensor] = {}
        self.by_sample: dict[tuple[object, ...], list[Tensor]] = {}
        for tensor in known:
            if tensor.is_contiguous():
                self._add(tensor.detach().view(-1))

    def _add(self, flat: Tensor) -> None:
        self.by_address[flat.data_ptr()] = flat
        self.by_sample.setdefault(_sample(flat), []).append(flat)

    def share(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``flat`` in ``shape``; the pool's own tensor where it holds an equal one."""
        at_address = self.by_address.get(flat.data_ptr())
        candidates = self.by_sample.get(_sample(flat), [])
        if at_address is not None and at_address.dtype == flat.dtype:
            candidates = [at_address, *candidates]
        for tensor in candidates:
            if tensor.shape == flat.shape and torch.equal(tensor, flat):
                return tensor.view(shape)
        copy = flat.clone()
        self._add(copy)
        return copy.view(shape)


def _sample(flat: Tensor) -> tuple[object, ...]:
    """Type, length and a few of the numbers: what equal tensors have in common."""
    step = max(1, flat.numel() // 16)
    return (flat.dtype, flat.numel(), *flat[::step].tolist())


def _layer(layer: Any, pool: _Pool) -> Layer:
    kind = layer.type.name
    read = _READERS.get(kind)
    if read is None:
        raise ProofFailed(
            f"the network proof cannot read a {kind} layer ({layer.name}).",
            hint="--proof program leaves the network unchecked.",
        )
    cls, attributes = read
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    layer.__class__ = cls
    return Layer(
        kind=kind,
        name=layer.name,
        inputs=tuple(_name(layer.get_input(i)) for i in range(layer.num_inputs)),
        outputs=tuple(Result(t.name, _dtype(t), tuple(t.shape)) for t in outputs),
        parameters=attributes(layer, pool),
    )


def _name(tensor: Any) -> str | None:
    return None if tensor is None else str(tensor.name)


def _dtype(tensor: Any) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise ProofFailed(f"the network proof does not know {tensor.dtype} ({tensor.name}).")
    return DTYPES[tensor.dtype]


def _binding(tensor: Any) -> Binding:
    return Binding(tensor.name, tensor.name, _dtype(tensor), tuple(tensor.shape))


Attributes = Callable[[Any, _Pool], Mapping[str, Any]]


def _plain(*names: str) -> Attributes:
    """Attributes as they are; enumerations by name, dimensions as tuples."""

    def read(layer: Any, pool: _Pool) -> dict[str, Any]:
        return {name: _value(getattr(layer, name)) for name in names}

    return read


def _value(value: Any) -> Any:
    if isinstance(value, trt.DataType):
        return DTYPES[value]
    if hasattr(value, "name") and hasattr(value, "value"):
        return value.name
    if isinstance(value, trt.Dims | trt.Permutation):
        return tuple(value)
    return value


def _constant(layer: Any, pool: _Pool) -> dict[str, Any]:
    tensor = layer.get_output(0)
    return {"value": _weights(layer.weights, _dtype(tensor), tuple(layer.shape), pool)}


def _weights(weights: Any, dtype: torch.dtype, shape: tuple[int, ...], pool: _Pool) -> Tensor:
    """Weights as a tensor; TensorRT hands them out as numpy arrays, but for bfloat16.

    Codes of 4 bits are bytes of two each: ``[.., K/2]``.
    """
    if dtype == FP4:
        dtype, shape = torch.uint8, (*shape[:-1], shape[-1] // 2)
    if isinstance(weights, trt.Weights):
        size = prod(shape) * dtype.itemsize
        buffer = (ctypes.c_char * size).from_address(_address_of(weights))
        return pool.share(torch.frombuffer(buffer, dtype=dtype), shape)
    return pool.share(torch.from_numpy(weights.reshape(-1)).view(dtype), shape)


class _NativeWeights(ctypes.Structure):
    """``nvinfer1::Weights`` (NvInferRuntimeBase.h)."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


def _address_of(weights: Any) -> int:
    """Where the numbers lie: numpy has no bfloat16, and the binding shows no address.

    pybind11 keeps a pointer to the native object behind the object's header. What is found there
    must tell the same type and count as the binding does, or it is not used.
    """
    pointer = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    native = _NativeWeights.from_address(pointer or 0) if pointer else _NativeWeights()
    if (native.type, native.count) != (int(weights.dtype), weights.size) or not native.values:
        raise ProofFailed(
            f"the network proof cannot read weights of {weights.dtype}.",
            hint="--proof program leaves the network unchecked.",
        )
    return int(native.values)


def _deconvolution(layer: Any, pool: _Pool) -> dict[str, Any]:
    read = _convolution(layer, pool)
    if "kernel" in read:
        outputs = layer.num_output_maps // layer.num_groups
        shape = (layer.get_input(0).shape[1], outputs, *tuple(layer.kernel_size_nd))
        read["kernel"] = read["kernel"].reshape(shape)
    return read


def _convolution(layer: Any, pool: _Pool) -> dict[str, Any]:
    names = ("stride_nd", "dilation_nd", "pre_padding", "post_padding", "num_groups")
    read = dict(_plain(*names, "padding_mode", "num_output_maps", "kernel_size_nd")(layer, pool))
    dtype = _dtype(layer.get_output(0))
    if layer.num_inputs < 2:
        outputs, kernel = layer.num_output_maps, tuple(layer.kernel_size_nd)
        inputs = layer.get_input(0).shape[1] // layer.num_groups
        read["kernel"] = _weights(layer.kernel, dtype, (outputs, inputs, *kernel), pool)
    if layer.num_inputs < 3:
        bias = layer.bias
        is_absent = bias is None or (getattr(bias, "size", 0) == 0)
        read["bias"] = None if is_absent else _weights(bias, dtype, (layer.num_output_maps,), pool)
    return read


def _shuffle(layer: Any, pool: _Pool) -> dict[str, Any]:
    dims = layer.reshape_dims
    return {
        "first": tuple(layer.first_transpose),
        "second": tuple(layer.second_transpose),
        "dims": None if dims is None else tuple(dims),
        "zero_is_placeholder": layer.zero_is_placeholder,
        "rank": len(layer.get_input(0).shape),
        "output_rank": len(layer.get_output(0).shape),
    }


def _attention_input(layer: Any, pool: _Pool) -> dict[str, Any]:
    attention = layer.attention
    names = ("norm_op", "causal_kind", "query_form", "key_value_form", "num_ranks", "decomposable")
    shares = attention.normalization_quantize_scale  # without one, asking for the type is an error
    return {
        **_plain(*names)(attention, pool),
        "shares": None if shares is None else DTYPES[attention.normalization_quantize_to_type],
        "mask": _name(attention.mask),
        "output": attention.get_output(0).name,
    }


def _collective(layer: Any, pool: _Pool) -> dict[str, Any]:
    told = json.loads(layer.metadata)
    return {**told, "num_ranks": layer.num_ranks}


_READERS: Final[Mapping[str, tuple[Any, Attributes]]] = {
    "ACTIVATION": (
        trt.IActivationLayer,
        lambda layer, pool: {
            "op": trt.IActivationLayer.type.fget(layer).name,
            "alpha": layer.alpha,
            "beta": layer.beta,
        },
    ),
    "ATTENTION_INPUT": (trt.IAttentionInputLayer, _attention_input),
    "ATTENTION_OUTPUT": (trt.IAttentionOutputLayer, _plain()),
    "CAST": (trt.ICastLayer, _plain("to_type")),
    "CONCATENATION": (trt.IConcatenationLayer, _plain("axis")),
    "CONSTANT": (trt.IConstantLayer, _constant),
    "CONVOLUTION": (trt.IConvolutionLayer, _convolution),
    "DECONVOLUTION": (trt.IDeconvolutionLayer, _deconvolution),
    "DIST_COLLECTIVE": (trt.IDistCollectiveLayer, _collective),
    "ELEMENTWISE": (trt.IElementWiseLayer, _plain("op")),
    "GATHER": (trt.IGatherLayer, _plain("axis", "mode", "num_elementwise_dims")),
    "IDENTITY": (trt.IIdentityLayer, _plain()),
    "MATRIX_MULTIPLY": (trt.IMatrixMultiplyLayer, _plain("op0", "op1")),
    "NORMALIZATION": (
        trt.INormalizationLayer,
        _plain("axes", "epsilon", "num_groups", "is_v2"),
    ),
    "DEQUANTIZE": (trt.IDequantizeLayer, _plain("axis")),
    "DYNAMIC_QUANTIZE": (
        trt.IDynamicQuantizeLayer,
        _plain("axis", "block_size", "to_type", "scale_type"),
    ),
    "POOLING": (
        trt.IPoolingLayer,
        lambda layer, pool: {
            "type": trt.IPoolingLayer.type.fget(layer).name,
            **_plain(
                "window_size_nd",
                "stride_nd",
                "pre_padding",
                "post_padding",
                "padding_mode",
                "average_count_excludes_padding",
            )(layer, pool),
        },
    ),
    "QUANTIZE": (trt.IQuantizeLayer, _plain("axis")),
    "REDUCE": (trt.IReduceLayer, _plain("op", "axes", "keep_dims")),
    "SCATTER": (trt.IScatterLayer, _plain("mode", "axis")),
    "SELECT": (trt.ISelectLayer, _plain()),
    "SHAPE": (trt.IShapeLayer, _plain()),
    "SHUFFLE": (trt.IShuffleLayer, _shuffle),
    "SLICE": (trt.ISliceLayer, _plain("start", "shape", "stride", "mode", "axes")),
    "SOFTMAX": (trt.ISoftMaxLayer, _plain("axes")),
    "SQUEEZE": (trt.ISqueezeLayer, _plain()),
    "UNARY": (trt.IUnaryLayer, _plain("op")),
    "UNSQUEEZE": (trt.IUnsqueezeLayer, _plain()),
}
