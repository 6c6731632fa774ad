"""What the dense model returns, and what it loses in the job's precision: the proof's measure."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ProofFailed
from ..ir.program import HALF, Executable
from ..ir.proof import FLOOR, Error
from ..model.forward import blamed_on_forward, check_arguments
from .device import Mover, exact, on
from .errors import worst
from .lockstep import HalfMatmulsInFloat32, run, widened

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Truth:
    """What the dense model returns, and what it loses in the job's precision.

    Attributes:
        reference: all tensors it returns, in float32.
        loss: its error in the job's precision; nothing for float32.
        is_wide: whether the job's precision is float32.
    """

    reference: tuple[Tensor, ...]
    loss: Error
    is_wide: bool


def measure(module: nn.Module, inputs: Mapping[str, Any], device: torch.device = CPU) -> Truth:
    """Run the dense ``module`` on ``device``, in the job's precision and in float32.

    To be called before tracing: models that keep tables from call to call would keep those of the
    trace.

    Raises:
        CannotTrace: forward does not take these inputs, or fails.
        ProofFailed: it returns infinities or NaN.
    """
    check_arguments(module, inputs)
    with on(module, device), exact(), blamed_on_forward():
        inputs = Mover(device).tree(dict(inputs))
        wide_module, wide_inputs = _in_float32(module, inputs)
        is_wide = wide_module is module
        reference = dense_outputs(wide_module, wide_inputs)
        loss = Error(0.0, 0.0) if is_wide else worst(dense_outputs(module, inputs), reference)
    _check_finite(reference, loss)
    return Truth(tuple(reference), loss, is_wide)


def measure_ranks(
    program: Executable, inputs: Mapping[str, Any], world: int, device: torch.device = CPU
) -> Truth:
    """The same for a model that communicates by itself, which no rank can run alone.

    Its own program, not yet sharded, is run on all ranks. What is proven against it is all that
    happens to the program after it was traced.

    Raises:
        ProofFailed: the ranks return different outputs, infinities or NaN.
    """
    mover = Mover(device)
    program, flat = mover.program(program), mover.tree(flat_inputs(program, inputs))
    tensors = [*flat.values(), *program.state.values()]
    is_wide = not any(t.dtype in HALF for t in tensors)
    outputs = run(program, flat, world, widen=not is_wide)
    reference = outputs[0]
    _check_finite(reference, Error(0.0, 0.0))
    for rank, others in enumerate(outputs):
        apart = worst(others, reference)
        if not apart.within(Error(FLOOR, FLOOR)):
            raise ProofFailed(
                f"rank {rank} returns something else than rank 0 (relative error "
                f"{apart.max:.1e}) before anything was sharded.",
                hint="every rank is given the whole inputs and returns the whole outputs: gather "
                "or reduce at the end of forward, and give ranks that are no peers of one "
                "another the same weights in build_model(rank).",
            )
    losses = [] if is_wide else [worst(o, reference) for o in run(program, flat, world)]
    loss = Error(max((e.max for e in losses), default=0), max((e.rms for e in losses), default=0))
    return Truth(tuple(reference), loss, is_wide)


def _check_finite(reference: Sequence[Tensor], loss: Error) -> None:
    if not math.isfinite(loss.max + sum(float(t.double().sum()) for t in reference)):
        raise ProofFailed(
            "the dense model itself returns infinities or NaN with these inputs and weights.",
            hint="try --precision bf16 or fp32, or other example inputs.",
        )


def dense_outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors that ``module(**inputs)`` returns, flat."""
    with torch.no_grad(), HalfMatmulsInFloat32():
        leaves = pytree.tree_leaves(module(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def flat_inputs(program: Executable, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``inputs`` by binding name."""
    used = {binding.name.split(".")[0] for binding in program.inputs}  # the others are frozen
    given = {name: value for name, value in inputs.items() if name in used}
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    return {b.name: t for b, t in zip(program.inputs, tensors, strict=True)}


def _in_float32(
    module: nn.Module, inputs: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The same rounded numbers in float32; float64 tables stay float64."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(t.dtype in HALF for t in tensors):
        return module, inputs
    twin = copy.deepcopy(module)
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.data = widened(tensor.data)
    return twin, pytree.tree_map(widened, dict(inputs))
