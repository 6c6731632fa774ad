"""Ranks as processes, forked from the server that has imported torch and diffusers once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[..., Any]


def run_ranks(work: Work, world: int, folder: Path, *args: Any, seconds: float = 120) -> list[Any]:
    """What ``work(rank, *args)`` returns on every rank; under torchrun's variables.

    A refusal comes back as its text.
    """
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    folder.mkdir(exist_ok=True)
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, folder, port, args))
        for rank in range(world)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(seconds)
    alive = [one for one in ranks if one.is_alive()]
    for one in alive:
        one.kill()
    assert not alive, f"{len(alive)} ranks hang"
    import torch

    told = []
    for rank, one in enumerate(ranks):
        file = folder / f"{rank}.pt"
        told.append(torch.load(file) if file.exists() else f"exit code {one.exitcode}")
    return told


def _rank(
    work: Work, rank: int, world: int, folder: Path, port: int, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    from cp_convert.errors import ConvertError

    torch.set_num_threads(1)
    try:
        told = work(rank, *args)
    except (ConvertError, RuntimeError) as error:
        traceback.print_exc(file=sys.stderr)
        told = f"{type(error).__name__}: {error}"
    torch.save(told, folder / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
