"""The proof at program level: all ranks on one CPU against the dense model.

The *reference* is the dense model in float32, with the same inputs and the same (rounded)
weights. Errors are relative to it, in two norms. Two runs of all ranks in lockstep are held
against it:

- *algebra*: the rewritten program with float32 arithmetic, which must agree to ``1e-5``. Half
  precision cannot hide a mistake here.
- *ranks*: the lowered program, as it will be built, in the job's precision. What the dense model
  itself loses in that precision is the measure of what the ranks may lose.

A proof must be able to fail, so there is a *control*, and one more for each other axis of the mesh
(:mod:`.axes`): the sharded program without communication
inside, every rank attending to its own keys alone and keeping its own partial sums. If that agrees
too, attention does not matter in this model (a gate of zero, an output layer of zeros) and nothing
would have been proven.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import ProofFailed
from ..ir.ops import is_spmd
from ..ir.program import HALF, Executable
from ..ir.proof import FLOOR, Codes, Error, Proof
from ..strategies import Site
from ..strategies.tokens import picked
from .axes import controls_along
from .blame import Place
from .bounds import bound_of, judged_by, nothing_shown
from .device import Mover
from .errors import ROUNDING, deviation, error_of, worst
from .lockstep import PerRank, reduces_over, run
from .measure import CPU, Truth, flat_inputs
from .quantizers import check_codes, check_loss, measure_codes, unrounded
from .roundings import spread
from .stages import Stages
from .vanish import where_attention_vanishes

CONTROL: Final = 10.0
"""How many times the floor the control must exceed."""


def prove(
    truth: Truth,
    inputs: Mapping[str, Any],
    stages: Stages,
    *,
    rtol: float | None = None,
    max_loss: float | None = None,
    device: torch.device = CPU,
) -> Proof:
    """Compare all ranks with the dense model.

    Args:
        truth: what the dense model does, see :func:`.measure`.
        inputs: keyword arguments of its forward, in the job's precision.
        stages: what is to be proven.
        rtol: replaces the derived bound of the job's precision.
        max_loss: what quantization may cost of the output.
        device: where all ranks are computed; they share one copy of the weights there.

    Raises:
        ProofFailed: an error is beyond its bound, or the control is not.
    """
    start, mover = time.perf_counter(), Mover(device)
    stages, inputs = stages.on(mover), mover.tree(dict(inputs))
    whole = _with_own_rounding(truth, inputs, stages.plain or stages.dense, stages.world)
    truth = _with_codes_of_weights(whole, inputs, stages, bound_of(whole, rtol))
    reference, is_wide = truth.reference, truth.is_wide
    is_plain = is_wide and stages.quantized is None
    limit = judged_by(truth, rtol)[1] if is_plain else Error(FLOOR, FLOOR)
    with unrounded(stages.quantized is not None):
        algebra, seconds_a_run = _algebra(truth, inputs, stages, limit, bound_of(truth, rtol))
        control = _control(stages, inputs, reference, widen=not is_wide)
        controls = _controls(stages, inputs, reference, widen=not is_wide)
    truth, codes = _codes(truth, whole, inputs, stages, max_loss)
    ranks, bound, against = _in_precision(truth, inputs, stages, rtol, codes)
    return Proof(
        algebra,
        ranks,
        truth.loss,
        bound,
        control,
        tuple(reference),
        time.perf_counter() - start,
        seconds_a_run,
        truth.spread,
        bound_of(truth, rtol),
        None if against is truth.reference else tuple(against),
        codes=codes,
        controls=controls,
    )


def _in_precision(
    truth: Truth,
    inputs: Mapping[str, Any],
    stages: Stages,
    rtol: float | None,
    codes: Codes | None,
) -> tuple[tuple[Error, ...], Error, Sequence[Tensor]]:
    """Every rank's error in the job's precision, its bound, and what they are relative to."""
    against, bound = judged_by(truth, rtol)
    if codes is not None and truth.is_wide:
        bound = Error(max(bound.max, codes.bound.max), max(bound.rms, codes.bound.rms))
    ranks = _errors(stages.lowered, inputs, stages.world, against)
    if not all(error.within(bound) for error in ranks):
        if against is not truth.reference:
            raise nothing_shown(truth.worst.max, max(error.max for error in ranks))
        raise ProofFailed(
            f"the lowered program went astray: {deviation(ranks, bound)}.", hint=ROUNDING
        )
    return ranks, bound, against


def _codes(
    truth: Truth,
    whole: Truth,
    inputs: Mapping[str, Any],
    stages: Stages,
    max_loss: float | None,
) -> tuple[Truth, Codes | None]:
    """With quantizers that round: their own truth, and that all ranks come to it."""
    if stages.quantized is None:
        return truth, None
    flat = flat_inputs(stages.quantized, inputs)
    own, codes = measure_codes(truth, whole, stages.quantized, flat, stages.world)
    check_loss(codes, max_loss)
    program = stages.rewritten
    outputs = run(program, flat_inputs(program, inputs), stages.world, widen=not truth.is_wide)
    return own, replace(codes, ranks=check_codes(codes, outputs, "all ranks together"))


def _with_codes_of_weights(
    truth: Truth, inputs: Mapping[str, Any], stages: Stages, lost: Error
) -> Truth:
    """The truth of a model whose weights are codes; the program it was made of is the model's."""
    plain, dense = stages.plain, stages.dense
    if plain is None:
        return truth
    flat = flat_inputs(plain, inputs)
    floor = Error(FLOOR, FLOOR)
    apart = worst(run(plain, flat, stages.world, widen=not truth.is_wide)[0], truth.reference)
    if not apart.within(floor) and not worst(
        run(plain, flat, stages.world)[0], truth.reference
    ).within(lost):
        raise _not_the_model([apart], floor)
    with unrounded(True):
        reference = run(dense, flat, stages.world, widen=not truth.is_wide)[0]
    return replace(truth, reference=tuple(reference))


def _not_the_model(errors: Sequence[Error], bound: Error) -> ProofFailed:
    return ProofFailed(
        f"the traced program is not the model: {deviation(errors, bound)}.",
        hint="nothing was sharded yet; torch.export or a decomposition changed an operator, "
        "or forward returns something else each time it is called.",
    )


def _algebra(
    truth: Truth, inputs: Mapping[str, Any], stages: Stages, limit: Error, lost: Error
) -> tuple[tuple[Error, ...], float]:
    """Every rank's error in float32 arithmetic, within ``limit``; and how long all ranks took."""
    begun, is_wide, reference = time.perf_counter(), truth.is_wide, truth.reference
    wide = run(
        stages.rewritten, flat_inputs(stages.rewritten, inputs), stages.world, widen=not is_wide
    )
    errors = tuple(worst(of_rank, reference) for of_rank in wide)
    seconds = time.perf_counter() - begun
    if not is_wide and not all(error.within(limit) for error in errors):
        errors = _against_program(wide, inputs, lost, errors, truth, stages)
    if not all(error.within(limit) for error in errors):
        raise _failure(errors, limit, lost, inputs, reference, stages)
    return errors, seconds


def _with_own_rounding(
    truth: Truth, inputs: Mapping[str, Any], dense: Executable, world: int
) -> Truth:
    """A float32 model that rounds to half precision on purpose is no float32 model."""
    values = [
        v for n in dense.graph_module.graph.nodes for v in pytree.tree_leaves(n.meta.get("val"))
    ]
    if not truth.is_wide or not any(isinstance(v, Tensor) and v.dtype in HALF for v in values):
        return truth
    flat, reference = flat_inputs(dense, inputs), truth.reference
    whole = run(dense, flat, world, widen=True)[0]
    others = spread(
        lambda: run(dense, flat, world)[0], reference, sum(p.nbytes for p in dense.state.values())
    )
    return replace(truth, loss=worst(whole, reference), is_wide=False, spread=others)


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
        place = _vanishing_point(inputs, stages)
        lost = f"What it finds is lost in {place.module}." if place else ""
        raise ProofFailed(
            "nothing was proven: the output is the same even when every rank attends to its own "
            f"keys alone (relative error {control.max:.1e}), so attention does not reach the "
            f"output with these weights. {lost}".rstrip(),
            where=place.where if place else None,
            hint="give the real weights (--weights), initialise gates and output layers with "
            "numbers other than zero, or convert with --no-proof.",
        )
    return control


def _controls(
    stages: Stages, inputs: Mapping[str, Any], reference: Sequence[Tensor], *, widen: bool
) -> dict[str, Error]:
    """The same along the mesh's other axes."""
    program, least = stages.rewritten, CONTROL * FLOOR
    flat = flat_inputs(program, inputs)
    return controls_along(stages.others, program, flat, reference, widen=widen, least=least)


def _vanishing_point(inputs: Mapping[str, Any], stages: Stages) -> Place | None:
    dense, sites = stages.dense, [site for site, _ in stages.sites]
    if any(is_spmd(node.target) for node in dense.graph_module.graph.nodes) or not sites:
        return None
    return where_attention_vanishes(dense, flat_inputs(dense, inputs), sites, CONTROL * FLOOR)


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
        return _not_the_model(dense, bound)
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
        if node not in seen:
            continue
        if error_of(seen[node], _of_first(expected, seen[node])).rms > _SAME_TOKENS:
            return site
    return None


_SAME_TOKENS: Final = 1e-3


def _of_first(expected_BHS: Tensor, seen_bhS: Tensor) -> Tensor:
    """The branches and heads of the first group, which stands first on every other axis."""
    return expected_BHS[: seen_bhS.shape[0], : seen_bhS.shape[1]]


def _fingerprint(out_BHSD: Tensor) -> Tensor:
    """Every token's projection onto one fixed direction, sorted, so that order does not matter."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(out_BHSD.shape[-1], generator=generator, dtype=torch.float64)
    return (out_BHSD.double().cpu() @ direction).sort(dim=-1).values
