"""A TensorRT network as plain data: what was handed to the builder, layer by layer.

``engine/readback.py`` makes it from a finished ``INetworkDefinition``; ``prove/replay.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from .program import Binding

FP4: Final = torch.float4_e2m1fn_x2
"""Of tensors whose codes have 4 bits, two in a byte; their shapes count codes."""


@dataclass(frozen=True)
class Result:
    """What a layer declares that it gives."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: name of TensorRT's ``LayerType``.
        name: the layer's name.
        inputs: names of its input tensors; ``None`` where an optional one is absent.
        outputs: its output tensors.
        parameters: its attributes; enumerations by name, dtypes as torch's, weights as tensors.
    """

    kind: str
    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[Result, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """One rank's network.

    Attributes:
        layers: in the order in which they were added, which is an order of execution.
        inputs, outputs: bindings; ``node`` is the name of the tensor.
    """

    layers: tuple[Layer, ...]
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
