"""The mesh's axes besides the sequence's: a dense program in, what the sequence is spread over out.

Guidance first, because it splits every value that has a batch; then weights, of what is left.
"""

from __future__ import annotations

from ..ir.program import Lowered
from ..ir.sharded import Guided
from ..ir.shares import Divided
from ..mesh import GUIDANCE, TENSOR, Mesh
from .branches import split_branches
from .tensor_parallel import tensor_parallel


def along_others(program: Lowered, mesh: Mesh) -> tuple[Guided, Divided]:
    """Guidance's branches, then weights, each by its own axis of ``mesh``.

    Raises:
        CannotShard: an axis has nothing to split.
    """
    guided = split_branches(program, mesh.axis(GUIDANCE))
    return guided, tensor_parallel(guided.program, mesh.axis(TENSOR))
