"""The proof at program level: all ranks on one CPU against the dense model.

The *reference* is the dense model in float32, with the same inputs and the same (rounded)
weights. Errors are relative to it, in two norms. Two runs of all ranks in lockstep are held
against it:

- *algebra*: the rewritten program with float32 arithmetic, which must agree to ``1e-5``. Half
  precision cannot hide a mistake here.
- *ranks*: the lowered program, as it will be built, in the job's precision. What the dense model
  itself loses in that precision is the measure of what the ranks may lose.

A proof must be able to fail, so there is a *control*: the sharded program without communication
inside, every rank attending to its own keys alone and keeping its own partial sums. If that agrees
too, attention does not matter in this model (a gate of zero, an output layer of zeros) and nothing
would have been proven.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ProofFailed
from ..ir.program import HALF, Executable
from ..mesh import Axis
from ..model.forward import blamed_on_forward, check_arguments
from ..strategies import Site
from ..strategies.tokens import picked
from .device import Mover, exact, on
from .lockstep import HalfMatmulsInFloat32, PerRank, reduces_over, run, widened

CPU: Final = torch.device("cpu")
FLOOR: Final = 1e-5
"""The error that is always allowed: a few hundred roundings of float32."""
MARGIN: Final = 2.0
"""How many times the dense model's own loss the ranks may lose."""
CONTROL: Final = 10.0
"""How many times the floor the control must exceed."""


@dataclass(frozen=True)
class Error:
    """Relative error: the largest and the root mean square deviation, over the reference's."""

    max: float
    rms: float

    def within(self, bound: Error) -> bool:
        """Whether both norms are; a NaN never is."""
        return self.max <= bound.max and self.rms <= bound.rms


@dataclass(frozen=True)
class Proof:
    """A proof that was carried out and passed.

    Attributes:
        algebra: every rank's error with float32 arithmetic, at most :data:`FLOOR`.
        ranks: every rank's error in the job's precision.
        dense: what the dense model loses in that precision.
        bound: what the ranks may lose in it.
        control: what is lost when every rank sees its own keys alone; ``None`` when there is
            nothing to lose, in a world of 1 or without attention over sharded keys.
        reference: what all errors are measured against.
        seconds: how long it took.
        seconds_a_run: how long all ranks took once, with float32 arithmetic.
    """

    algebra: tuple[Error, ...]
    ranks: tuple[Error, ...]
    dense: Error
    bound: Error
    control: Error | None
    reference: tuple[Tensor, ...]
    seconds: float
    seconds_a_run: float

    @property
    def is_wide(self) -> bool:
        """Whether the job's precision is float32."""
        return self.dense == Error(0.0, 0.0)

    @property
    def algebra_bound(self) -> Error:
        """What may be lost with float32 arithmetic."""
        return self.bound if self.is_wide else Error(FLOOR, FLOOR)


@dataclass(frozen=True)
class Stages:
    """The same program at three stages, all for the same ranks.

    Attributes:
        dense: whole, before it was sharded.
        control: sharded, but every rank attends to its own keys alone.
        rewritten: with the strategy in it.
        lowered: as it will be built.
        sites: the attentions, and the nodes of ``rewritten`` that hold their results.
        axis: the ranks that share the sequence.
    """

    dense: Executable
    control: Executable
    rewritten: Executable
    lowered: Executable
    sites: Sequence[tuple[Site, str]]
    axis: Axis

    @property
    def world(self) -> int:
        """How many ranks there are, those that share no sequence included."""
        return len(self.axis.flat)

    def on(self, mover: Mover) -> Stages:
        """The same programs on another device."""
        return replace(
            self,
            dense=mover.program(self.dense),
            control=mover.program(self.control),
            rewritten=mover.program(self.rewritten),
            lowered=mover.program(self.lowered),
        )


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


def prove(
    truth: Truth,
    inputs: Mapping[str, Any],
    stages: Stages,
    *,
    rtol: float | None = None,
    device: torch.device = CPU,
) -> Proof:
    """Compare all ranks with the dense model.

    Args:
        truth: what the dense model does, see :func:`measure`.
        inputs: keyword arguments of its forward, in the job's precision.
        stages: what is to be proven.
        rtol: replaces the derived bound of the job's precision.
        device: where all ranks are computed; they share one copy of the weights there.

    Raises:
        ProofFailed: an error is beyond its bound, or the control is not.
    """
    start, mover = time.perf_counter(), Mover(device)
    stages, inputs = stages.on(mover), mover.tree(dict(inputs))
    truth = _with_own_rounding(truth, inputs, stages.dense, stages.world)
    reference, loss, is_wide = truth.reference, truth.loss, truth.is_wide
    bound = _bound(loss, rtol)
    begun = time.perf_counter()
    wide = run(
        stages.rewritten, flat_inputs(stages.rewritten, inputs), stages.world, widen=not is_wide
    )
    algebra = tuple(worst(of_rank, reference) for of_rank in wide)
    seconds_a_run = time.perf_counter() - begun
    ranks = _errors(stages.lowered, inputs, stages.world, reference)
    limit = bound if is_wide else Error(FLOOR, FLOOR)
    if not is_wide and not all(error.within(limit) for error in algebra):
        algebra = _against_program(wide, inputs, bound, algebra, truth, stages)
    if not all(error.within(limit) for error in algebra):
        raise _failure(algebra, limit, bound, inputs, reference, stages)
    if not all(error.within(bound) for error in ranks):
        raise ProofFailed(
            f"the lowered program went astray: {deviation(ranks, bound)}.", hint=ROUNDING
        )
    control = _control(stages, inputs, reference, widen=not is_wide)
    return Proof(
        algebra,
        ranks,
        loss,
        bound,
        control,
        tuple(reference),
        time.perf_counter() - start,
        seconds_a_run,
    )


def _with_own_rounding(
    truth: Truth, inputs: Mapping[str, Any], dense: Executable, world: int
) -> Truth:
    """A float32 model that rounds to half precision on purpose is no float32 model."""
    values = [
        v for n in dense.graph_module.graph.nodes for v in pytree.tree_leaves(n.meta.get("val"))
    ]
    if not truth.is_wide or not any(isinstance(v, Tensor) and v.dtype in HALF for v in values):
        return truth
    whole = run(dense, flat_inputs(dense, inputs), world, widen=True)[0]
    return Truth(truth.reference, worst(whole, truth.reference), is_wide=False)


def _errors(
    program: Executable,
    inputs: Mapping[str, Any],
    world: int,
    reference: Sequence[Tensor],
    *,
    widen: bool = False,
) -> tuple[Error, ...]:
    outputs = run(program, flat_inputs(program, inputs), world, widen=widen)
    return tuple(worst(of_rank, reference) for of_rank in outputs)


def _against_program(
    wide: Sequence[Sequence[Tensor]],
    inputs: Mapping[str, Any],
    bound: Error,
    algebra: tuple[Error, ...],
    truth: Truth,
    stages: Stages,
) -> tuple[Error, ...]:
    """The errors against the unsharded program, where that itself is as good as the dense model.

    A model may round to half precision on purpose. Then float32 arithmetic, in which all casts to
    half precision are left out, gives something else than the model in float32 does.
    """
    dense = stages.dense
    flat = flat_inputs(dense, inputs)
    if not worst(run(dense, flat, stages.world)[0], truth.reference).within(bound):
        return algebra
    whole = run(dense, flat, stages.world, widen=True)[0]
    return tuple(worst(of_rank, whole) for of_rank in wide)


def _bound(loss: Error, rtol: float | None) -> Error:
    if rtol is not None:
        return Error(rtol, rtol)
    return Error(max(FLOOR, MARGIN * loss.max), max(FLOOR, MARGIN * loss.rms))


def _control(
    stages: Stages, inputs: Mapping[str, Any], reference: Sequence[Tensor], *, widen: bool
) -> Error | None:
    nodes = stages.control.graph_module.graph.nodes
    reduces = any(reduces_over(n, stages.axis) for n in nodes)
    if not reduces and not any(site.keys_sharded for site, _ in stages.sites):
        return None
    program = stages.control
    outputs = run(
        program, flat_inputs(program, inputs), stages.world, widen=widen, partial=stages.axis
    )
    # One rank is enough to look at: the gathers at the end have put all ranks' tokens there.
    control = worst(outputs[0], reference)
    if control.max <= CONTROL * FLOOR:
        raise ProofFailed(
            "nothing was proven: the output is the same even when every rank attends to its own "
            f"keys alone (relative error {control.max:.1e}), so attention does not reach the "
            "output with these weights.",
            hint="give the real weights (--weights), initialise gates and output layers with "
            "numbers other than zero, or convert with --no-proof.",
        )
    return control


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


def worst(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Error:
    """The largest errors over all output tensors."""
    errors = [error_of(x, r) for x, r in zip(outputs, reference, strict=True)]
    return Error(max((e.max for e in errors), default=0), max((e.rms for e in errors), default=0))


def error_of(x: Tensor, reference: Tensor) -> Error:
    """Both relative errors of ``x``; infinite where ``x`` is not finite or of another shape."""
    if x.shape != reference.shape:
        return Error(math.inf, math.inf)
    x, reference = x.double(), reference.double()
    difference = x - reference
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    top, mean = reference.abs().amax().item(), reference.square().mean().sqrt().item()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        difference.abs().amax().item() / max(top, tiny),
        difference.square().mean().sqrt().item() / max(mean, tiny),
    )


ROUNDING: Final = (
    "with float32 arithmetic all ranks are right, so this is rounding or overflow: try another "
    "--precision, or allow more with --rtol."
)


def deviation(errors: Sequence[Error], bound: Error) -> str:
    """Who is beyond the bound, and by how much, in words."""
    bad = {rank: error for rank, error in enumerate(errors) if not error.within(bound)}
    rank = max(bad, key=lambda r: bad[r].max)
    which = "every rank" if len(bad) == len(errors) else f"rank {', '.join(map(str, bad))}"
    return (
        f"{which} is beyond the bound of {bound.max:.1e} (rms {bound.rms:.1e}); rank {rank} has a "
        f"relative error of {bad[rank].max:.1e} (rms {bad[rank].rms:.1e})"
    )


def _failure(
    errors: Sequence[Error],
    limit: Error,
    bound: Error,
    inputs: Mapping[str, Any],
    reference: Sequence[Tensor],
    stages: Stages,
) -> ProofFailed:
    message = f"all ranks together went astray: {deviation(errors, limit)}."
    dense = _errors(stages.dense, inputs, stages.world, reference)
    if not dense[0].within(bound):
        return ProofFailed(
            f"the traced program is not the model: {deviation(dense, bound)}.",
            hint="nothing was sharded yet; torch.export or a decomposition changed an operator, "
            "or forward returns something else each time it is called.",
        )
    astray = _first_astray(inputs, stages)
    if astray is None:
        hint = "every attention agrees with the dense model, so look at what follows the last one."
        return ProofFailed(message, hint=hint)
    return ProofFailed(
        f"{message} The first attention to differ is number {astray.index}.",
        where=astray.where,
        hint="what feeds this attention was sharded wrongly; please report it.",
    )


def _first_astray(inputs: Mapping[str, Any], stages: Stages) -> Site | None:
    """The first attention whose tokens are not those of the dense program, in whatever order."""
    truth: list[Tensor] = []

    def watch_dense(node: fx.Node, values: PerRank) -> None:
        if node.target is torch.ops.cp.attention.default:
            truth.append(_fingerprint(values[0]))

    dense = stages.dense
    run(dense, flat_inputs(dense, inputs), stages.world, widen=True, watch=watch_dense)
    seen: dict[str, Tensor] = {}
    wanted = {node: site for site, node in stages.sites}

    def watch(node: fx.Node, values: PerRank) -> None:
        site = wanted.get(node.name)
        if site is not None and site.query_layout is not None:
            whole = torch.cat([values[rank] for rank in stages.axis.groups[0]], dim=2)
            seen[node.name] = _fingerprint(picked(whole, 2, site.query_layout.slots))

    program = stages.rewritten
    run(program, flat_inputs(program, inputs), stages.world, widen=True, watch=watch)
    for (site, node), expected in zip(stages.sites, truth, strict=True):
        if node in seen and error_of(seen[node], expected).rms > _SAME_TOKENS:
            return site
    return None


_SAME_TOKENS: Final = 1e-3


def _fingerprint(out_BHSD: Tensor) -> Tensor:
    """Every token's projection onto one fixed direction, sorted, so that order does not matter."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(out_BHSD.shape[-1], generator=generator, dtype=torch.float64)
    return (out_BHSD.double().cpu() @ direction).sort(dim=-1).values
