"""How far a run's inputs reach beyond the scales that layers' inputs become codes by.

Scales are constants, made for some inputs; numbers beyond the last code become that code. What that
does to the output no proof has measured, so that outputs of such inputs are compared with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

from torch import Tensor, nn

from ..bundle.quantized import Quantization
from ..ir.linear8 import TYPES
from ..ir.nvfp4 import LARGEST_NUMBER
from ..ir.source import Codes

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
    with ExitStack() as hooks:
        for name, end, factors in _layers(told, codes):
            if name in held:
                note = partial(_note, found, name, end, factors)
                hooks.callback(held[name].register_forward_pre_hook(note).remove)
        yield found


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


def _layers(
    told: Quantization | None, codes: Mapping[str, Codes]
) -> Iterator[tuple[str, float, Tensor | None]]:
    """Those whose inputs have a constant scale: the module, where codes end, and the factors.

    Not those whose factors nobody knows.
    """
    if told is None or told.linears is None:
        return
    for one in told.linears.layers:
        own = codes.get(f"{one.module}.weight")
        factors = own.smooth if one.smooth and own is not None else None
        if one.input_scale is not None and (factors is not None or not one.smooth):
            kind = one.codes or told.linears.codes
            assert kind != "mixed"  # layers of several kinds say theirs
            yield one.module, one.input_scale * LARGEST_NUMBER[TYPES[kind]], factors


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
