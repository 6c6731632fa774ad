"""A preset as a module and the inputs of its forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import Tensor, nn

from ..errors import CannotTrace, ModelFileError, UsageError, WeightsError
from .preset import Input, Preset, evaluate

SEED: Final = 0
_QUANTIZED: Final = "quantization_config"
"""What a quantizer tells of its files beside the class's own arguments."""


def published_config(preset: Preset, folder: Path) -> dict[str, Any]:
    """The configuration in the model's own folder, which must be the preset's.

    Args:
        preset: the model that is expected.
        folder: the published folder of the transformer, or of the whole pipeline.

    Raises:
        WeightsError: it holds another model.
    """
    file = folder / "config.json" if folder.is_dir() else folder.parent / "config.json"
    if not file.is_file():
        return preset.config
    try:
        told = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is no JSON: {error}.") from error
    kind = told.get("_class_name")
    if kind != preset.kind:
        raise WeightsError(
            f"{file} describes a {kind}, and {preset.title} is a {preset.kind}.",
            hint="name the folder of this model's transformer.",
        )
    others = {
        name: (told[name], value)
        for name, value in preset.config.items()
        if name in told and told[name] != value
    }
    if others:
        listed = ", ".join(f"{n} = {a} instead of {b}" for n, (a, b) in others.items())
        raise WeightsError(
            f"{file} is not {preset.title}: {listed}.",
            hint="copy the preset's TOML, change it, and convert that file.",
        )
    return {n: v for n, v in told.items() if not n.startswith("_") and n != _QUANTIZED}


def model_class(preset: Preset) -> type[nn.Module]:
    """The diffusers class.

    Raises:
        ModelFileError: diffusers is not installed, or has no such class.
    """
    try:
        import diffusers  # late: it is not installed everywhere, and takes seconds
    except ModuleNotFoundError as error:
        raise ModelFileError(
            f"{preset.title} needs diffusers, which is not installed.",
            hint="pip install 'cp-convert[models]'",
        ) from error
    kind = getattr(diffusers, preset.kind, None)
    if kind is None:
        raise ModelFileError(f"diffusers {diffusers.__version__} has no class {preset.kind}.")
    return kind  # type: ignore[no-any-return]


def build(
    preset: Preset, config: Mapping[str, Any], *, tiny: bool, random: bool, bytes_each: int = 4
) -> nn.Module:
    """The model on the CPU, in float32, or without memory within :func:`.meta.unallocated`.

    Args:
        preset: which model.
        config: its configuration.
        tiny: whether depth and width are shrunk.
        random: whether every parameter is given random numbers, also where the class starts with
            zeros; attention would not reach the output otherwise.
        bytes_each: memory that a parameter takes in the end.

    Raises:
        ModelFileError: the class does not take the configuration.
        CannotTrace: the model does not fit into this machine's memory.
    """
    if not tiny:
        _check_memory(preset, bytes_each)
    torch.manual_seed(SEED)
    try:
        module = model_class(preset)(**{**config, **(preset.tiny if tiny else {})})
    except TypeError as error:
        raise ModelFileError(f"{preset.kind} does not take this configuration: {error}.") from error
    return randomised(module) if random else module


def _check_memory(preset: Preset, bytes_each: int) -> None:
    needed, there = bytes_each * preset.parameters, psutil.virtual_memory().available
    if needed > there:
        raise CannotTrace(
            f"{preset.title} has {preset.parameters / 1e9:.1f} B parameters, "
            f"{needed / 2**30:.0f} GiB while it is built, and {there / 2**30:.0f} GiB are free.",
            hint="take a machine with more memory, or try the structure with --tiny.",
        )


def randomised(module: nn.Module) -> nn.Module:
    """Random numbers in every parameter, of a size that lets every layer matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.2 / sqrt(max(fan_in, 1))))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return module


def example_inputs(
    preset: Preset,
    config: Mapping[str, Any],
    resolution: str,
    *,
    tiny: bool,
    batch: int | None = None,
    text: int | None = None,
) -> dict[str, Any]:
    """The arguments of forward at one resolution; see :meth:`.preset.Preset.numbers`.

    Raises:
        UsageError: the preset has no such resolution, batch or text, or says how an input is made
            wrongly.
    """
    whole = {**config, **(preset.tiny if tiny else {})}
    numbers = preset.numbers(resolution, whole, tiny=tiny, batch=batch, text=text)
    torch.manual_seed(SEED + 1)
    return {name: _input(spec, numbers, name) for name, spec in preset.inputs.items()}


def _input(spec: Input, numbers: Mapping[str, int], name: str) -> Any:
    def sizes(given: list[int | str]) -> list[int]:
        return [evaluate(one, numbers) for one in given]

    dtype = getattr(torch, spec.dtype)
    made: Any = None
    if spec.normal is not None:
        made = torch.randn(sizes(spec.normal)).to(dtype)
    elif spec.full is not None:
        made = torch.full(sizes(spec.full), spec.value, dtype=dtype)
    elif spec.integers is not None:
        made = torch.randint(evaluate(spec.below, numbers), sizes(spec.integers), dtype=dtype)
    elif spec.arange is not None:
        made = torch.arange(*sizes(spec.arange), dtype=dtype)
        made = made.expand(spec.rows, -1).clone() if spec.rows else made
    elif spec.positions is not None:
        made = _positions(sizes(spec.positions), spec).to(dtype)
    elif spec.joined is not None:
        made = torch.cat([_input(one, numbers, name) for one in spec.joined], spec.dim)
    elif spec.tensors is not None:
        return [_input(one, numbers, name) for one in spec.tensors]
    elif spec.literal is not None:
        value = _literal(spec.literal, numbers)
        return value if spec.times == 1 else value * evaluate(spec.times, numbers)
    else:
        raise UsageError(f"the preset does not say how the input {name} is made.")
    return made + evaluate(spec.offset, numbers) if spec.offset else made


def _positions(extents: list[int], spec: Input) -> Tensor:
    """Coordinates of a grid, ``[points, dimensions]``."""
    axes = torch.meshgrid(*(torch.arange(n) for n in extents), indexing="ij")
    points = torch.stack(axes, -1).reshape(-1, len(extents))
    missing = spec.columns - len(extents)
    if missing > 0:
        zeros = points.new_zeros(points.shape[0], missing)
        points = torch.cat([points, zeros] if spec.columns_after else [zeros, points], -1)
    return points.T.contiguous() if spec.transposed else points


def _literal(value: Any, numbers: Mapping[str, int]) -> Any:
    if isinstance(value, str):
        return evaluate(value, numbers)
    if isinstance(value, list):
        items = [_literal(item, numbers) for item in value]
        return items if any(isinstance(item, list | tuple) for item in items) else tuple(items)
    return value
