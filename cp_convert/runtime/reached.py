"""How far a run's inputs reach beyond the scales that layers' inputs become codes by.

Scales are constants, made for some inputs; numbers beyond the last code become that code. What that
does to the output no proof has measured, so that outputs of such inputs are compared with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from torch import Tensor, nn

from ..bundle.quantized import Layer, Quantization
from ..ir.nvfp4 import LARGEST_OF_ALL
from ..ir.quantize import FP8, INT8, LARGEST
from ..ir.source import Codes

_ENDS: Final = {"fp8": LARGEST[FP8], "int8": LARGEST[INT8], "nvfp4": float(LARGEST_OF_ALL)}
"""The largest code, by what a layer's codes are called."""
_FAR: Final = 1.25
"""Numbers may be larger than those that scales were made for, by as much as these vary."""


@contextmanager
def watched(
    module: nn.Module, told: Quantization | None, codes: Mapping[str, Codes]
) -> Iterator[dict[str, tuple[float, float]]]:
    """Note what the layers' inputs reach, and where their codes end, while the module runs.

    Args:
        module: the dense model.
        told: what the bundle says of its layers.
        codes: of the model's weights, by name; those by which columns are multiplied before are
            among them.
    """
    found: dict[str, tuple[float, float]] = {}
    held = dict(module.named_modules())
    handles = [
        held[layer.module].register_forward_pre_hook(
            partial(_note, found, layer.module, _end(told, layer), factors)
        )
        for layer in _layers(told)
        if layer.module in held
        and ((factors := _factors(codes, layer)) is not None or not layer.smooth)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def beyond(found: Mapping[str, tuple[float, float]]) -> str | None:
    """In words the layer that is farthest beyond; ``None`` where none is far."""
    far = {name: reach / end for name, (reach, end) in found.items() if reach > _FAR * end}
    if not far:
        return None
    name = max(far, key=lambda one: far[one])
    reach, end = found[name]
    return (
        f"these inputs are larger than those that the scales were made for: what goes into {name} "
        f"reaches {reach:.3g}, and its codes end at {end:.3g} (--inputs takes others)"
    )


def _layers(told: Quantization | None) -> Sequence[Layer]:
    if told is None or told.linears is None:
        return ()
    return [one for one in told.linears.layers if one.input_scale is not None]


def _end(told: Quantization | None, layer: Layer) -> float:
    assert told is not None and told.linears is not None and layer.input_scale is not None
    return layer.input_scale * _ENDS[layer.codes or told.linears.codes]


def _factors(codes: Mapping[str, Codes], layer: Layer) -> Tensor | None:
    own = codes.get(f"{layer.module}.weight")
    return None if own is None or not layer.smooth else own.smooth


def _note(
    found: dict[str, tuple[float, float]],
    name: str,
    end: float,
    factors: Tensor | None,
    _: nn.Module,
    given: tuple[Tensor, ...],
) -> None:
    x = next((one.detach().float() for one in given if one.numel()), None)
    if x is None:  # no rows, or by name
        return
    reach = float((x if factors is None else x * factors.to(x.device)).abs().amax())
    found[name] = (max(reach, found.get(name, (0.0, end))[0]), end)
