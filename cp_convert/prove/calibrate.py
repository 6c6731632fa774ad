"""What flows into linear layers: the largest magnitudes, and what their products lose in 8 bits.

In: a dense program, sets of inputs. Out: numbers by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..errors import UsageError
from ..ir import attention8
from ..ir.attention8 import Steps
from ..ir.nvfp4 import quantize_dequantize_blocks
from ..ir.program import Lowered
from ..ir.quantize import STEP, dequantize, quantize, token_step
from ..ir.source import Codes
from ..ir.tensors import is_finite
from ..model.header import given_tensors
from .device import Mover
from .lockstep import PerRank, run
from .measure import CPU

Inputs = Mapping[str, Tensor]
CALIBRATION: Final = "--calibration"


def sets_of(example: Inputs, files: Sequence[Path]) -> Iterator[Inputs]:
    """The example's inputs, and those of every file: of the same names and shapes.

    Raises:
        UsageError: a file lacks an input, has one too many, or one of another shape or type, or is
            no safetensors file.
    """
    yield example
    for file in files:
        found = given_tensors(file, CALIBRATION)
        lacking, other = example.keys() - found.keys(), found.keys() - example.keys()
        if lacking or other:
            what = [f"lacks {', '.join(sorted(lacking))}"] if lacking else []
            what += [f"has {', '.join(sorted(other))}, which are no inputs"] if other else []
            raise UsageError(
                f"{CALIBRATION} {file} {' and '.join(what)}.",
                hint=f"the model's inputs are {', '.join(example)}.",
            )
        told = f"{CALIBRATION} {file}: "
        yield {name: _taken(one, example[name], told + name) for name, one in found.items()}


def _taken(tensor: Tensor, example: Tensor, given: str) -> Tensor:
    """An input of a file, in the type of the example's."""
    if tensor.shape != example.shape:
        raise UsageError(
            f"{given} is {list(tensor.shape)}, and the example's is {list(example.shape)}.",
            hint="every set of inputs has the shapes of example_inputs().",
        )
    if tensor.is_floating_point() and not is_finite(tensor):
        raise UsageError(
            f"{given} holds NaN or infinity.", hint="save what the model was called with."
        )
    own = tensor.to(example.dtype)
    kinds = (tensor.is_floating_point(), own.is_floating_point())
    if kinds[0] != kinds[1] and not torch.equal(own.to(tensor.dtype), tensor):
        raise UsageError(
            f"{given} is {str(tensor.dtype).removeprefix('torch.')}, and its numbers are none in "
            f"the example's {str(own.dtype).removeprefix('torch.')}.",
            hint="save what the model was called with.",
        )
    return own


def largest_inputs(
    program: Lowered, chosen: Sequence[fx.Node], sets: Sequence[Inputs], device: torch.device = CPU
) -> dict[str, float]:
    """The largest magnitude of every input of ``chosen`` layers, over all sets, by its name."""
    return largest_of(program, {str(node.args[0]) for node in chosen}, sets, device)


def largest_of(
    program: Lowered, names: Collection[str], sets: Sequence[Inputs], device: torch.device = CPU
) -> dict[str, float]:
    """The same of values by their names."""
    found = dict.fromkeys(names, 0.0)

    def watch(node: fx.Node, values: PerRank) -> None:
        if node.name in found:
            now, before = float(values[0].abs().max()), found[node.name]
            # NaN is no less than anything, and stays: who has no range is refused by its name.
            found[node.name] = before if now <= before or isnan(before) else now

    mover = Mover(device)
    moved = mover.program(program)
    for one in sets:
        run(moved, mover.tree(dict(one)), 1, watch=watch)
    return found


def losses(
    program: Lowered,
    scales: Mapping[str, Codes],
    inputs: Inputs,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Of every layer by itself, its output's relative error (root mean square) with codes.

    Args:
        program: without quantizers.
        scales: what becomes of the operands, by the layer's name.
        inputs: by binding.
        device: where it is computed.
    """
    mover = Mover(device)
    moved = mover.program(program)
    nodes = {n.name: n for n in moved.graph_module.graph.nodes if n.name in scales}
    readers = Counter(str(node.args[0]) for node in nodes.values())
    held: dict[str, Tensor] = {}
    found: dict[str, float] = {}

    def watch(node: fx.Node, values: PerRank) -> None:
        if node.name in readers:
            held[node.name] = values[0]
        if node.name in nodes:
            x, weight = str(node.args[0]), moved.state[str(node.args[1])]
            found[node.name] = _loss(held[x], weight, scales[node.name])
            readers[x] -= 1
            if not readers[x]:
                del held[x]

    run(moved, mover.tree(dict(inputs)), 1, watch=watch)
    return found


def attention_losses(
    program: Lowered, steps: Mapping[str, Steps], inputs: Inputs, device: torch.device = CPU
) -> dict[str, float]:
    """Of every attention by itself, its output's relative error (root mean square) over codes.

    Args:
        program: without quantizers.
        steps: of what it reads, by the attention's name.
        inputs: by binding.
        device: where it is computed.
    """
    found: dict[str, float] = {}
    mover = Mover(device)
    moved = mover.program(program)
    readers = Counter(
        one for node in moved.graph_module.graph.nodes if node.name in steps
        for one in node.all_input_nodes
    )  # fmt: skip
    held: dict[fx.Node, Tensor] = {}

    def watch(node: fx.Node, values: PerRank) -> None:
        if node in readers:
            held[node] = values[0]
        if node.name in steps:
            found[node.name] = _attention_loss(node, held, steps[node.name])
            readers.subtract(node.all_input_nodes)
            for one in node.all_input_nodes:
                if not readers[one]:
                    held.pop(one, None)

    run(moved, mover.tree(dict(inputs)), 1, watch=watch)
    return found


def _attention_loss(node: fx.Node, held: Mapping[fx.Node, Tensor], steps: Steps) -> float:
    def wide(one: fx.Node) -> Tensor:
        value = held[one]
        return value if value.dtype == torch.bool else value.float()

    given: Any = fx.map_arg((node.args, node.kwargs), wide)
    args, kwargs = given
    whole = attention8.attention(*args, **kwargs)
    off = attention8.attention(*args, **{**kwargs, "steps": list(steps)}) - whole
    return float(off.norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _loss(x: Tensor, weight: Tensor, own: Codes) -> float:
    x, device = x.float(), x.device
    whole = functional.linear(x, weight.float())
    off = functional.linear(_coded(x, own), own.numbers().to(device)) - whole
    if own.low_rank is not None:
        down, up = (factor.float().to(device) for factor in own.low_rank)
        off += functional.linear(functional.linear(_smoothed(x, own), down), up)
    return float(off.norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _smoothed(x: Tensor, own: Codes) -> Tensor:
    return x if own.smooth is None else x * own.smooth.to(x.device)


def _coded(x: Tensor, own: Codes) -> Tensor:
    """What the codes of a layer's input stand for, in float32."""
    dtype = own.codes.dtype
    x = _smoothed(x, own)
    if own.input_scale is not None and own.blocks is not None:
        return quantize_dequantize_blocks(x, own.input_scale)
    if own.input_scale is not None:
        return dequantize(quantize(x, own.input_scale, dtype), own.input_scale, torch.float32)
    step = token_step(x.abs().amax(-1, keepdim=True), dtype)
    return dequantize(quantize(x / step, STEP[dtype], dtype), STEP[dtype], torch.float32) * step
