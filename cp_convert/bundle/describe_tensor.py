"""Which weights ranks share: what the stages found, as a part of the manifest."""

from __future__ import annotations

from ..ir.records import Made
from . import manifest as m


def tensor_entry(made: Made) -> m.Tensor | None:
    """How the ranks of the axis ``tp`` share the model; ``None`` where nobody does."""
    divided, dense = made.rewritten.divided, made.captured.dense
    if divided.axis.size == 1:
        return None
    names = made.captured.signature.parameters
    return m.Tensor(
        bytes=sum(dense.state[node].nbytes for node in divided.shares),
        of_bytes=made.loaded.source.bytes,
        weights=[
            m.SharedWeight(
                name=names[node],
                dim=share.dim,
                segments=[segment.length for segment in share.layout.segments],
            )
            for node, share in divided.shares.items()
        ],
        whole=[
            m.WholeAttention(module=one.module, source=one.source, reason=one.reason)
            for one in divided.kept
        ],
        plan="model" if made.loaded.source.tp_plan else "inferred",
    )
