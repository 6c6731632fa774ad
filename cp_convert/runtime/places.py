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
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Launchers, and the variables in which they tell a process its place: torch's, Open MPI's,
Slurm's, and MPICH's (Intel MPI's)."""


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
            found = int(os.environ[size])
            if found == 1:
                return None  # a shell within an allocation, or nothing to meet
            _check(name, found, world)
            own = int(os.environ[rank])
            os.environ.update(RANK=str(own), WORLD_SIZE=str(found))
            here = os.environ.get(local_size, str(found))
            return Place(own, found, int(os.environ.get(local, own)), _tasks(here))
    return None


def local_rank() -> int | None:
    """This process's place on its machine, where a launcher tells it."""
    told = [os.environ[local] for *_, local, _ in _LAUNCHERS if local in os.environ]
    return int(told[0]) if told else None


def _check(name: str, found: int, world: int) -> None:
    if found != world:
        raise UsageError(
            f"{name} started {found} ranks; the bundle has {world}.",
            hint=f"start {world}, or run it without {name}: it starts its own.",
        )
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"{name} does not say where rank 0 is.",
            hint="export MASTER_ADDR=HOST MASTER_PORT=29500 first, the same everywhere.",
        )


def _tasks(told: str) -> int:
    """How many ranks are on this machine: ``4``, or Slurm's ``4(x2),3`` for all of its nodes."""
    nodes: list[int] = []
    for part in told.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        nodes += [int(count)] * int(times or 1)
    return nodes[min(int(os.environ.get("SLURM_NODEID", 0)), len(nodes) - 1)]
