"""``--mesh``, ``--cfg``, ``--combine``, ``--tp``: options in, the axes' sizes and world out."""

from __future__ import annotations

from math import prod
from typing import Any

import click

from ..errors import UsageError
from ..job import PLANS
from ..mesh import AXES, GUIDANCE, SEQUENCE, TENSOR, Mesh
from .options import Decorator, Word


def option(command: Any) -> Any:
    """These options."""
    for one in reversed(_OPTIONS):
        command = one(command)
    return command


_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--mesh", metavar="AXIS=N[,AXIS=N]",
        help="How the ranks are arranged: cfg=N groups share a batch's guidance branches, tp=N "
        "every weight, and cp=N the sequence, by --strategy; cp is what is left of --world.",
    ),
    click.option(
        "--cfg", type=int,
        help="Short for --mesh cfg=N.  [default: 1; with -s auto 2 where "
        "the batch is even and that is faster]",
    ),
    click.option(
        "--combine", metavar="INPUT",
        help="With --cfg 2: the engines return uncond + s * (cond - uncond), s being a new input "
        "of this name, and not both branches.",
    ),
    click.option(
        "--unbatched", multiple=True, metavar="ARGUMENT",
        help="With --cfg: this argument has one row whatever the batch is, and keeps it; "
        "repeatable.",
    ),
    click.option(
        "--tp", type=int,
        help="Short for --mesh tp=N.  [default: 1; with -s auto as many as memory asks for]",
    ),
    click.option(
        "--tp-plan", type=Word(PLANS),
        help="With --tp: share what the model's own plan names (its _tp_plan, or the model file's "
        "tp_plan), or all that can be (auto).  [default: the model file's tp_plan if it has one, "
        "else auto]",
    ),
)  # fmt: skip


def taken(given: dict[str, Any]) -> None:
    """Put ``cfg``, ``tp`` and, where the mesh says it whole, ``world`` into the options' place.

    ``open_axes`` are those that nobody named.

    Raises:
        UsageError: they contradict each other.
    """
    text = given.pop("mesh")
    sizes = {} if text is None else Mesh.sizes(text)
    known = {name for name in (GUIDANCE, TENSOR) if given[name] is not None} | sizes.keys()
    is_open = SEQUENCE not in sizes
    given["open_axes"] = tuple(n for n in (GUIDANCE, TENSOR) if is_open and n not in known)
    for name in (GUIDANCE, TENSOR):
        if name in sizes and given[name] is not None:
            raise UsageError(
                f"--{name} {given[name]} with --mesh {text}.", hint="leave one of the two out."
            )
        given[name] = sizes.get(name, 1) if given[name] is None else given[name]
    if SEQUENCE not in sizes:
        return
    world = prod({**dict.fromkeys(AXES, 1), **given, **sizes}[name] for name in AXES)
    if given["world"] not in (None, world):
        raise UsageError(
            f"--mesh {text} takes {world} ranks, and --world is {given['world']}.",
            hint="leave --world out, or cp, which is what is left of it.",
        )
    given["world"] = world


def sequence(given: dict[str, Any]) -> int:
    """How many ranks share the sequence."""
    return Mesh.of(given["world"], given["cfg"], given["tp"]).size(SEQUENCE)


def factor(ulysses: int | None, ring: int | None, sharing: int) -> int | None:
    """How many ranks exchange, from either factor of those that share the sequence.

    Raises:
        UsageError: the factors are not those of that many.
    """
    if ring is None:
        return ulysses
    if ring < 1 or ring * (ulysses or sharing // ring) != sharing:
        raise UsageError(
            f"--ulysses {ulysses} times --ring {ring} is not the {sharing} ranks of the sequence."
            if ulysses
            else f"--ring {ring} does not divide the {sharing} ranks of the sequence."
        )
    return ulysses or sharing // ring
