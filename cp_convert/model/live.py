"""Modules that NVIDIA ModelOpt has quantized live, in ``build_model()``: read, and taken off.

In: a module with quantizers in it (``modelopt.torch.quantization.quantize``). Out: the module as it
was before, and by the name of a weight its codes and scales, as ModelOpt's export would write them.
ModelOpt itself is not needed (:mod:`.quantizers`). Inputs of norms and other layers without weights
that are multiplied stay as they are, as in the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ir.attention8 import Steps
from ..ir.nvfp4 import BLOCK, PAIRS, pairs, quantize_blocks
from ..ir.quantize import FP8, INT8, quantize
from ..job import Job
from .coded import Coded
from .formats import FLOAT8
from .quantizers import (
    acts,
    factors_of,
    has_low_rank,
    is_idle,
    is_on,
    low_rank_of,
    quantizers_of,
    refused,
    scales,
    type_of,
    without_quantizers,
)
from .weights import Filled

_OWN: Final = ("input_quantizer", "weight_quantizer", "output_quantizer")
_ATTENDED: Final = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
_PROBABILITIES: Final = "softmax_quantizer"
_WITHOUT_WEIGHT: Final = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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
    held = [(name, one, quantizers_of(one)) for name, one in module.named_modules()]
    held = [found for found in held if found[2]]
    if not held:
        return Live({}, {})
    if not alone:
        raise refused("build_model(rank)", "quantizes every rank by itself", "quantize one model.")
    _check(job)
    coded, codes, norms, steps = dict[str, Coded](), dict[str, Tensor](), 0, dict[str, Steps]()
    owners: dict[Tensor, str] = {}
    for name, one, quantizers in held:
        if (of_attention := _of_attention(name, quantizers)) is not None:
            steps[name] = of_attention
        elif not isinstance(one, nn.Linear):
            norms += _is_left(name, one, quantizers)
        elif (own := _of_linear(name, one, quantizers)) is not None:
            if (other := owners.setdefault(one.weight, name)) != name:
                raise refused(name, f"has the weight of {other}, with a quantizer of its own")
            coded[f"{name}.weight"], codes[f"{name}.weight"] = _codes(one.weight, own)
    for _, one, _ in held:
        without_quantizers(one)
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


def _is_left(name: str, one: nn.Module, found: Mapping[str, nn.Module]) -> bool:
    """Whether a module that is no linear layer has quantizers that ModelOpt's export leaves out."""
    # ModelOpt's presets switch it on wherever there is attention; one call that attends, as
    # diffusers' is, gives it nothing, and the export leaves it out.
    idle = _PROBABILITIES in found and is_idle(found[_PROBABILITIES])
    on = [own for own, one in found.items() if acts(one) and not (idle and own == _PROBABILITIES)]
    if not on:
        return False
    if isinstance(one, _WITHOUT_WEIGHT) and on == ["input_quantizer"]:
        return True
    what = "attention" if not set(on) <= set(_OWN) else f"a {type(one).__name__}"
    raise refused(f"{name}.{on[0]}", f"quantizes {what}, which is not done")


def _of_attention(name: str, found: Mapping[str, nn.Module]) -> Steps | None:
    """What the codes of q, k and v stand for; ``None``: it attends over none, or does not attend.

    What the softmax gives is measured by one, and what attention gives is not rounded.
    """
    on = {own for own in _ATTENDED if own in found and acts(found[own])}
    if not on:
        return None
    if lacking := [own for own in _ATTENDED if own not in on]:
        raise refused(f"{name}.{min(on)}", f"quantizes attention without a {lacking[0]}")
    for own in _ATTENDED:
        if type_of(f"{name}.{own}", found[own]) != FP8:
            raise refused(f"{name}.{own}", "quantizes attention to other codes than FP8")
    q, k, v = (float(scales(f"{name}.{own}", found[own], FP8, None)) for own in _ATTENDED)
    return q, k, v


def _of_linear(name: str, one: nn.Linear, found: Mapping[str, nn.Module]) -> Coded | None:
    """How a linear layer is quantized, but for scales of blocks; ``None``: not at all."""
    on = {own: quantizer for own, quantizer in found.items() if acts(quantizer)}
    if others := [own for own in on if own not in ("input_quantizer", "weight_quantizer")]:
        raise refused(f"{name}.{others[0]}", "quantizes what the layer returns, which is not done")
    types = {own: type_of(f"{name}.{own}", quantizer) for own, quantizer in on.items()}
    of_input, of_weight = on.get("input_quantizer"), on.get("weight_quantizer")
    smooth = factors_of(f"{name}.input_quantizer", of_input, one.weight.shape[1])
    low_rank = low_rank_of(f"{name}.weight_quantizer", of_weight, one.weight)
    multiplied = of_input if of_input is not None and is_on(of_input) else None
    if of_weight is None or not is_on(of_weight):
        if multiplied is not None:
            raise refused(name, "quantizes its input and not its weight")
        _fold(one, smooth, low_rank)
        return None
    dtype = types["weight_quantizer"]
    if has_low_rank(of_weight) and dtype != PAIRS:
        raise refused(f"{name}.weight_quantizer", "adds a low rank to codes of 8 bits")
    if dtype == PAIRS and one.weight.shape[1] % BLOCK:
        raise refused(
            name, f"has {one.weight.shape[1]} columns, which blocks of {BLOCK} do not fill"
        )
    rows = one.weight.shape[0] if dtype == INT8 else None
    largest = scales(f"{name}.weight_quantizer", of_weight, dtype, rows)
    step = None
    if multiplied is not None:
        if types["input_quantizer"] != dtype:
            raise refused(name, "has a weight and an input in different types")
        step = float(scales(f"{name}.input_quantizer", multiplied, dtype, None))
    scale = largest if dtype == INT8 else float(largest)
    return Coded(scale, step, smooth=smooth, dtype=dtype, low_rank=low_rank)


def _fold(one: nn.Linear, factors: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> None:
    """Give a plain weight back what its quantizers do although they are off.

    SmoothQuant has divided its columns, and SVDQuant subtracted a low rank.
    """
    if factors is None and low_rank is None:
        return
    numbers = one.weight.detach().float()
    if low_rank is not None:
        down, up = (factor.float() for factor in low_rank)
        numbers = numbers + up @ down
    with torch.no_grad():
        one.weight.copy_(numbers if factors is None else numbers * factors)


def _codes(weight: Tensor, own: Coded) -> tuple[Coded, Tensor]:
    """How they are read, and the codes."""
    numbers, scale = weight.detach(), own.weight_scale
    if isinstance(scale, Tensor):
        return own, quantize(numbers.float() / scale[:, None], 1.0, own.dtype)
    if own.dtype != PAIRS:
        return own, quantize(numbers, scale, own.dtype)
    rounded, blocks = quantize_blocks(numbers, scale)
    return replace(own, blocks=blocks), pairs(rounded)


def _told(coded: Mapping[str, Coded], norms: int) -> Iterator[str]:
    if norms:
        yield (
            f"the inputs of {norms} norms are quantized by ModelOpt in the module; they are left "
            "as they are, as ModelOpt's export leaves them"
        )
    if coded:
        yield f"{len(coded)} linear layers quantized by ModelOpt in build_model()"
