"""What flows into linear layers: the largest magnitudes, and what their products lose in 8 bits.

In: a dense program, sets of inputs. Out: numbers by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..errors import UsageError
from ..ir import attention8
from ..ir.attention8 import Steps
from ..ir.nvfp4 import quantize_dequantize_blocks
from ..ir.program import Executable, Lowered
from ..ir.quantize import STEP, dequantize, quantize, token_step
from ..ir.source import Codes
from ..ir.tensors import mapped
from .device import Mover
from .lockstep import PerRank, run
from .measure import CPU

Inputs = Mapping[str, Tensor]


def sets_of(program: Executable, example: Inputs, files: Sequence[Path]) -> Iterator[Inputs]:
    """The example's inputs, and those of every file: all of the program's, of the same shapes.

    Raises:
        UsageError: a file lacks an input, has one too many, or one of another shape.
        WeightsError: it is no safetensors file.
    """
    yield example
    for file in files:
        found = mapped(file)
        wanted = {b.name: b for b in program.inputs}
        lacking, other = wanted.keys() - found.keys(), found.keys() - wanted.keys()
        if lacking or other:
            what = [f"lacks {', '.join(sorted(lacking))}"] if lacking else []
            what += [f"has {', '.join(sorted(other))}, which are no inputs"] if other else []
            raise UsageError(
                f"--calibration {file} {' and '.join(what)}.",
                hint=f"the model's inputs are {', '.join(wanted)}.",
            )
        for name, tensor in found.items():
            if tuple(tensor.shape) != wanted[name].shape:
                raise UsageError(
                    f"--calibration {file}: {name} is {list(tensor.shape)}, and the example's is "
                    f"{list(wanted[name].shape)}."
                )
        yield {name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}


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
            found[node.name] = max(found[node.name], float(values[0].abs().max()))

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
