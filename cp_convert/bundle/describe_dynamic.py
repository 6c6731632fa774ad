"""A range of sizes, as the manifest tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ..errors import CannotLift
from ..ir.lift import OTHER_WAY, SIZE
from ..ir.proof import Error
from ..ir.records import Made
from . import manifest as m


def dynamic_entry(made: Made) -> m.Dynamic | None:
    """What sizes a bundle is for; nothing where it has one.

    Raises:
        CannotLift: a binding's shape follows from padding.
    """
    lifted, job = made.emitted.lifted, made.loaded.job
    if lifted is None:
        return None
    sizes = lifted.sizes
    return m.Dynamic(
        argument=sizes.name,
        first=sizes.first,
        last=sizes.last,
        step=sizes.step,
        multiple=job.multiple,
        shapes=dict(_shapes(msgspec.msgpack.decode(lifted.built.document))),
        proven=[_proven(n, made) for n in made.proofs],
    )


def _shapes(document: Mapping[str, Any]) -> Iterator[tuple[str, list[m.Extent]]]:
    for name, _, _, shape in (*document["inputs"], *document["outputs"]):
        found = [_extent(name, dim, n) for dim, n in enumerate(shape) if isinstance(n, dict)]
        if found:
            yield name, found


def _extent(name: str, dim: int, told: Mapping[str, Sequence[int]]) -> m.Extent:
    under, offset, scale, *slots = told[SIZE]
    if any(slots):
        raise CannotLift(
            f"dimension {dim} of {name} is as long as what it is padded to.", hint=OTHER_WAY
        )
    return m.Extent(dim=dim, scale=scale, offset=offset, under=under)


def _proven(size: int, made: Made) -> m.ProvenSize:
    proof, network = made.proofs[size], made.network_proofs.get(size)
    return m.ProvenSize(
        size=size,
        algebra=None if proof is None else _largest(proof.algebra),
        ranks=None if proof is None else _largest(proof.ranks),
        network=None if network is None else _largest(network.algebra),
    )


def _largest(errors: Sequence[Error]) -> float:
    return max(one.max for one in errors)
