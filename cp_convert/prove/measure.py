"""What the dense model returns, and what it loses in the job's precision: the proof's measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ProofFailed
from ..ir.program import HALF, Executable
from ..ir.proof import FLOOR, Error
from ..ir.source import Branches
from ..model.branches import combined
from ..model.forward import blamed_on_forward, check_arguments
from .blame import Place, first_not_finite, first_not_finite_in
from .device import Mover, exact, on
from .errors import worst
from .lockstep import HalfMatmulsInFloat32, run, widened
from .roundings import spread, unit
from .wide import in_float32, is_wide

CPU: Final = torch.device("cpu")
NOTHING: Final = Error(0.0, 0.0)


@dataclass(frozen=True)
class Truth:
    """What the dense model returns, and what it loses in the job's precision.

    Attributes:
        reference: all tensors it returns, in float32.
        loss: its error in the job's precision; nothing for float32.
        is_wide: whether the job's precision is float32.
        spread: its errors under other roundings that are as valid, see :mod:`.roundings`.
        unit: what rounding an output once may lose, relative to it; 0 for float32 outputs.
        rounded: what it returns in the job's precision; nothing for float32.
    """

    reference: tuple[Tensor, ...]
    loss: Error
    is_wide: bool
    spread: tuple[Error, ...] = ()
    unit: float = 0.0
    rounded: tuple[Tensor, ...] = ()

    @property
    def worst(self) -> Error:
        """The largest loss of all roundings that are known."""
        known = (self.loss, *self.spread)
        return Error(max(e.max for e in known), max(e.rms for e in known))


def measure(
    module: nn.Module,
    inputs: Mapping[str, Any],
    device: torch.device = CPU,
    *,
    rounded: bool = True,
    branches: Branches | None = None,
) -> Truth:
    """Run the dense ``module`` on ``device``, in the job's precision and in float32.

    To be called before tracing: models that keep tables from call to call would keep those of the
    trace.

    Args:
        module: the model, in the job's precision.
        inputs: keyword arguments of its forward.
        device: where it computes.
        rounded: whether its loss is measured; else :func:`measure_program` has to do it.
        branches: of guidance, which are combined as the engines will.

    Raises:
        CannotTrace: forward does not take these inputs, or fails.
        ProofFailed: it returns infinities or NaN.
    """
    check_arguments(module, inputs)
    finished = partial(combined, branches=branches or Branches())
    with on(module, device), exact(), blamed_on_forward():
        inputs = Mover(device).tree(dict(inputs))
        if is_wide(module):
            outputs = finished(dense_outputs(module, inputs))
            truth = Truth(tuple(outputs), NOTHING, is_wide=True)
            _check_finite(truth, module, inputs)
            return truth
        # First, because models keep tables from call to call, and these would be rounded ones.
        with in_float32(module):
            wide = pytree.tree_map(widened, inputs)
            outputs = finished(dense_outputs(module, wide))
            truth = Truth(tuple(outputs), NOTHING, is_wide=False)
            _check_finite(truth, module, wide)
        if not rounded:
            return truth
        outputs = finished(dense_outputs(module, inputs))
        loss = worst(outputs, truth.reference)
        truth = replace(truth, loss=loss, unit=unit(outputs), rounded=tuple(outputs))
        _check_finite(truth, module, inputs)
        size = sum(p.nbytes for p in module.parameters())
        others = spread(lambda: finished(_outputs(module, inputs)), truth.reference, size)
        return replace(truth, spread=others)


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
    wide = not any(t.dtype in HALF for t in tensors)
    outputs = run(program, flat, world, widen=not wide)
    truth = Truth(tuple(outputs[0]), NOTHING, wide)
    if not _is_finite(truth):
        raise _not_finite("float32", first_not_finite_in(program, flat, world, widen=not wide))
    for rank, others in enumerate(outputs):
        apart = worst(others, truth.reference)
        if not apart.within(Error(FLOOR, FLOOR)):
            raise ProofFailed(
                f"rank {rank} returns something else than rank 0 (relative error "
                f"{apart.max:.1e}) before anything was sharded.",
                hint="every rank is given the whole inputs and returns the whole outputs: gather "
                "or reduce at the end of forward, and give ranks that are no peers of one "
                "another the same weights in build_model(rank).",
            )
    return truth if wide else rounded(truth, program, flat, world)


def measure_program(
    truth: Truth, program: Executable, inputs: Mapping[str, Any], device: torch.device = CPU
) -> Truth:
    """``truth`` with the loss of the model's program, which computes more widely than the model.

    Raises:
        ProofFailed: it returns infinities or NaN.
    """
    mover = Mover(device)
    program, flat = mover.program(program), mover.tree(flat_inputs(program, inputs))
    return truth if truth.is_wide else rounded(truth, program, flat, 1)


def rounded(truth: Truth, program: Executable, flat: Mapping[str, Tensor], world: int) -> Truth:
    """``truth`` with what all ranks of ``program`` lose in the job's precision."""
    reference = truth.reference
    outputs = run(program, flat, world)
    losses = [worst(one, reference) for one in outputs]
    loss = Error(max(e.max for e in losses), max(e.rms for e in losses))
    truth = replace(truth, loss=loss, unit=unit(outputs[0]), rounded=tuple(outputs[0]))
    if not _is_finite(truth):
        raise _not_finite("the job's precision", first_not_finite_in(program, flat, world))
    size = sum(p.nbytes for p in program.state.values())
    return replace(truth, spread=spread(lambda: run(program, flat, world)[0], reference, size))


def _is_finite(truth: Truth) -> bool:
    return math.isfinite(truth.loss.max) and all(
        bool(t.isfinite().all()) for t in truth.reference if t.is_floating_point()
    )


def _check_finite(truth: Truth, module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Of the run that was just made, with these ``inputs`` and the module as it is now."""
    if not _is_finite(truth):
        types = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
        found = first_not_finite(lambda: dense_outputs(module, inputs), module)
        raise _not_finite(" and ".join(sorted(types)) or "float32", found)


def _not_finite(precision: str, place: Place | None) -> ProofFailed:
    return ProofFailed(
        "the dense model itself returns infinities or NaN with these inputs and weights, in "
        f"{precision}."
        + (f" The first output that is not finite is that of {place.module}." if place else ""),
        where=place.where if place else None,
        hint="float16 ends at 65504: try --precision bf16, or --float32 residual, or the module's "
        "path after --float32; in float32, look at the weights and the example inputs.",
    )


def dense_outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors that ``module(**inputs)`` returns, flat."""
    with HalfMatmulsInFloat32():
        return _outputs(module, inputs)


def _outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(**inputs))
    # Detached: a parameter that is returned would change its type with the module.
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def flat_inputs(program: Executable, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``inputs`` by binding name."""
    used = {binding.name.split(".")[0] for binding in program.inputs}  # the others are frozen
    given = {name: value for name, value in inputs.items() if name in used}
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    return {b.name: t for b, t in zip(program.inputs, tensors, strict=True)}
