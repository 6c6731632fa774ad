"""The mesh's axes one after another: a dense program in, what a strategy is put into out.

Guidance first, because it splits every value that has a batch; then weights, of what is left; then
the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..ir.program import Lowered
from ..ir.sharded import Guided, Sharded
from ..ir.shares import Declared, Divided
from ..mesh import GUIDANCE, TENSOR, Axis, Mesh
from .branches import split_branches
from .shard import shard
from .tensor_parallel import tensor_parallel


@dataclass(frozen=True)
class Arranged:
    """A program whose ranks stand on a mesh; its attentions are still to be done.

    Attributes:
        mesh: how they stand.
        axis: those that share the sequence.
        guided: the dense program, or that of the rank's own guidance branches.
        divided: that, or the one whose ranks share its weights.
        sharded: that, spread over the sequence.
    """

    mesh: Mesh
    axis: Axis
    guided: Guided
    divided: Divided
    sharded: Sharded


def along_others(
    program: Lowered, mesh: Mesh, plan: Mapping[str, Declared] = MappingProxyType({})
) -> tuple[Guided, Divided]:
    """Guidance's branches, then weights, each by its own axis of ``mesh``.

    ``plan`` is that of :func:`.tensor_parallel.tensor_parallel`.

    Raises:
        CannotShard: an axis has nothing to split.
    """
    guided = split_branches(program, mesh.axis(GUIDANCE))
    return guided, tensor_parallel(guided.program, mesh.axis(TENSOR), plan)


def arrange(
    program: Lowered,
    mesh: Mesh,
    plan: Mapping[str, Declared] = MappingProxyType({}),
    own: Iterable[Axis] = (),
) -> Arranged:
    """All axes of ``mesh``.

    Args:
        program: the dense program.
        mesh: how the ranks stand.
        plan: see :func:`.tensor_parallel.tensor_parallel`.
        own: axes in which the model communicates by itself.

    Raises:
        CannotShard: an axis has nothing to split.
    """
    axis = mesh.sequence(own)
    guided, divided = along_others(program, mesh, plan)
    return Arranged(mesh, axis, guided, divided, shard(divided.program, axis))
