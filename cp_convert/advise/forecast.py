"""What ``cp-convert plan`` finds, as data. No torch.

Bytes, counts and padding are computed from the very programs that would be built; seconds and
activations are estimates.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from .hardware import Hardware


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy on one mesh.

    Attributes:
        strategy: its name.
        world: how many ranks.
        ulysses: for ``usp``, how many neighbours exchange; the others form the ring.
        cfg: how many groups of ranks share guidance branches; the strategy is within each.
        refused: why it is not possible, or ``None``.
        collectives: that one rank takes part in, per forward.
        bytes_sent: by one rank per forward, averaged over the ranks.
        weights: bytes of parameters on every rank.
        activations: bytes of activations at once (estimated).
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
    refused: str | None = None
    collectives: int = 0
    bytes_sent: int = 0
    weights: int = 0
    activations: int = 0
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
    def title(self) -> str:
        """The strategy, with its factors, behind the axis of guidance."""
        if self.cfg == self.world > 1:
            return f"cfg {self.cfg}"
        before, sharing = f"cfg {self.cfg} x " * (self.cfg > 1), self.world // self.cfg
        if self.ulysses is None:
            return before + self.strategy
        return f"{before}{self.strategy} {self.ulysses}x{sharing // self.ulysses}"

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


def best(options: Iterable[Option]) -> Option | None:
    """The fastest that is possible."""
    return min((o for o in options if o.is_possible), key=lambda o: o.seconds, default=None)


def told(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def recommend(options: list[Option]) -> str:
    """One sentence: which strategy for the largest world, and why not more ranks if so."""
    world = max(option.world for option in options)
    chosen = best(o for o in options if o.world == world)
    if chosen is None:
        reasons = {o.refused or "it does not fit into memory" for o in options if o.world == world}
        return f"Nothing is possible with {world} ranks: {'; '.join(sorted(reasons))}."
    if world == 1:
        return f"One GPU takes about {told(chosen.seconds)} a forward."
    if chosen.speedup <= 1:
        return (
            f"Take one GPU: {world} would take an estimated {told(chosen.seconds)} a forward "
            f"({chosen.title}), longer than one alone, because the model is so small."
        )
    others = [o for o in options if o.world == world and o.is_possible and o is not chosen]
    text = (
        f"Take {chosen.title} for {world} ranks: an estimated {told(chosen.seconds)} a "
        f"forward, {chosen.speedup:.1f} times as fast as one GPU"
    )
    if others:
        second = min(others, key=lambda o: o.seconds)
        text += f"; {second.title} would take {told(second.seconds)}"
    smaller = best(o for o in options if 1 < o.world < world)
    if smaller is not None and smaller.efficiency > 1.5 * chosen.efficiency:
        text += (
            f", but {smaller.title} over {smaller.world} ranks uses its GPUs better "
            f"({smaller.efficiency:.0%} against {chosen.efficiency:.0%})"
        )
    return text + "."
