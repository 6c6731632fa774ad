"""A captured program with its linear layers in 8 bits; docs/adr/0022 tells what that means."""

from __future__ import annotations

from dataclasses import replace

from .capture import linear8
from .ir.linear8 import Layer, Linears
from .ir.program import module_path
from .ir.records import Captured, Loaded
from .progress import Clock
from .prove import check_device, flat_inputs
from .prove.calibrate import largest_inputs, losses, sets_of


def quantized(loaded: Loaded, captured: Captured, clock: Clock) -> Captured:
    """The program with its linear layers in 8 bits: the checkpoint's, or by the job's inputs."""
    job, dense, source = loaded.job, captured.dense, loaded.source
    names, weights, sets = captured.signature.parameters, dict[str, str](), 0
    given: linear8.Given
    with clock.stage("calibrate"):
        device = check_device(job.proof_device)
        example = flat_inputs(dense, source.inputs)
        if source.codes:
            codes = {n: source.codes[name] for n, name in names.items() if name in source.codes}
            chosen, kept = linear8.stored_layers(dense, codes)
            given = linear8.Stored(codes)
        else:
            every = list(sets_of(dense, example, job.calibration))
            chosen, kept = linear8.choose(dense, job.keep)
            given = linear8.Measured(largest_inputs(dense, chosen, every, device))
            weights, sets = linear8.weights_of(chosen, names), len(every)
        program, scales = linear8.quantized(dense, chosen, given)
        lost = losses(dense, scales, example, device)
    layers = tuple(Layer(module_path(n), *scales[n.name], lost[n.name]) for n in chosen)
    linears = Linears(dense, layers, kept, weights, sets)
    return replace(captured, dense=program, linears=linears)
