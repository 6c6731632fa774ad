"""Ranks as processes, forked from the server (:mod:`tests.server`); each runs many bundles."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def outputs_of(bundles: Sequence[Path], world: int, folder: Path) -> list[list[Any]]:
    """What rank 0, 1, ... return, bundle by bundle, for the inputs in ``inputs.pt`` beside each."""
    context = multiprocessing.get_context("forkserver")
    work = [
        context.Process(target=_rank, args=(list(bundles), rank, world, folder))
        for rank in range(world)
    ]
    for one in work:
        one.start()
    for one in work:
        one.join(120)
    assert [one.exitcode for one in work] == [0] * world
    import torch

    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(bundles: list[Path], rank: int, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from cp_convert import runtime
    from cp_convert.runtime.join import joined

    torch.set_num_threads(1)
    found = []
    store = str(folder / "store")
    with joined(rank, world, torch.device("cpu"), store=store, timeout=60):
        for bundle in bundles:
            inputs = torch.load(bundle.parent / "inputs.pt", weights_only=False)
            with runtime.open(bundle, executor="torch", device="cpu") as opened:
                found.append(opened(**inputs))
    torch.save(found, folder / f"{rank}.pt")
