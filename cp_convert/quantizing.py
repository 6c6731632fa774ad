"""A captured program with its linear layers in 8 bits; docs/adr/0022 tells what that means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from .capture import linear8, products8
from .ir.linear8 import Layer, Linears, Scales
from .ir.nvfp4 import PAIRS
from .ir.program import module_path
from .ir.quantize import FP8, INT8
from .ir.records import Captured, Loaded
from .ir.source import Codes, of_blocks
from .progress import Clock
from .prove import check_device, flat_inputs
from .prove.calibrate import largest_inputs, losses, sets_of

_TYPES: Final[Mapping[str, torch.dtype]] = {"nvfp4": PAIRS, "int8": INT8, "fp8": FP8}
"""Of codes; no checkpoint has several."""


def quantized(loaded: Loaded, captured: Captured, clock: Clock) -> Captured:
    """The program with its linear layers in 8 bits: the checkpoint's, or by the job's inputs."""
    job, dense, source = loaded.job, captured.dense, loaded.source
    names, weights, sets = captured.signature.parameters, dict[str, str](), 0
    codes = {n: source.codes[name] for n, name in names.items() if name in source.codes}
    given: products8.Given
    with clock.stage("calibrate"):
        device = check_device(job.proof_device)
        example = flat_inputs(dense, source.inputs)
        if source.codes:
            measured = job.quantize is not None
            chosen, kept = linear8.stored_layers(dense, codes, measured=measured, keep=job.keep)
            lacking = [n for n in chosen if not codes[str(n.args[1])].is_multiplied]
            every = list(sets_of(dense, example, job.calibration)) if lacking else []
            largest = largest_inputs(dense, lacking, every, device) if lacking else {}
            given, sets = products8.Stored(codes, largest), len(every)
        else:
            every, dtype = (
                list(sets_of(dense, example, job.calibration)),
                _TYPES[job.quantize or "fp8"],
            )
            chosen, kept = linear8.choose(dense, job.keep, dtype)
            largest = largest_inputs(dense, chosen, every, device)
            given = products8.Measured(largest, dtype)
            weights, sets = linear8.weights_of(chosen, names), len(every)
        program, scales = products8.quantized(dense, chosen, given, codes)
        unread = any(one.is_meta for one in dense.state.values())  # then nothing is computed
        lost = losses(dense, scales, example, device) if scales and not unread else {}
    layers = tuple(_layer(n, scales[n.name], lost.get(n.name), codes) for n in chosen)
    types = {one.codes.dtype for one in (*scales.values(), *codes.values())}
    own: Any = next(name for name, dtype in _TYPES.items() if dtype in types)
    known = {**names, **weights}
    owners = products8.scales_of_blocks(program)
    blocks = {scales: of_blocks(known[weight]) for scales, weight in owners.items()}
    if not source.codes:  # made here, as the codes are
        weights, blocks = {**weights, **blocks}, {}
    linears = Linears(dense, layers, kept, weights, blocks, sets, own)
    return replace(captured, dense=program, linears=linears)


def _layer(node: fx.Node, own: Codes, loss: float | None, codes: Mapping[str, Codes]) -> Layer:
    """What is told of a layer; ``codes`` are those of the checkpoint, by placeholder."""
    stored = codes.get(str(node.args[1]))
    given: Scales = "none" if stored is None else "both" if stored.is_multiplied else "weight"
    return Layer(
        module_path(node),
        own.input_scale,
        own.step,
        loss,
        given,
        rows=own.rows is not None,
        smooth=own.smooth is not None,
    )
