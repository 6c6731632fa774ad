"""The part of the manifest that tells how guidance branches share the ranks. No torch."""

from __future__ import annotations

from .call import Count, Struct


class Guidance(Struct, frozen=True):
    """How the axis ``cfg`` shares a batch: branch 0's ``rows`` first, then branch 1's.

    ``inputs`` have all branches on dimension 0, the others none; so do the outputs, unless the
    engines ``combine`` two of them into ``uncond + s * (cond - uncond)`` by the input of that name
    (branch 0 is ``uncond``). ``pairs`` says that the model was converted from the inputs of one
    branch: whoever calls it branch by branch has to bring the calls together.
    """

    branches: Count
    rows: Count
    inputs: list[str]
    combine: str | None
    pairs: bool
