"""Modules that NVIDIA ModelOpt has quantized live, in ``build_model()``: read, and taken off.

In: a module with quantizers in it (``modelopt.torch.quantization.quantize``). Out: the module as it
was before, and by the name of a weight its codes and scales, as ModelOpt's export would write them:
``amax / 448`` for FP8 and ``amax / 127`` for INT8. ModelOpt itself is not needed; what a quantizer
does is read from its attributes (ModelOpt 0.47, ``TensorQuantizer``). Inputs of norms and other
layers without weights that are multiplied stay as they are, as in the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import ModelFileError, UsageError
from ..ir.attention8 import Steps
from ..ir.quantize import FP8, INT8, LARGEST, quantize
from ..job import Job
from .coded import Coded
from .formats import FLOAT8
from .weights import Filled

_SUFFIX: Final = "_quantizer"
_OWN: Final = ("input_quantizer", "weight_quantizer", "output_quantizer")
_ATTENDED: Final = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
_BITS: Final[dict[Any, torch.dtype]] = {(4, 3): FP8, 8: INT8}
"""The codes' type, by what ModelOpt calls ``num_bits``."""
_WITHOUT_WEIGHT: Final = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TAKES: Final = (
    "FP8 with one scale a tensor and INT8 with one a row of the weight are taken, both with "
    "constant scales of the input; mtq.disable_quantizer leaves a layer as it is."
)


@dataclass(frozen=True)
class Live:
    """What was quantized.

    Attributes:
        coded: how weights are read, by name.
        codes: of these weights.
        told: what a person should know.
        steps: by the path of a module that attends over codes, what these stand for.
    """

    coded: Mapping[str, Coded]
    codes: Mapping[str, Tensor]
    told: tuple[str, ...] = ()
    steps: Mapping[str, Steps] = field(default_factory=dict)

    def fill(self, filled: Filled, module: nn.Module) -> Filled:
        """Give the weights the numbers that their codes stand for, in the module's types."""
        if not self.coded:
            return replace(filled, told=(*filled.told, *self.told))
        with torch.no_grad():
            for name, own in self.coded.items():
                parameter = module.get_parameter(name)
                parameter.copy_(own.numbers(self.codes[name], parameter.dtype))
        codes = {name: own.of(self.codes[name]) for name, own in self.coded.items()}
        return replace(filled, told=(*filled.told, *self.told), codes=codes)


def taken_off(module: nn.Module, job: Job, *, alone: bool) -> Live:
    """The quantizers of ``module``, which has none afterwards.

    Args:
        module: as ``build_model()`` returned it; it is changed in place.
        job: whose it is.
        alone: whether all ranks have this module.

    Raises:
        ModelFileError: a quantizer whose products are not done, or that has no scale.
        UsageError: the job would give the weights other numbers, or takes codes for numbers.
    """
    held = [(name, one, _quantizers(one)) for name, one in module.named_modules()]
    held = [found for found in held if found[2]]
    if not held:
        return Live({}, {})
    if not alone:
        raise _refused("build_model(rank)", "quantizes every rank by itself", "quantize one model.")
    _check(job)
    coded, norms, steps = dict[str, Coded](), 0, dict[str, Steps]()
    owners: dict[Tensor, str] = {}
    for name, one, quantizers in held:
        if (of_attention := _of_attention(name, quantizers)) is not None:
            steps[name] = of_attention
        elif not isinstance(one, nn.Linear):
            norms += _is_left(name, one, quantizers)
        elif (own := _of_linear(name, one, quantizers)) is not None:
            if (other := owners.setdefault(one.weight, name)) != name:
                raise _refused(name, f"has the weight of {other}, with a quantizer of its own")
            coded[f"{name}.weight"] = own
    codes = {name: _codes(module.get_parameter(name), own) for name, own in coded.items()}
    for _, one, _ in held:
        _restore(one)
    return Live(coded, codes, tuple(_told(coded, norms)), steps)


def _check(job: Job) -> None:
    if job.weights is not None:
        raise UsageError(
            f"--weights: build_model() of {job.model.name} quantizes the model, and other weights "
            "need other scales.",
            hint="load them in build_model(), before the model is quantized.",
        )
    if FLOAT8 in job.allow_cast:
        raise UsageError(
            "--allow-cast float8 is for files; build_model() quantizes the model.",
            hint="return the model that is not quantized.",
        )


def _quantizers(one: nn.Module) -> dict[str, nn.Module]:
    """Those that a module holds itself, by name."""
    return {
        name: child
        for name, child in one.named_children()
        if name.endswith(_SUFFIX)
        and (hasattr(child, "num_bits") or isinstance(child, nn.Sequential))
    }


def _is_on(quantizer: nn.Module) -> bool:
    if isinstance(quantizer, nn.Sequential):
        return any(_is_on(one) for one in quantizer)
    return bool(getattr(quantizer, "is_enabled", False))


def _acts(quantizer: nn.Module) -> bool:
    """Whether it changes what passes through it; some do when they are switched off."""
    if isinstance(quantizer, nn.Sequential):
        return any(_acts(one) for one in quantizer)
    rotates = bool(getattr(quantizer, "rotate_is_enabled", False))
    has_factors = getattr(quantizer, "pre_quant_scale", None) is not None
    return _is_on(quantizer) or rotates or has_factors


def _is_left(name: str, one: nn.Module, found: Mapping[str, nn.Module]) -> bool:
    """Whether a module that is no linear layer has quantizers that ModelOpt's export leaves out."""
    on = [own for own, quantizer in found.items() if _acts(quantizer)]
    if not on:
        return False
    if isinstance(one, _WITHOUT_WEIGHT) and on == ["input_quantizer"]:
        return True
    what = "attention" if not set(on) <= set(_OWN) else f"a {type(one).__name__}"
    raise _refused(f"{name}.{on[0]}", f"quantizes {what}, which is not done")


def _of_attention(name: str, found: Mapping[str, nn.Module]) -> Steps | None:
    """What the codes of q, k and v stand for; ``None``: it attends over none, or does not attend.

    What the softmax gives is measured by one, and what attention gives is not rounded.
    """
    on = {own for own in _ATTENDED if own in found and _acts(found[own])}
    if not on:
        return None
    if lacking := [own for own in _ATTENDED if own not in on]:
        raise _refused(f"{name}.{min(on)}", f"quantizes attention without a {lacking[0]}")
    for own in _ATTENDED:
        _check_quantizer(f"{name}.{own}", found[own])
        if _BITS[_bits(found[own])] != FP8:
            raise _refused(f"{name}.{own}", "quantizes attention to other codes than FP8")
    q, k, v = (float(_scales(f"{name}.{own}", found[own], FP8, None)) for own in _ATTENDED)
    return q, k, v


def _of_linear(name: str, one: nn.Linear, found: Mapping[str, nn.Module]) -> Coded | None:
    """How a linear layer is quantized; ``None``: not at all."""
    on = {own: quantizer for own, quantizer in found.items() if _acts(quantizer)}
    if others := [own for own in on if own not in ("input_quantizer", "weight_quantizer")]:
        raise _refused(f"{name}.{others[0]}", "quantizes what the layer returns, which is not done")
    for own, quantizer in on.items():
        _check_quantizer(f"{name}.{own}", quantizer)
    smooth = _smooth(name, on.get("input_quantizer"), one.weight.shape[1])
    on = {own: quantizer for own, quantizer in on.items() if _is_on(quantizer)}
    if not on:
        _fold(one, smooth)
        return None
    if "weight_quantizer" not in on:
        raise _refused(name, "quantizes its input and not its weight")
    dtype = _BITS[_bits(on["weight_quantizer"])]
    rows = one.weight.shape[0] if dtype == INT8 else None
    of_weight = _scales(f"{name}.weight_quantizer", on["weight_quantizer"], dtype, rows)
    scale = of_weight if dtype == INT8 else float(of_weight)
    if "input_quantizer" not in on:
        return Coded(scale, None, smooth=smooth, dtype=dtype)
    of_input = on["input_quantizer"]
    if _BITS[_bits(of_input)] != dtype:
        raise _refused(name, "has a weight and an input in different types")
    step = float(_scales(f"{name}.input_quantizer", of_input, dtype, None))
    return Coded(scale, step, smooth=smooth, dtype=dtype)


def _bits(quantizer: nn.Module) -> Any:
    bits = getattr(quantizer, "num_bits", None)
    return tuple(bits) if isinstance(bits, list | tuple) else bits


def _check_quantizer(name: str, quantizer: nn.Module) -> None:
    """Refuse what is no constant scale of whole tensors or rows."""
    if isinstance(quantizer, nn.Sequential):
        raise _refused(name, "quantizes twice")
    if _bits(quantizer) not in _BITS:
        raise _refused(name, f"has num_bits {getattr(quantizer, 'num_bits', None)}")
    for what, told in (
        ("block_sizes", "has scales of blocks"),
        ("_dynamic", "has dynamic scales"),
        ("unsigned", "has codes without a sign"),
        ("bias", "adds a bias before it rounds"),
        ("rotate_is_enabled", "rotates what it quantizes"),
        ("_if_calib", "is being calibrated still"),
    ):
        if getattr(quantizer, what, None) not in (None, False):
            raise _refused(name, told)
    if getattr(quantizer, "_if_quant", True) is False:
        raise _refused(name, "is being calibrated still")
    if not getattr(quantizer, "fake_quant", True):
        raise _refused(name, "holds compressed weights", "export the model (docs/quantized.md).")


def _scales(name: str, quantizer: nn.Module, dtype: torch.dtype, rows: int | None) -> Tensor:
    """What a code of 1 stands for, float32: ``[]``, or ``[rows]``."""
    largest = getattr(quantizer, "amax", None)
    if not isinstance(largest, Tensor):
        raise _refused(name, "has no amax, as nothing was calibrated")
    largest = largest.detach().float().flatten()
    if largest.numel() not in (1, rows):
        raise _refused(name, f"has {largest.numel()} scales, and {rows or 1} are taken")
    if not bool(largest.isfinite().all()) or not bool((largest >= 0).all()) or not largest.any():
        raise _refused(name, f"has an amax of {float(largest[0])}")
    if rows is not None:  # a row of zeros has no scale; any will do
        largest = torch.where(largest > 0, largest, largest.max()).expand(rows).contiguous()
        return largest / LARGEST[dtype]
    return largest[0] / LARGEST[dtype]


def _fold(one: nn.Linear, factors: Tensor | None) -> None:
    """Multiply the columns of a plain weight: its quantizer is off, and would multiply the input.

    SmoothQuant has divided them.
    """
    if factors is not None:
        with torch.no_grad():
            one.weight.copy_(one.weight.float() * factors)


def _smooth(name: str, quantizer: nn.Module | None, columns: int) -> Tensor | None:
    factors = getattr(quantizer, "pre_quant_scale", None)
    if not isinstance(factors, Tensor):
        return None
    factors = factors.detach().float().flatten()
    if factors.numel() != columns or not bool(((factors > 0) & factors.isfinite()).all()):
        raise _refused(f"{name}.input_quantizer", "has a pre_quant_scale that is none")
    return factors


def _codes(weight: Tensor, own: Coded) -> Tensor:
    numbers, scale = weight.detach(), own.weight_scale
    if isinstance(scale, Tensor):
        return quantize(numbers.float() / scale[:, None], 1.0, own.dtype)
    return quantize(numbers, scale, own.dtype)


def _restore(one: nn.Module) -> None:
    """The class that ModelOpt has put its own in front of, and no quantizers."""
    for name in _quantizers(one):
        del one._modules[name]
    own = next(c for c in type(one).__mro__ if not c.__module__.startswith("modelopt."))
    object.__setattr__(one, "__class__", own)


def _told(coded: Mapping[str, Coded], norms: int) -> Iterator[str]:
    if norms:
        yield (
            f"the inputs of {norms} norms are quantized by ModelOpt in the module; they are left "
            "as they are, as ModelOpt's export leaves them"
        )
    if coded:
        yield f"{len(coded)} linear layers quantized by ModelOpt in build_model()"


def _refused(name: str, what: str, hint: str = _TAKES) -> ModelFileError:
    return ModelFileError(f"{name} {what}: it was quantized by ModelOpt.", hint=hint)
