"""Engines that were built, as records. No tensorrt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .network import Network


@dataclass(frozen=True)
class NetworkCollective:
    """One ``IDistCollectiveLayer`` as it stands in a network.

    Attributes:
        name: the layer's.
        operator: the ``cp::`` operator it stands for.
        kind: name of the ``CollectiveOperation``.
        root: the root rank, or -1.
        group: the ranks that take part.
        payload: bytes of the input tensor on one rank.
        instead: the workaround that added it, by its lowering's name.
    """

    name: str
    operator: str
    kind: str
    root: int
    group: tuple[int, ...]
    payload: int
    instead: str | None = None


@dataclass(frozen=True)
class Engine:
    """One engine that was written.

    Attributes:
        rank: whose it is.
        path: the file.
        size: in bytes.
        sha256: of the file.
        collectives: what its network communicates.
        seconds: how long network and engine took to make.
        activations: bytes that the builder says it needs.
        capabilities: compute capabilities that the engine itself records; ``8.0+``: and later.
        network: what the builder was given, if it was asked for.
        piece: which piece of the program it is, where that is cut into several.
        recalled: whether it was in the cache.
    """

    rank: int
    path: Path
    size: int
    sha256: str
    collectives: tuple[NetworkCollective, ...]
    seconds: float
    activations: int | None = None
    capabilities: tuple[str, ...] = ()
    network: Network | None = None
    piece: int | None = None
    recalled: bool = False
