"""What ``cp-convert plan`` finds, as data. No torch.

Bytes, counts and padding are computed from the very programs that would be built; seconds and
activations are estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from ..mesh import AXES, SEQUENCE, Mesh
from .hardware import Hardware


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy on one mesh.

    Attributes:
        strategy: its name.
        world: how many ranks.
        ulysses: for ``usp``, how many neighbours exchange; the others form the ring.
        cfg: how many groups of ranks share guidance branches; the strategy is within each.
        tp: how many ranks share every weight.
        mesh: how the ranks are arranged, as ``--mesh`` takes it.
        refused: why it is not possible, or ``None``.
        collectives: that one rank takes part in, per forward.
        bytes_sent: by one rank per forward, averaged over the ranks.
        weights: bytes of parameters on every rank.
        activations: bytes of activations at once (estimated).
        memory: both of them: what a rank holds.
        key_values: bytes of K and V that the largest attention holds at once.
        compute: seconds of arithmetic per forward (estimated).
        communication: seconds of communication per forward (estimated).
        exposed: the part of it that no arithmetic hides, in the order of the program (estimated).
        speedup: over one GPU.
        efficiency: ``speedup / world``.
        fits: whether weights and activations fit into the GPU's memory.
    """

    strategy: str
    world: int
    ulysses: int | None = None
    cfg: int = 1
    tp: int = 1
    mesh: str = ""
    refused: str | None = None
    collectives: int = 0
    bytes_sent: int = 0
    weights: int = 0
    activations: int = 0
    memory: int = 0
    key_values: int = 0
    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    speedup: float = 0.0
    efficiency: float = 0.0
    fits: bool = True

    @property
    def seconds(self) -> float:
        """Per forward."""
        return self.compute + self.exposed

    @property
    def cp(self) -> int:
        """How many ranks share the sequence."""
        return self.world // (self.cfg * self.tp)

    @property
    def sharing(self) -> str:
        """The strategy with its factors; nothing where no ranks share the sequence."""
        is_alone = self.cp == 1 < self.world
        return "" if is_alone else _factors(self.strategy, self.ulysses, self.cp)

    @property
    def title(self) -> str:
        """The strategy between the other axes of the mesh."""
        return title(self.strategy, self.ulysses, Mesh.of(self.world, self.cfg, self.tp))

    @property
    def is_possible(self) -> bool:
        """Whether it can be converted and fits."""
        return self.refused is None and self.fits


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """All options for one model on one kind of hardware.

    Attributes:
        model, precision, parameters: what would be converted.
        attentions: how many attentions are sharded at the largest world.
        tokens: the longest sequence among them.
        hardware: what it would run on.
        hardware_name: as it was asked for.
        options: every strategy at every world; first the model on one GPU.
        recommendation: one sentence.
    """

    model: str
    precision: str
    parameters: int
    attentions: int
    tokens: int
    hardware_name: str
    hardware: Hardware
    options: list[Option]
    recommendation: str

    @property
    def worlds(self) -> list[int]:
        """All worlds, ascending."""
        return sorted({option.world for option in self.options})


def title(strategy: str, ulysses: int | None, mesh: Mesh) -> str:
    """A strategy, with its factors, between the other axes: ``cfg 2 x ulysses x tp 2``."""
    shares = mesh.size(SEQUENCE)
    parts = {name: f"{name} {size}" for name, size in mesh.axes if size > 1}
    if shares > 1 or not parts:
        parts[SEQUENCE] = _factors(strategy, ulysses, shares)
    return " x ".join(parts[name] for name in AXES if name in parts)


def _factors(strategy: str, ulysses: int | None, shares: int) -> str:
    return strategy if ulysses is None else f"{strategy} {ulysses}x{shares // ulysses}"


def best(options: Iterable[Option]) -> Option | None:
    """The fastest that is possible; weights are shared by no more ranks than memory asks for."""
    possible = (o for o in options if o.is_possible)
    return min(possible, key=lambda o: (o.tp, o.seconds), default=None)


def told(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def recommend(options: list[Option], memory_gb: float) -> str:
    """One sentence: what to take for the largest world, and why.

    Args:
        options: all of them; the first world is one GPU.
        memory_gb: of one GPU.
    """
    world = max(option.world for option in options)
    there = [o for o in options if o.world == world]
    chosen = best(there)
    if chosen is None:
        return f"Nothing is possible with {world} ranks: {_why_nothing(there, memory_gb)}."
    if world == 1:
        return f"One GPU takes about {told(chosen.seconds)} a forward."
    alone = best(o for o in options if o.world == 1)
    if chosen.speedup <= 1 and alone is not None:
        return (
            f"Take one GPU: {world} would take an estimated {told(chosen.seconds)} a forward "
            f"({chosen.title}), longer than one alone, because the model is so small."
        )
    named = f" (--mesh {chosen.mesh})" if chosen.cfg * chosen.tp > 1 else ""
    text = (
        f"Take {chosen.title} for {world} ranks{named}: an estimated {told(chosen.seconds)} a "
        f"forward, {chosen.speedup:.1f} times as fast as one GPU{' would be' * (alone is None)}, "
        f"fits with {memory_gb - chosen.memory / 1e9:.3g} GB free"
    )
    if chosen.tp > 1:
        text += ", which nothing without tp does"
    return text + "".join(_others(chosen, options)) + "."


def _why_nothing(options: Iterable[Option], memory_gb: float) -> str:
    reasons = {o.refused for o in options if o.refused}
    least = min((o for o in options if not o.refused), key=lambda o: o.memory, default=None)
    if least is None:
        return "; ".join(sorted(reasons))
    return (
        f"the least, {least.title}, holds {least.memory / 1e9:.3g} GB a rank, and a GPU has "
        f"{memory_gb:g} GB"
    )


def _others(chosen: Option, options: Iterable[Option]) -> Iterator[str]:
    """What else there is, beside what was chosen."""
    possible = [o for o in options if o.is_possible and o is not chosen]
    there = [o for o in possible if o.world == chosen.world]
    second = min((o for o in there if o.tp == chosen.tp), key=lambda o: o.seconds, default=None)
    if second is not None:
        yield f"; {second.title} would take {told(second.seconds)}"
    split = min((o for o in there if o.tp > chosen.tp), key=lambda o: o.seconds, default=None)
    if split is not None and split.memory < chosen.memory:
        spent, saved = split.seconds - chosen.seconds, (chosen.memory - split.memory) / 1e9
        cost = f"cost {told(spent)}" if spent > 0 else f"be {told(-spent)} faster"
        yield f"; tp {split.tp} would {cost} and save {saved:.3g} GB a rank"
    smaller = best(o for o in possible if 1 < o.world < chosen.world)
    if smaller is not None and smaller.efficiency > 1.5 * chosen.efficiency:
        yield (
            f", but {smaller.title} over {smaller.world} ranks uses its GPUs better "
            f"({smaller.efficiency:.0%} against {chosen.efficiency:.0%})"
        )
