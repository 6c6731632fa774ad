"""A captured program with layers in 8 bits; docs/adr/0022 tells what that means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from .capture import attention8, linear8, products8
from .ir.attention8 import Steps
from .ir.attentions8 import Attention8, Attentions
from .ir.linear8 import TYPES, Kept, Layer, Linears, Scales
from .ir.program import Lowered, module_path
from .ir.quantize import FP8
from .ir.records import Captured, Loaded
from .ir.source import Codes, of_blocks
from .job import ATTENTION_FP8, Job
from .progress import Clock
from .prove import check_device, flat_inputs
from .prove.calibrate import attention_losses, largest_of, losses, sets_of


@dataclass(frozen=True)
class _Chosen:
    """Layers that are to read codes.

    Attributes:
        nodes, kept: those, and why the others are not.
        lacking: of ``nodes``, those for whose inputs no checkpoint has scales.
        names: what these read.
    """

    nodes: Sequence[fx.Node] = ()
    kept: tuple[Kept, ...] = ()
    lacking: Sequence[fx.Node] = ()
    names: frozenset[str] = frozenset()


def quantized(loaded: Loaded, captured: Captured, clock: Clock) -> Captured:
    """The program with layers in 8 bits: the checkpoint's, or by the job's inputs."""
    job, dense, source = loaded.job, captured.dense, loaded.source
    names = captured.signature.parameters
    codes = {n: source.codes[name] for n, name in names.items() if name in source.codes}
    with clock.stage("calibrate"):
        device = check_device(job.proof_device)
        example = flat_inputs(dense, source.inputs)
        linears, attentions = _linears(dense, codes, job), _attentions(loaded, dense)
        wanted = linears.names | attentions.names
        every = list(sets_of(example, job.calibration)) if wanted else []
        largest = largest_of(dense, wanted, every, device) if wanted else {}
        given: products8.Given = (
            products8.Stored(codes, largest) if codes else products8.Measured(largest, _asked(job))
        )
        apart = job.may_share
        products = products8.quantized(dense, linears.nodes, given, codes, apart=apart)
        program, scales = products.program, products.codes
        steps = _steps(attentions, source.attentions, largest)
        steps = attention8.alike(attentions.nodes, steps) if apart else steps
        program = attention8.over_codes(program, steps) if steps else program
        unread = any(one.is_meta for one in dense.state.values())  # then nothing is computed
        lost = losses(dense, scales, example, device) if scales and not unread else {}
        lost |= attention_losses(dense, steps, example, device) if steps and not unread else {}
    layers = tuple(_layer(n, scales[n.name], lost.get(n.name), codes) for n in linears.nodes)
    types = {one.codes.dtype for one in (*scales.values(), *codes.values())}
    kinds = tuple(kind for kind in TYPES if TYPES[kind] in types)
    weights = {} if codes else linear8.weights_of(linears.nodes, names)
    blocks = _of_blocks(program, {**names, **weights})
    weights, blocks = (weights, blocks) if codes else ({**weights, **blocks}, {})
    sets = len(every) if linears.lacking else 0
    weights |= _apart(products.apart, names)
    told = Linears(dense, layers, linears.kept, weights, blocks, sets, kinds)
    eight = _told(attentions, steps, lost, len(every))
    return replace(captured, dense=program, linears=told, attentions=eight)


def _of_blocks(program: Lowered, names: Mapping[str, str]) -> dict[str, str]:
    """By placeholder of scales of blocks, their binding; ``names`` are those of weights."""
    owners = products8.scales_of_blocks(program)
    return {scales: of_blocks(names[weight]) for scales, weight in owners.items()}


def _apart(scales: Mapping[str, tuple[str, str]], names: Mapping[str, str]) -> dict[str, str]:
    """By placeholder of a scale that is a parameter, its binding: layer, and what it is of it."""
    found, seen = dict[str, str](), Counter[str]()
    for placeholder, (weight, what) in scales.items():
        told = f"constants.{names[weight].removesuffix('.weight')}.{what}"
        found[placeholder] = f"{told}.{seen[told]}" if seen[told] else told
        seen[told] += 1  # a weight that several layers read has several inputs
    return found


def _asked(job: Job) -> torch.dtype:
    """The type of codes that the job asks for."""
    return next((dtype for kind, dtype in TYPES.items() if kind == job.quantize), FP8)


def _linears(dense: Lowered, codes: Mapping[str, Codes], job: Job) -> _Chosen:
    if codes:
        measured = job.quantize is not None
        chosen, kept = linear8.stored_layers(dense, codes, measured=measured, keep=job.keep)
        lacking = [n for n in chosen if not codes[str(n.args[1])].is_multiplied]
    else:
        chosen, kept = linear8.choose(dense, job.keep, _asked(job))
        lacking = chosen
    return _Chosen(chosen, kept, lacking, frozenset(str(n.args[0]) for n in lacking))


def _attentions(loaded: Loaded, dense: Lowered) -> _Chosen:
    """None are where nobody asks for it."""
    job, steps = loaded.job, loaded.source.attentions
    if steps:
        return _Chosen(*attention8.stored(dense, steps, job.keep))
    if job.attention != ATTENTION_FP8:
        return _Chosen()
    chosen, kept = attention8.choose(dense, job.keep)
    names = frozenset(name for node in chosen for name in attention8.operands(node))
    return _Chosen(chosen, kept, chosen, names)


def _steps(
    chosen: _Chosen, stored: Mapping[str, Steps], largest: Mapping[str, float]
) -> dict[str, Steps]:
    """By the attention's name."""
    if stored:
        return {node.name: stored[module_path(node)] for node in chosen.nodes}
    return attention8.measured(chosen.nodes, largest)


def _told(
    chosen: _Chosen, steps: Mapping[str, Steps], lost: Mapping[str, float], sets: int
) -> Attentions | None:
    if not chosen.nodes:
        return None
    given: Scales = "none" if chosen.lacking else "both"
    eight = tuple(
        Attention8(module_path(node), steps[node.name], lost.get(node.name), given)
        for node in chosen.nodes
    )
    return Attentions(eight, chosen.kept, sets if chosen.lacking else 0)


def _layer(node: fx.Node, own: Codes, loss: float | None, codes: Mapping[str, Codes]) -> Layer:
    """What is told of a layer; ``codes`` are those of the checkpoint, by placeholder."""
    stored = codes.get(str(node.args[1]))
    given: Scales = "none" if stored is None else "both" if stored.is_multiplied else "weight"
    (kind,) = (kind for kind in TYPES if TYPES[kind] == own.codes.dtype)
    return Layer(
        module_path(node),
        own.input_scale,
        own.step,
        loss,
        given,
        rows=own.rows is not None,
        smooth=own.smooth is not None,
        codes=kind,
    )
