"""All variants of a loaded model through the stages, and one manifest of what was made.

Weights are located once and serve all variants. docs/adr/0019 tells how variants share a bundle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .ahead import Ahead, errand_of
from .bundle.describe import describe
from .bundle.external import Placing
from .bundle.folder import CONSTANTS
from .bundle.manifest import Manifest
from .bundle.program import write_program
from .bundle.variants import joined
from .cache.store import Cache
from .common import Common
from .engine.fold_weights import store
from .engine.pool import Pool
from .errors import ConvertError
from .ir.records import Loaded, Made, StoredProgram
from .ir.serialize import pack
from .ir.tensors import Weight, is_held
from .job import AUTO, EXTERNAL_FROM
from .progress import Clock
from .prove import Truth
from .ranging import check_range, check_sizes, ranged
from .stages import (
    Begun,
    Ready,
    begin,
    build_engines,
    check_networks,
    emitted,
    measured,
    prove_program,
)

Keys = list[str | None]
_AHEAD: Final = 2
"""Variants whose engines are being built while another is traced: each is held in memory."""


def make(
    loaded: Loaded, common: Common, placing: Placing, cache: Cache, clock: Clock
) -> tuple[Manifest, Mapping[str, str], list[str | None]]:
    """All stages, for every variant.

    Args:
        loaded: the model and what was asked for.
        common: what was made of the model already, and where that is kept.
        placing: finds the external weights, for all variants.
        cache: knows what was made before.
        clock: times the stages and shows them.

    Returns:
        the manifest, under which keys the cache has the engines, by file, and the keys of the
        traced programs.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`.
    """
    job = loaded.job
    told: list[Manifest] = []
    keys: dict[str, str] = {}
    programs: list[str | None] = []
    build = _all_built if job.dynamic is None else _range_built
    constants: dict[str, tuple[Weight, ...]] = {}
    with (
        Pool(job.workers, job.memory_limit) as pool,  # ends before the folder does
        closing(build(loaded, common, placing, pool, cache, clock)) as all_built,
    ):
        for made, program in all_built:
            check = check_networks if made.emitted.lifted is None else check_range
            with _named(made.loaded):
                made = check(made, clock)
            made = replace(made, weights=_weights(made, placing, constants, clock))
            made = replace(made, program=_stored(made, placing, clock))
            told.append(describe(made, clock.seconds))
            own = made.built.keys
            for e in told[-1].engines:
                keys[e.file] = own.get((e.piece, e.rank), own.get((e.piece, 0), ""))
            programs += program
    return joined(told), keys, programs


def _all_built(
    loaded: Loaded,
    common: Common,
    placing: Placing,
    pool: Pool,
    cache: Cache,
    clock: Clock,
) -> Generator[tuple[Made, Keys]]:
    """Every variant with the key of its program; engines are built while the next is traced."""
    waiting: deque[tuple[Future[Made], Keys]] = deque()
    with (
        closing(_all_begun(loaded, common, pool, cache, clock)) as all_begun,
        pool.beside() as threads,
    ):
        for begun in all_begun:
            with _named(begun.loaded):
                ready = prove_program(begun, clock, placing)
            waiting.append((threads.submit(_built, ready, pool, cache, clock), [begun.key]))
            if len(waiting) > _AHEAD:
                building, key = waiting.popleft()
                yield building.result(), key
        while waiting:
            building, key = waiting.popleft()
            yield building.result(), key


def _built(ready: Ready, pool: Pool, cache: Cache, clock: Clock) -> Made:
    with _named(ready.begun.loaded):
        return build_engines(ready, pool, cache, clock)


@contextmanager
def _named(loaded: Loaded) -> Iterator[None]:
    """What goes wrong with one of several shapes is told with its name."""
    try:
        yield
    except ConvertError as error:
        name = loaded.source.variant.name
        if name is not None and not error.message.startswith(f"variant {name}: "):
            error.message = f"variant {name}: {error.message}"
        raise


def _range_built(
    loaded: Loaded,
    common: Common,
    placing: Placing,
    pool: Pool,
    cache: Cache,
    clock: Clock,
) -> Generator[tuple[Made, Keys]]:
    """One program for a range of sizes, with the keys of those that it was made from."""
    ready = list[Ready]()
    with closing(_all_begun(loaded, common, pool, cache, clock)) as all_begun:
        for begun in all_begun:
            with _named(begun.loaded):
                ready.append(emitted(begun, clock, placing))
            check_sizes(ready, loaded.job)
    done, proofs = ranged(ready, loaded.job, clock)
    made = build_engines(done, pool, cache, clock)
    yield replace(made, proofs=proofs), [one.begun.key for one in ready]


def _all_begun(
    loaded: Loaded, common: Common, pool: Pool, cache: Cache, clock: Clock
) -> Generator[Begun]:
    """Every variant before its strategy matters; by an earlier job, or now."""
    variants, known, traces = loaded.variants, common.taken(loaded), common.traces or ()
    with TemporaryDirectory(prefix="cp-convert-", ignore_cleanup_errors=True) as scratch:
        ahead = Ahead(None if known or traces else errand_of(loaded, Path(scratch)), pool)
        # All are measured before another thread reads parameters.
        truths = () if known else [_measured(one, clock) for one in variants]
        rows = zip_longest(variants, traces, truths, known)
        for number, (one, trace, truth, earlier) in enumerate(rows):
            clock.progress.variant(one.source.variant.name)
            seen = ahead.seen(number, one.source, clock)
            with _named(one):
                begun = earlier or begin(one, trace, cache, clock, truth=truth, seen=seen)
            if not known:
                common.keep(begun)
            yield begun


def _measured(one: Loaded, clock: Clock) -> Truth | None:
    with _named(one):
        return measured(one, clock)


def _weights(
    made: Made, placing: Placing, known: dict[str, tuple[Weight, ...]], clock: Clock
) -> tuple[Weight, ...]:
    """Where every one is; ``known`` are the first variant's constants, and serve their equals."""
    loaded, constants = made.loaded, made.emitted.constants
    with clock.stage("weights"):
        same = {n: known[n] for n, t in constants.items() if n in known and is_held(known[n][0], t)}
        new = {name: tensor for name, tensor in constants.items() if name not in same}
        stored = store(new, loaded.folder, f"{loaded.within}{CONSTANTS}")
        if not loaded.within:
            known |= stored
        found = {**placing.weights, **same, **stored}
        return tuple(one for name in made.emitted.names.values() for one in found[name])


def _stored(made: Made, placing: Placing, clock: Clock) -> StoredProgram | None:
    """The program in the bundle; it refers to weights as the engines do."""
    job, source, emitted = made.loaded.job, made.loaded.source, made.emitted
    copied = 0 if source.external else source.bytes
    if job.program == "no" or (job.program == AUTO and copied >= EXTERNAL_FROM):
        return None
    with clock.stage("store"):
        names = made.captured.bindings if source.external else {}
        loaded = made.loaded
        lifted = emitted.lifted
        packed = pack(emitted.rewritten, described=names) if lifted is None else lifted.stored
        files = write_program(packed, names, loaded.folder, loaded.within)
        bound = set(emitted.names.values())
        rest = (placing.weights[name] for name in names.values() if name not in bound)
        return StoredProgram(*files, tuple(one for of_one in rest for one in of_one))
