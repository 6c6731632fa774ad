"""Torch-TensorRT and TensorRT, imported in the one order that works, with or without a driver.

``torch_tensorrt`` decides whether the name ``tensorrt`` means TensorRT or TensorRT-RTX, so it
comes first.
"""

# ruff: noqa: E402, I001
from __future__ import annotations

import logging
import warnings
from typing import Any

from .offline import driverless

logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
for _name in ("torch._opaque_base", "torch._library.opaque_object"):
    logging.getLogger(_name).setLevel(logging.ERROR)
with driverless(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_tensorrt
import tensorrt as trt
from torch_tensorrt.dynamo._settings import CompilationSettings
from torch_tensorrt.dynamo._SourceIR import SourceIR
from torch_tensorrt.dynamo.conversion import impl
from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext
from torch_tensorrt.dynamo.conversion._ConverterRegistry import (
    DYNAMO_CONVERTERS,
    ConverterPriority,
    dynamo_tensorrt_converter,
)
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor
from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering
from torch_tensorrt.dynamo.lowering.constant_fold_exclusions import (
    CONSTANT_FOLD_EXCLUSION_META_KEY,
)
from torch_tensorrt.logging import _LOGGER as TENSORRT_LOG

__all__ = [
    "DYNAMO_CONVERTERS",
    "TENSORRT_LOG",
    "ConversionContext",
    "ConverterPriority",
    "Input",
    "SourceIR",
    "TRTInterpreter",
    "dynamo_tensorrt_converter",
    "exclude_from_folding",
    "get_decompositions",
    "get_trt_tensor",
    "impl",
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


def exclude_from_folding(node: Any) -> None:
    """Keep Torch-TensorRT from evaluating a node whose arguments are constants."""
    node.meta.setdefault(CONSTANT_FOLD_EXCLUSION_META_KEY, set()).add("cp_convert")


def is_rtx() -> bool:
    """Whether the TensorRT that was imported is TensorRT-RTX."""
    return bool(torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx)
