"""Calls of one guidance branch each come in, one forward of all branches is made for them.

As many calls as there are branches belong together. The first ones are answered by promises
(:mod:`.promised`); whoever looks at one before the last call has come gets that branch alone, which
is right and costs a forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import torch
from torch import Tensor

from ..bundle.manifest import Io, Manifest
from ..errors import UsageError
from .promised import Promised

Tensors = Mapping[str, Tensor]
PAIRS: Final = "pairs"


def of_one_branch(manifest: Manifest) -> Manifest:
    """The manifest with the inputs as one branch has them.

    Raises:
        UsageError: its ranks do not share branches, or the engines return none by itself.
    """
    known = manifest.guidance
    if known is None:
        raise UsageError(
            f'guidance="{PAIRS}": the bundle has no guidance branches.',
            hint="convert with --cfg 2, or leave it out: the calls go through one by one.",
        )
    if known.combine is not None:
        raise UsageError(
            f'guidance="{PAIRS}": the engines combine the branches by {known.combine}, and the '
            "pipeline does too.",
            hint="convert without --combine.",
        )
    io = [_of_one(one, known.rows) if one.name in known.inputs else one for one in manifest.io]
    return msgspec.structs.replace(manifest, io=io)


class Branches:
    """The branches that wait for the others.

    Args:
        manifest: of the bundle.
        device: where its outputs are.
        run: a forward of all branches.
    """

    def __init__(
        self, manifest: Manifest, device: torch.device, run: Callable[[Tensors], Tensors]
    ) -> None:
        assert manifest.guidance is not None
        self.known, self.device, self.run = manifest.guidance, device, run
        self.outputs = [one for one in manifest.io if one.mode == "output"]
        self._group = _Group()

    def _settle(self, group: _Group) -> None:
        """Compute what was called; the next call begins another group."""
        self._group, count = _Group(), len(group.calls)
        # Branches that did not come are copies of the last one; nobody reads theirs.
        calls = [*group.calls, *[group.calls[-1]] * (self.known.branches - count)]
        outputs = self.run({name: self._joined(name, calls) for name in calls[0]})
        for number in range(count):
            group.results.append({name: self._row(x, number) for name, x in outputs.items()})

    def called(self, given: Tensors) -> Tensors:
        """One branch's outputs: promises, unless it is the last one.

        Raises:
            UsageError: it differs from the other branches in an input that has none.
        """
        group, number = self._group, len(self._group.calls)
        group.calls.append(given)
        if number + 1 == self.known.branches:
            self._settle(group)
            return group.results[number]
        return {io.name: self._promise(io, group, number) for io in self.outputs}

    def _promise(self, io: Io, group: _Group, number: int) -> Tensor:
        def find() -> Tensor:
            if not group.results:
                self._settle(group)
            return group.results[number][io.name]

        return Promised(self._sizes(io), getattr(torch, io.dtype), self.device, find)

    def _sizes(self, io: Io) -> list[int]:
        return [self.known.rows, *io.shape[1:]] if self._has_branches(io.shape) else io.shape

    def _has_branches(self, sizes: list[int] | torch.Size) -> bool:
        return len(sizes) > 0 and sizes[0] == self.known.rows * self.known.branches

    def _row(self, output: Tensor, number: int) -> Tensor:
        has_branches = self._has_branches(output.shape)
        return output.chunk(self.known.branches)[number] if has_branches else output

    def _joined(self, name: str, calls: list[Tensors]) -> Tensor:
        own = [call[name] for call in calls]
        if name in self.known.inputs:
            return torch.cat(own)
        for other in own[1:]:
            if other is not own[0] and not torch.equal(other, own[0]):
                raise UsageError(
                    f"{name} differs between the calls of one step, and the engines take it once "
                    "for all branches.",
                    hint="convert with example inputs whose first dimension is the batch in it "
                    'too, or open the bundle without guidance="pairs".',
                )
        return own[0]


class _Group:
    """Calls that belong together, and what came of them."""

    def __init__(self) -> None:
        self.calls: list[Tensors] = []
        self.results: list[Tensors] = []


def _of_one(io: Io, rows: int) -> Io:
    return Io(name=io.name, mode=io.mode, dtype=io.dtype, shape=[rows, *io.shape[1:]])
