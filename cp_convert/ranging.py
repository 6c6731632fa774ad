"""One program for a range of sizes: lifted from what the stages make at a few, and proven.

What comes in is the model with the inputs of several sizes, what goes out a program in which sizes
are expressions (:mod:`.ir.lift`), as the largest size's record with that program beside it. At the
sizes that it is lifted from it is, node by node, what the stages make there. At all others that are
looked at it is run by all ranks in lockstep and held against the dense model, as every program is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from .errors import CannotLift
from .ir.layout import Segment
from .ir.lift import OTHER_WAY, Lifted, Range, Slots, fill, lift
from .ir.padded import check_ranks, slots_of
from .ir.program import Lowered
from .ir.proof import NetworkProof, Proof
from .ir.records import Emitted, Made, Rewritten
from .ir.serialize import Packed, pack, unpack
from .job import Job
from .mesh import SEQUENCE
from .progress import Clock
from .stages import Ready, pays, proven, replayed


def ranged(
    variants: Sequence[Ready], job: Job, clock: Clock
) -> tuple[Ready, dict[int, Proof | None]]:
    """One program for a range, proven at all sizes that came in.

    Args:
        variants: the program at the sizes of :meth:`.span.Span.proven`, the largest first.
        job: what was asked for.
        clock: times the stages.

    Returns:
        the largest size's record with the program for all sizes beside it, and the proofs by size.

    Raises:
        CannotLift: programs differ in more than sizes, with the place in the model.
        ProofFailed: the program does not compute at a size what the dense model does.
    """
    ready = {_size(one): one for one in variants}
    with clock.stage("lift"):
        whole = lifted(ready, job)
    done = {n: proven_at(n, ready[n], whole, clock) for n in sorted(ready)}
    largest = done[max(done)]
    proofs = {n: one.proof for n, one in done.items()}
    return replace(largest, emitted=replace(largest.emitted, lifted=whole.lifted)), proofs


def check_range(made: Made, clock: Clock) -> Made:
    """Replay the networks at every size at which the program was proven, where that pays.

    Raises:
        ProofFailed: they do not compute what the model does.
    """
    whole, found = made.emitted, dict[int, NetworkProof]()
    sources = {one.source.variant.size: one.source for one in made.loaded.variants}
    for n, proof in made.proofs.items():
        if whole.lifted is not None and proof is not None and pays(made, proof):
            program = _filled(whole.lifted.built, n, whole.program)
            found[n] = replayed(made, proof, program, sources[n], clock)
    largest = found.get(max(made.proofs))
    return replace(made, network_proof=largest, network_proofs=found)


def lifted(ready: Mapping[int, Ready], job: Job) -> Emitted:
    """The largest size's program, with what serves all sizes beside it.

    Args:
        ready: by size, those of :meth:`.span.Span.fitted` among them.
        job: what was asked for.

    Raises:
        CannotLift: programs differ in more than sizes, with the place in the model.
    """
    span = job.dynamic
    assert span is not None
    used = {n: ready[n] for n in span.fitted(job.multiple)}
    sizes = _range(used, job)
    _check_frozen(ready)
    _check_alike(used)
    largest = used[max(used)]
    names = largest.begun.captured.bindings if largest.begun.loaded.source.external else {}
    stored = {n: pack(one.emitted.rewritten, described=names) for n, one in used.items()}
    built = {n: pack(one.emitted.program, described=one.emitted.names) for n, one in used.items()}
    return replace(largest.emitted, lifted=Lifted(sizes, lift(stored, sizes), lift(built, sizes)))


def check_sizes(ready: Sequence[Ready], job: Job) -> None:
    """Refuse what arithmetic refuses, as soon as there are two sizes to tell lengths by.

    Args:
        ready: the programs that there are so far.
        job: what was asked for.

    Raises:
        CannotLift: a rank would hold padding alone, or the strategy cuts tokens by steps.
    """
    span = job.dynamic
    assert span is not None
    fitted = span.fitted(job.multiple)
    used = {n: one for one in reversed(ready) if (n := _size(one)) in fitted}
    if len(used) > 1:
        _range(used, job)


def _size(ready: Ready) -> int:
    return ready.begun.loaded.source.variant.size or 0


def _range(used: Mapping[int, Ready], job: Job) -> Range:
    """The range with what ranks hold at every size."""
    span = job.dynamic
    assert span is not None
    _check_chunks(used, job)
    sizes = Range(span.name, span.first, span.last, span.step, _slots(used, job))
    check_ranks(sizes, job.mesh.size(SEQUENCE))
    return sizes


def proven_at(n: int, ready: Ready, whole: Emitted, clock: Clock) -> Ready:
    """The lifted program at a size, proven there.

    Raises:
        ProofFailed: it does not compute there what the dense model does.
    """
    assert whole.lifted is not None
    here = replace(
        ready.emitted,
        rewritten=_filled(whole.lifted.stored, n, whole.rewritten),
        uncut=_filled(whole.lifted.built, n, whole.program),
    )
    return proven(replace(ready, emitted=here), clock)


def _filled(packed: Packed, n: int, of: Lowered) -> Lowered:
    return replace(unpack(fill(packed, n)), state=of.state)


def _slots(ready: Mapping[int, Ready], job: Job) -> tuple[Slots, ...]:
    """What a rank holds of every sequence whose length follows the size and may not divide."""
    of_all = {n: list(_segments(one.rewritten)) for n, one in ready.items()}
    found: dict[Slots, None] = {}
    for columns in zip(*of_all.values(), strict=False):
        if len({one.length for one in columns}) == 1:
            continue
        if not any(job.mesh.size(SEQUENCE) * one.local > one.length for one in columns):
            continue
        lengths = {n: one.length for n, one in zip(of_all, columns, strict=True)}
        found[slots_of(lengths, job.multiple, job.unit)] = None
    return tuple(found)


def _segments(rewritten: Rewritten) -> Iterator[Segment]:
    sharded = rewritten.sharded
    layouts = [move.layout for move in sharded.moves]
    layouts += [layout for both in sharded.places.values() for layout in both]
    for layout in layouts:
        yield from layout.segments


def _check_chunks(ready: Mapping[int, Ready], job: Job) -> None:
    """Refuse a ring over more or fewer tokens, of which it cuts every rank's into equal parts."""
    ranks = job.mesh.size(SEQUENCE)
    lengths = {tuple(one.length for one in _segments(ready[n].rewritten)) for n in ready}
    if job.strategy == "ring" and ranks > 2 and len(lengths) > 1:
        raise CannotLift(
            f"ring gathers every rank's tokens in {ranks} parts, and how many are in each "
            "goes up by steps.",
            hint=f"take allgather-kv, ulysses or stream-kv; {OTHER_WAY}",
        )


def _check_frozen(ready: Mapping[int, Ready]) -> None:
    """Refuse arguments that are no tensors, hence part of the program, and differ."""
    (n, first), *others = ready.items()
    known = first.begun.captured.signature
    for m, other in others:
        own = other.begun.captured.signature
        for name in known.frozen.keys() | own.frozen.keys():
            a, b = ((one.frozen.get(name), one.digests.get(name)) for one in (known, own))
            if a != b:
                raise CannotLift(
                    f"the argument {name} is part of the program, and is another at {n} and {m}: "
                    f"{a[0]} and {b[0]}.",
                    hint=OTHER_WAY,
                )


def _check_alike(ready: Mapping[int, Ready]) -> None:
    """Refuse what is beside the programs and differs: layouts of engines, folded weights."""
    (n, first), *others = ((n, one.emitted) for n, one in ready.items())
    for m, other in others:
        if (first.layout, first.names) != (other.layout, other.names):
            raise CannotLift(f"the engines are other ones at {n} and {m}.", hint=OTHER_WAY)
        _check_constants(n, first, m, other)


def _check_constants(n: int, first: Emitted, m: int, other: Emitted) -> None:
    for name, tensor in first.constants.items():
        twin = other.constants.get(name)
        if twin is None or twin.shape != tensor.shape or not torch.equal(twin, tensor):
            raise CannotLift(
                f"what follows from weights alone ({name}) is other numbers at {n} and {m}.",
                hint=OTHER_WAY,
            )
