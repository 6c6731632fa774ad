"""Which part of the model is the first to go wrong; looked for only once something has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ir.program import Executable, module_path, source_line
from .lockstep import PerRank, run


@dataclass(frozen=True)
class Place:
    """A part of the model.

    Attributes:
        module: its path.
        line: ``file:line`` of the model's code, when known.
    """

    module: str
    line: str | None

    @property
    def where(self) -> str:
        """Both, for messages."""
        return f"{self.module} ({self.line})" if self.line else self.module


def first_not_finite(call: Callable[[], object], module: nn.Module) -> Place | None:
    """The first module that returns infinities or NaN, and the line that called it.

    Args:
        call: runs the model once more.
        module: the model.
    """
    found: list[Place] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(one: nn.Module, args: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(Place(path or type(one).__name__, _calling_line()))

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in module.named_modules()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_not_finite_in(
    program: Executable, flat: Mapping[str, Tensor], world: int, *, widen: bool = False
) -> Place | None:
    """The module and line of the first operator of a program that makes NaN or +infinity.

    Minus infinity is what masks are made of.
    """
    found: list[Place] = []

    def watch(node: fx.Node, values: PerRank) -> None:
        if not found and not all(_is_finite(one, lowest=True) for one in values.values):
            found.append(placed(node))

    run(program, flat, world, widen=widen, watch=watch)
    return found[0] if found else None


def placed(node: fx.Node) -> Place:
    """Where the model's code made a node."""
    return Place(module_path(node), source_line(node))


def _is_finite(values: Any, *, lowest: bool = False) -> bool:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            fine = leaf.isfinite() | (leaf == -torch.inf) if lowest else leaf.isfinite()
            if not bool(fine.all()):
                return False
    return True


def _calling_line() -> str | None:
    """``file:line`` of the innermost code that is neither torch's nor ours: the module's caller."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in ("/torch/", "/cp_convert/", "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
