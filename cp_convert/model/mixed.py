"""Checkpoints of NVIDIA ModelOpt whose layers are quantized by several algorithms.

In: what ``config.json`` says of each layer. Out: the algorithm of each, which its tensors are.
ModelOpt (0.47) writes so where layers are quantized in more than one way::

    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"x": {"quant_algo": "FP8"},
                         "y": {"quant_algo": "NVFP4", "group_size": 16}, ...}

and with ``pre_quant_scale`` and ``has_zero_point`` where the algorithm is one that smooths. A layer
that is not named is not quantized. Neither word is taken for the other: what is said of a layer and
what is stored of it must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import WeightsError
from ..ir.nvfp4 import BLOCK, PAIRS
from ..ir.tensors import Location
from .coded import WEIGHT
from .quantized import UNQUANTIZED
from .schemes import IS_LOW_RANK, LOW_RANK, SMOOTH, TYPES

MIXED: Final = "MIXED_PRECISION"
LAYERS: Final = "quantized_layers"
_KNOWN: Final = ("quant_algo", "group_size", "has_zero_point", SMOOTH[1:])
"""What may be said of a layer."""


def algorithms(
    told: Mapping[str, Any], config: Path, stored: Mapping[str, Location]
) -> dict[str, str]:
    """``quant_algo`` of each layer that is quantized.

    Args:
        told: what ``config`` says of quantization.
        config: the file, for messages.
        stored: what the weights' files hold, by name.

    Raises:
        WeightsError: a layer's algorithm is none that is taken, or its tensors are of another.
    """
    layers = told.get(LAYERS)
    if not isinstance(layers, dict) or not layers:
        raise WeightsError(
            f"the checkpoint is quantized by ModelOpt to {MIXED}, and no {LAYERS} say which layer "
            "is what.",
            where=str(config),
            hint="export it again; " + UNQUANTIZED,
        )
    found = {layer: _algorithm(layer, one, config) for layer, one in layers.items()}
    for layer, algorithm in found.items():
        if why := _disagreement(layer, algorithm, layers[layer].get(SMOOTH[1:]), stored):
            raise _mixed_up(f"say that {layer} is {algorithm}, and {why}", config)
    types = set(TYPES.values())
    for name, at in stored.items():
        if name.endswith(WEIGHT) and at.dtype in types and name.removesuffix(WEIGHT) not in found:
            raise _mixed_up(f"do not name {name}, which is stored as {at.kind}", config)
    return found


def _algorithm(layer: str, one: Any, config: Path) -> str:
    """Of one layer, where everything that is said of it is understood."""
    told = one if isinstance(one, dict) else {}
    algorithm, size = told.get("quant_algo"), told.get("group_size")
    what = next((key for key in told if key not in _KNOWN), None)
    if not isinstance(algorithm, str) or algorithm not in TYPES:
        what = f"{algorithm or one}, of which cp-convert takes {', '.join(TYPES)}"
    elif what is not None:
        what = f"{algorithm} with {what}, which is not understood"
    elif told.get("has_zero_point", False) is not False:
        what = f"{algorithm} with a zero point, which its codes have none of"
    elif told.get(SMOOTH[1:], False) not in (False, True):
        what = f"{algorithm} with a {SMOOTH[1:]} of {told[SMOOTH[1:]]}, which is not understood"
    elif size is not None and TYPES[algorithm] != PAIRS:
        what = f"{algorithm} with a group_size of {size}, and has no blocks"
    elif size is not None and (type(size) is not int or size != BLOCK):
        what = f"{algorithm} with a group_size of {size}, where blocks of {BLOCK} are taken"
    if what is not None:
        raise WeightsError(
            f"{layer} is quantized by ModelOpt to {what}.",
            where=str(config),
            hint="export this layer as FP8, INT8 or NVFP4, or not quantized; " + UNQUANTIZED,
        )
    return str(algorithm)


def _disagreement(
    layer: str, algorithm: str, is_smooth: bool | None, stored: Mapping[str, Location]
) -> str:
    """In what a layer's tensors are not its algorithm's; nothing where they are.

    Args:
        layer: its name.
        algorithm: that is said of it.
        is_smooth: whether its input is said to be multiplied before; ``None``: nothing is said.
        stored: what the files hold.
    """
    at, smooth = stored.get(layer + WEIGHT), layer + SMOOTH
    low_rank = [layer + one for one in LOW_RANK if layer + one in stored]
    if at is None:
        return f"{layer}{WEIGHT} is not there"
    if at.dtype != TYPES[algorithm]:
        return f"{layer}{WEIGHT} of {at.file.name} is stored as {at.kind}"
    if low_rank and algorithm != IS_LOW_RANK:
        return f"{low_rank[0]} is there"
    if is_smooth is True and smooth not in stored:
        return f"that it has a {SMOOTH[1:]}, and {smooth} is missing"
    if is_smooth is False and smooth in stored:
        return f"that it has no {SMOOTH[1:]}, and {smooth} is there"
    return ""


def _mixed_up(what: str, config: Path) -> WeightsError:
    return WeightsError(
        f"{LAYERS} of {config.name} {what}.",
        where=str(config),
        hint="the checkpoint is mixed up; fetch or export it again.",
    )
