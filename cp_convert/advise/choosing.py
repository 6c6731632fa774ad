"""``--strategy auto``: a dense program comes in, the mesh and strategy to take go out.

Every strategy is tried on every mesh, in rounds: the next round, whose ranks share weights among
more of them, is looked at only where nothing before it fits (docs/adr/0020).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CannotConvert, CannotShard
from ..ir.attention import Outcome
from ..ir.program import Lowered
from ..ir.shares import Declared
from ..mesh import GUIDANCE, TENSOR, Axis, Mesh
from ..sharding.others import Arranged, arrange
from ..strategies import STRATEGIES, choose
from ..strategies.rewrite import rewrite
from .estimate import Work, estimate
from .forecast import title, told
from .hardware import Hardware


@dataclass(frozen=True)
class Terms:
    """What a choice depends on besides the program.

    Attributes:
        hardware: what it will run on.
        weights: bytes of them, all together.
        table: see :func:`cp_convert.strategies.rewrite.rewrite`.
        groups: whether a strategy or a mesh may name groups of ranks, which some releases ignore.
        eight: which of q, k, v and o travel in 8 bits.
        plan: see :func:`cp_convert.sharding.tensor_parallel.tensor_parallel`.
    """

    hardware: Hardware
    weights: int
    table: Mapping[Any, Any]
    groups: bool = True
    eight: str = ""
    plan: Mapping[str, Declared] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """One strategy on an arranged program: its work, or why it cannot be done."""

    name: str
    ulysses: int | None
    work: Work | None = None
    outcomes: tuple[Outcome, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """A mesh and a strategy.

    Attributes:
        arranged: the program on the mesh.
        strategy, ulysses: its name, and USP's factor.
        seconds: of one forward (estimated).
        memory: bytes that a rank holds (estimated).
    """

    arranged: Arranged
    strategy: str
    ulysses: int | None
    seconds: float
    memory: int

    def why(self, hardware: Hardware, tp: int = 1) -> str:
        """One sentence: what is taken, how fast it is, that it fits; ``tp`` is what was asked."""
        mesh, free = self.arranged.mesh, hardware.memory_gb - self.memory / 1e9
        name = title(self.strategy, self.ulysses, mesh)
        alone = ", which nothing without tp does" if mesh.size(TENSOR) > tp else ""
        return (
            f"auto takes {name} on {hardware.title}: an estimated {told(self.seconds)} a forward, "
            f"fits with {free:.3g} GB free{alone}"
        )


def candidates(world: int) -> Iterator[tuple[str, int | None]]:
    """The strategies that are worth a look, with USP's factors that are no other strategy."""
    # Where nobody shares the sequence every strategy is none.
    yield from ((name, None) for name in (STRATEGIES if world > 1 else ["ulysses"]))
    for ulysses in range(2, world):
        if world % ulysses == 0:
            yield "usp", ulysses


def try_one(arranged: Arranged, terms: Terms, name: str, ulysses: int | None) -> Tried:
    """One strategy on an arranged program."""
    try:
        done, outcomes = rewrite(
            arranged.sharded, choose(name, ulysses), name, arranged.axis, terms.table,
            eight=terms.eight,
        )  # fmt: skip
    except CannotConvert as error:
        return Tried(name, ulysses, refused=error.message)
    return Tried(name, ulysses, estimate(done, terms.hardware), outcomes)


def try_all(arranged: Arranged, terms: Terms) -> Iterator[Tried]:
    """Every strategy on an arranged program."""
    for name, ulysses in candidates(arranged.axis.size):
        yield try_one(arranged, terms, name, ulysses)


def shared_by(mesh: Mesh) -> Iterator[int]:
    """How many ranks may share weights, besides one: all that divide those that are not guided."""
    ranks = mesh.world // mesh.size(GUIDANCE)
    yield from (n for n in range(2, ranks + 1) if ranks % n == 0)


def cheapest(
    program: Lowered, rounds: Iterable[Sequence[Mesh]], terms: Terms, own: Collection[Axis] = ()
) -> Choice:
    """The mesh and the strategy with the shortest estimated forward among those that fit.

    Args:
        program: the dense program.
        rounds: meshes; those of a round are looked at where nothing in the rounds before fits.
        terms: what it depends on besides.
        own: axes in which the model communicates by itself.

    Raises:
        CannotShard: no strategy can split every attention, or none that can fits into memory.
    """
    found: list[Choice] = []
    refused: list[CannotConvert] = []
    for meshes in rounds:
        for mesh in meshes:
            found += _on(program, mesh, terms, own, refused)
        fitting = [one for one in found if terms.hardware.holds(one.memory)]
        if fitting:
            return min(fitting, key=lambda one: (one.seconds, one.strategy))
    if not found:
        raise refused[0]
    needed = min(one.memory for one in found)
    raise CannotShard(
        f"no strategy fits into the {terms.hardware.memory_gb:.0f} GB of {terms.hardware.title}: "
        f"the least needs about {needed / 1e9:.1f} GB a rank.",
        hint="a larger --world, --tp where it was held back, other --hardware, or name the "
        "--strategy to convert anyway.",
    )


def _on(
    program: Lowered,
    mesh: Mesh,
    terms: Terms,
    own: Collection[Axis],
    refused: list[CannotConvert],
) -> Iterator[Choice]:
    """All strategies that are possible on one mesh; why others are not goes into ``refused``."""
    try:
        arranged = arrange(program, mesh, terms.plan, own)
    except CannotConvert as error:
        refused.append(error)
        return
    held, reasons = terms.weights - arranged.divided.spared, []
    for one in try_all(arranged, terms):
        if one.work is None:
            reasons.append(one.refused or "")
        elif terms.groups or not one.ulysses:
            memory = held + one.work.activations
            yield Choice(arranged, one.name, one.ulysses, one.work.seconds, memory)
    if reasons:
        refused.append(
            CannotShard("no strategy can split this model.", hint=" ".join(dict.fromkeys(reasons)))
        )
