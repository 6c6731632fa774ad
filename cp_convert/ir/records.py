"""What each stage of a conversion hands to the next, one frozen record a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..backends import Backend
from ..job import Job
from ..mesh import Axis
from .attention import Outcome
from .attentions8 import Attentions
from .engine import Engine
from .join import joined
from .kinds import Twin, through
from .lift import Lifted
from .linear8 import Linears
from .program import Lowered, Program, names_in
from .proof import NetworkProof, Proof
from .sharded import Guided, Sharded
from .shares import Divided
from .signature import Applied, Signature
from .source import Source
from .split import Pieces
from .tensors import Weight


@dataclass(frozen=True)
class Loaded:
    """What a conversion starts from.

    Attributes:
        job, backend: what was asked for.
        source: the model.
        tool: key of our own code and of the versions below it.
        values: key of the model's numbers; ``None`` for one that gets no key.
        folder: where the bundle is put together.
        within: the folder in it, ending in a slash, of what this variant has to itself.
    """

    job: Job
    backend: Backend
    source: Source
    tool: str
    values: str | None
    folder: Path
    within: str = ""

    @property
    def variants(self) -> tuple[Loaded, ...]:
        """One for every variant, the first as it is."""
        others = self.source.others
        return self, *(replace(self, source=o, within=o.variant.within) for o in others)


@dataclass(frozen=True)
class Traced:
    """What ``torch.export`` saw.

    Attributes:
        program: whole, and the same for every world and strategy.
        applied: what became of the plan.
    """

    program: Program
    applied: tuple[Applied, ...]


@dataclass(frozen=True)
class Captured:
    """What a trace gave, whatever the world and the strategy.

    Attributes:
        dense: the program.
        signature: what else is known of it.
        linears: what became of its linear layers, where they multiply codes of 8 bits.
        attentions: what became of its attentions, where some read codes of 8 bits.
    """

    dense: Lowered
    signature: Signature
    linears: Linears | None = None
    attentions: Attentions | None = None

    @property
    def bindings(self) -> Mapping[str, str]:
        """What every weight is called that stays outside the engines, by placeholder."""
        own = self.linears
        apart = {} if own is None else {**own.weights, **own.blocks}
        return {**self.signature.parameters, **apart}


@dataclass(frozen=True)
class Seen:
    """What another process traced.

    Attributes:
        captured: the program, with this process's parameters.
        key: of the traced program in the cache; ``None`` for one that gets none.
    """

    captured: Captured
    key: str | None


@dataclass(frozen=True)
class Rewritten:
    """The program with the strategy in it.

    Attributes:
        job: with the strategy that was chosen, where ``auto`` was asked for.
        axis: the ranks that share the sequence.
        guided: the dense program, or that of the rank's own guidance branches.
        divided: that, or the one whose ranks share its weights.
        sharded: the program before, and where it is split.
        program: the program.
        outcomes: what was done with each attention.
        eight: which of q, k, v and o it sends in 8 bits.
    """

    job: Job
    axis: Axis
    guided: Guided
    divided: Divided
    sharded: Sharded
    program: Lowered
    outcomes: tuple[Outcome, ...]
    eight: str = ""


@dataclass(frozen=True)
class Draft:
    """A program in pieces, before any of it is lowered.

    Attributes:
        whole: the program.
        pieces: of it.
        twins: of every piece, whose engine it will run.
        names: by placeholder, the binding of a weight that is an engine's input.
    """

    whole: Lowered
    pieces: Pieces
    twins: tuple[Twin, ...]
    names: Mapping[str, str]

    @property
    def run_by_engines(self) -> tuple[Lowered, ...]:
        """What engines are made of, piece by piece: the first of its kind, on the own values."""
        programs = self.pieces.programs
        return tuple(
            through(programs[twin.of], self.names, twin, self.whole) for twin in self.twins
        )


@dataclass(frozen=True)
class Emitted:
    """The program as it is handed to TensorRT's converters.

    Attributes:
        rewritten: the program before, taken apart by rank or shared by all.
        uncut: the program, lowered; ``None`` where it is in pieces.
        layout: ``shared`` where all ranks have one engine, else ``per-rank``.
        names: by placeholder, the binding of a weight that is an engine's input.
        constants: what forward computes from such weights alone, by binding.
        pieces: the program cut into several, each lowered, with an engine of its own.
        lifted: the same program for a range of sizes, of which this is the largest.
        twins: of every piece, whose engine it runs.
        draft: what the pieces were before they were lowered.
    """

    rewritten: Lowered
    uncut: Lowered | None
    layout: str
    names: Mapping[str, str]
    constants: Mapping[str, Tensor]
    pieces: Pieces | None = None
    lifted: Lifted | None = None
    twins: tuple[Twin, ...] = ()
    draft: Draft | None = None

    @property
    def whole(self) -> Lowered:
        """The whole, lowered or not, which tells its inputs and outputs."""
        return self.program if self.draft is None else self.draft.whole

    @cached_property
    def program(self) -> Lowered:
        """The whole, lowered; of pieces all together, put together when a proof first asks."""
        if self.uncut is not None:
            return self.uncut
        assert self.draft is not None
        programs, draft = self.programs, self.draft
        firsts = {number: programs[number] for number in self.kinds}
        return joined(draft.whole, draft.pieces.programs, firsts, self.twins, self.names)

    @property
    def programs(self) -> tuple[Lowered, ...]:
        """All pieces, or the one whole."""
        return (self.program,) if self.pieces is None else self.pieces.programs

    @property
    def kinds(self) -> tuple[int, ...]:
        """Which of :attr:`programs` engines are built of, the first of every kind."""
        return tuple(dict.fromkeys(twin.of for twin in self.twins)) or (0,)

    def names_in(self, program: Lowered) -> dict[str, str]:
        """Those bindings of weights that are inputs of one of :attr:`programs`."""
        return names_in(program, self.names)


@dataclass(frozen=True)
class Built:
    """Engines of all ranks.

    Attributes:
        engines: by rank, piece after piece; networks share the model's weights.
        keys: by piece and rank, under which the cache has them.
        workarounds: those of the release, their reasons by lowering.
    """

    engines: tuple[Engine, ...]
    keys: Mapping[tuple[int | None, int], str]
    workarounds: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> tuple[Engine, ...]:
        """Rank 0's engines, one for every kind of piece."""
        return tuple(one for one in self.engines if one.rank == 0)


@dataclass(frozen=True)
class StoredFile:
    """A file in the bundle, by its path within, its size in bytes and its SHA-256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoredProgram:
    """The program in the bundle.

    Attributes:
        document: the graph.
        tensors: its constants, and its parameters where the engines embed them.
        weights: parameters that the engines do not read, and where they are.
    """

    document: StoredFile
    tensors: StoredFile
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class Made:
    """All that a finished conversion found; ``proof`` is ``None`` where none was asked for.

    ``proofs`` and ``network_proofs`` are those of a range's sizes.
    """

    loaded: Loaded
    captured: Captured
    rewritten: Rewritten
    emitted: Emitted
    proof: Proof | None
    built: Built
    network_proof: NetworkProof | None
    weights: tuple[Weight, ...] = ()
    program: StoredProgram | None = None
    proofs: Mapping[int, Proof | None] = field(default_factory=dict)
    network_proofs: Mapping[int, NetworkProof] = field(default_factory=dict)
