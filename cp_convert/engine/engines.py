"""Engines from the cache, or from workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..backends import Backend
from ..bundle.folder import engine_name, piece_folder
from ..cache.store import ENGINE, Cache, key_of
from ..files import place
from ..ir.engine import Engine
from ..ir.network import Network
from ..ir.program import Lowered
from ..ir.records import Built, Emitted, Loaded
from ..ir.serialize import Packed, pack
from ..job import FUSED, Job
from ..progress import Progress
from .pool import Pool
from .worker import Task, answered

_ANSWER: Final = "answer.pickle"


@dataclass(frozen=True)
class Wanted:
    """Engines to be built: all that decides their bytes.

    Attributes:
        job, backend: what was asked for.
        tool: our own code and the versions of others.
        program: of all ranks.
        names: by placeholder, the binding of a parameter that becomes an input.
        ranks: of which.
        variant: the name of the one that they are of, which decides nothing.
        piece: the number of the one that they are of, which decides nothing.
    """

    job: Job
    backend: Backend
    tool: str
    program: Lowered
    names: Mapping[str, str]
    ranks: Sequence[int]
    variant: str | None = None
    piece: int | None = None
    lifted: Packed | None = None

    def task(self, rank: int, program: Path) -> Task:
        """What a worker is told; ``program`` is the packed one, and the engine goes beside it."""
        return Task(
            rank=rank,
            program=program,
            path=program.with_name(engine_name(rank)),
            backend=self.backend,
            fused=self.job.strategy == FUSED,
            targets=self.job.compute_capabilities,
            external=dict(self.names),
            network=self.job.proof in ("auto", "network"),
            dynamic=self.lifted is not None,
        )

    @property
    def label(self) -> str:
        """What they are called in front of their ranks."""
        variant = "" if self.variant is None else f"{self.variant} "
        return variant if self.piece is None else f"{variant}piece {self.piece} "

    def key(self, task: Task, program: str) -> str:
        """For the cache; ``program`` is the digest of the packed one."""
        told = (task.rank, task.backend, task.fused, task.targets, task.external, task.network)
        return key_of((self.tool, program, *told))


def ranks_of(loaded: Loaded, emitted: Emitted) -> Sequence[int]:
    """Those that engines are built for; with the layout ``shared`` rank 0's is everyone's."""
    return loaded.job.mesh.ranks if emitted.layout == "per-rank" else range(1)


def build_pieces(
    loaded: Loaded, emitted: Emitted, pool: Pool, cache: Cache, progress: Progress
) -> Built:
    """Engines of all ranks, for every kind of piece; kinds are built beside one another.

    Raises:
        BuildFailed: see :func:`build_all`.
    """
    job, ranks = loaded.job, ranks_of(loaded, emitted)

    def of_piece(number: int) -> Built:
        piece = None if emitted.pieces is None else number
        program, variant = emitted.programs[number], loaded.source.variant.name
        names = emitted.names_in(program)
        lifted = None if emitted.lifted is None else emitted.lifted.built
        wanted = Wanted(
            job, loaded.backend, loaded.tool, program, names, ranks,
            variant=variant if lifted is None else None, piece=piece, lifted=lifted,
        )  # fmt: skip
        folder = loaded.folder / loaded.within / piece_folder(piece)
        folder.mkdir(parents=True, exist_ok=True)
        return build_all(wanted, pool, cache, folder, progress)

    with pool.beside() as threads:
        found = list(threads.map(of_piece, emitted.kinds))
    engines = tuple(one for built in found for one in _under_all_names(built, job.mesh.ranks))
    return Built(engines, {at: key for built in found for at, key in built.keys.items()})


def _under_all_names(built: Built, world: Sequence[int]) -> Iterator[Engine]:
    """An engine that is everyone's, under every rank's name."""
    yield from built.engines
    first = built.engines[0]
    for rank in world[len(built.engines) :]:
        twin = first.path.with_name(engine_name(rank))
        place(first.path, twin)
        yield replace(first, rank=rank, path=twin)


def networks_of(engines: Sequence[Engine], emitted: Emitted) -> list[list[Network]]:
    """All ranks' networks, piece by piece: those of its kind."""
    found: dict[int | None, list[Network]] = {}
    for engine in engines:
        if engine.network is not None:
            found.setdefault(engine.piece, []).append(engine.network)
    if emitted.pieces is None:
        return list(found.values())
    return [found[twin.of] for twin in emitted.twins]


def build_all(wanted: Wanted, pool: Pool, cache: Cache, folder: Path, progress: Progress) -> Built:
    """Build what is not in the cache; all of it stands in ``folder`` then.

    Raises:
        BuildFailed: TensorRT refused a network, or a worker was killed.
    """
    file = folder / "program.safetensors"
    packed = wanted.lifted or pack(wanted.program, described=wanted.names, provenance=False)
    digest = packed.digest() if cache.folder is not None else ""
    tasks = {rank: wanted.task(rank, file) for rank in wanted.ranks}
    keys = {rank: wanted.key(task, digest) for rank, task in tasks.items()}
    engines: list[Engine] = []
    for rank, key in keys.items():
        entry = cache.find("engines", key)
        if entry is not None:
            task = tasks.pop(rank)
            place(entry / ENGINE, task.path)
            known, _ = answered((entry / _ANSWER).read_bytes(), packed.tensors)
            engines.append(replace(known, path=task.path, recalled=True))
            progress.step("build")
    if tasks:
        packed.write(file)
    building = pool.build(
        list(tasks.values()), packed.nbytes, packed.tensors, progress, wanted.label
    )
    for engine, answer in building:
        with cache.store("engines", keys[engine.rank], {ENGINE: engine.sha256}) as kept:
            place(engine.path, kept / ENGINE)
            (kept / _ANSWER).write_bytes(answer)
        engines.append(engine)
        progress.step("build")
    file.unlink(missing_ok=True)
    engines.sort(key=lambda engine: engine.rank)
    own = tuple(replace(engine, piece=wanted.piece) for engine in engines)
    return Built(own, {(wanted.piece, rank): key for rank, key in keys.items()})
