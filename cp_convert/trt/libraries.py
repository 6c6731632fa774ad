"""Torch-TensorRT and TensorRT, imported in the one order that works, with or without a driver.

``torch_tensorrt`` decides whether the name ``tensorrt`` means TensorRT or TensorRT-RTX, so it
comes first.
"""

# ruff: noqa: E402
from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .modelopt import without_modelopt
from .offline import driverless

logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
for _name in ("torch._opaque_base", "torch._library.opaque_object"):
    logging.getLogger(_name).setLevel(logging.ERROR)
with driverless(), without_modelopt(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_tensorrt
import tensorrt as trt
from torch_tensorrt.dynamo._settings import CompilationSettings
from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext
from torch_tensorrt.dynamo.conversion._ConverterRegistry import (
    DYNAMO_CONVERTERS,
    ConverterPriority,
    dynamo_tensorrt_converter,
)
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor
from torch_tensorrt.dynamo.lowering import get_decompositions
from torch_tensorrt.dynamo.lowering import post_lowering as _post_lowering
from torch_tensorrt.logging import _LOGGER as TENSORRT_LOG

__all__ = [
    "DYNAMO_CONVERTERS",
    "TENSORRT_LOG",
    "ConversionContext",
    "ConverterPriority",
    "Input",
    "TRTInterpreter",
    "checked_once",
    "decompositions",
    "dynamo_tensorrt_converter",
    "get_trt_tensor",
    "is_rtx",
    "post_lowering",
    "settings",
    "trt",
]

Input = torch_tensorrt.Input


def settings() -> CompilationSettings:
    """Compilation settings for whole programs with static shapes.

    Attention stays one layer; float64 tables are truncated to float32, which TensorRT needs.
    """
    return CompilationSettings(
        device=torch_tensorrt.Device(gpu_id=0),
        truncate_double=True,
        decompose_attention=False,
        require_full_compilation=True,
        immutable_weights=True,
        min_block_size=1,
    )


def decompositions() -> dict[Any, Any]:
    """Torch-TensorRT's decompositions, those that allocate on ``cuda:0`` replaced.

    Uninitialised memory becomes zeros on the tensor's own device, so that a program means the
    same wherever it is run; what is fully overwritten disappears in :mod:`cp_convert.ir.passes`.
    """
    table = dict(get_decompositions())

    def permuted(size: Sequence[int], order: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return _zeros(size, **kwargs)

    def strided(size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return _zeros(size, **kwargs)

    table[torch.ops.aten.empty_permuted.default] = permuted
    table[torch.ops.aten.empty_strided.default] = strided
    table[torch.ops.aten.empty.memory_format] = _zeros
    # Folded as it is: its decomposition differs in the last bit, which a rotary table of large
    # angles (LTX-Video's reach 15,000 radians) turns into an error of 1e-3.
    table.pop(torch.ops.aten.linspace.default, None)
    return table


def post_lowering(graph_module: fx.GraphModule, options: CompilationSettings) -> fx.GraphModule:
    """Torch-TensorRT's passes over a decomposed graph, which is changed."""
    with without_modelopt():  # folding constants asks for it each time
        done: fx.GraphModule = _post_lowering(graph_module, options)
    return done


@contextmanager
def checked_once() -> Iterator[None]:
    """Check Torch-TensorRT's registry of converters now, and not again at every look-up.

    There are two for every operator, and each would go through all of the registry: half of the
    time in which a network is made.
    """
    DYNAMO_CONVERTERS.validate_invariants()
    DYNAMO_CONVERTERS.validate_invariants = lambda: None
    try:
        yield
    finally:
        del DYNAMO_CONVERTERS.validate_invariants


def _zeros(size: Sequence[int], **kwargs: Any) -> torch.Tensor:
    return torch.full(size, 0, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def is_rtx() -> bool:
    """Whether the TensorRT that was imported is TensorRT-RTX."""
    return bool(torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx)
