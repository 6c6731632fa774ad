"""The ranks that share a bundle, as a process group of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..errors import UsageError


def group_of(communicator: Any) -> Any:
    """The process group: the one that is given, else torch's default one, if any."""
    if isinstance(communicator, dist.ProcessGroup):
        return communicator
    return dist.group.WORLD if dist.is_initialized() else None


def checked_world(world: int, communicator: Any) -> None:
    """Refuse another number of ranks than the bundle has.

    Raises:
        UsageError: there is another.
    """
    if communicator is not None and not isinstance(communicator, dist.ProcessGroup):
        return  # the address of NCCL's, whose size TensorRT compares
    group = group_of(communicator)
    there = 1 if group is None else group.size()
    if there != world:
        raise UsageError(
            f"the bundle is for {world} ranks, and {there} were started.",
            hint="`cp-convert run BUNDLE` starts them; under torchrun: --nproc-per-node.",
        )


def everyone(told: Any, communicator: Any = None) -> list[Any]:
    """What all ranks tell, by rank; collective."""
    group = group_of(communicator)
    if group is None:
        return [told]
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, told, group=group)
    return found


def members(group: Any, ranks: Sequence[int]) -> Any:
    """The process group of these ranks of ``group``, or a placeholder where this is none of them.

    Collective among all ranks of torch's default group, because NCCL may split that one; among
    ``ranks`` alone where ``group`` is another: the default one then has to be made without
    ``device_id``.
    """
    if list(ranks) == list(range(group.size())):
        return group
    if group is dist.group.WORLD:
        return dist.new_group(list(ranks), sort_ranks=False)
    if group.rank() not in ranks:
        return None
    known = dist.get_process_group_ranks(group)
    return dist.new_group(
        [known[rank] for rank in ranks], sort_ranks=False, use_local_synchronization=True
    )
