"""This process's place among ranks that a launcher has started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank, the world, its place on this machine and how many there."""

    rank: int
    world: int
    local: int
    local_world: int


_LAUNCHERS: Final = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
"""Launchers, and the variables in which they tell a process its place."""


def place_of(world: int) -> Place | None:
    """The place that a launcher gave this process; ``None`` when it was started by hand.

    Torch's own variables are set from the others', so that ranks find each other: ``MASTER_ADDR``
    and ``MASTER_PORT`` have to be there.

    Raises:
        UsageError: the launcher started another number of ranks than the bundle has, or does not
            say where rank 0 is.
    """
    for name, rank, size, local, local_size in _LAUNCHERS:
        if rank in os.environ and size in os.environ:
            found = Place(
                int(os.environ[rank]),
                int(os.environ[size]),
                int(os.environ.get(local, 0)),
                int(os.environ.get(local_size, os.environ[size]).split("(")[0]),
            )
            if found.world == 1 and world > 1:
                return None  # a shell within an allocation
            if found.world != world:
                raise UsageError(
                    f"{name} started {found.world} ranks; the bundle has {world}.",
                    hint=f"start {world}, or run it without {name}: it starts its own.",
                )
            if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                raise UsageError(
                    f"{name} does not say where rank 0 is.",
                    hint="export MASTER_ADDR=HOST MASTER_PORT=29500 first, the same everywhere.",
                )
            os.environ.update(RANK=str(found.rank), WORLD_SIZE=str(found.world))
            return found
    return None
