"""The stored program, run by torch: NCCL between GPUs, gloo between CPUs.

It is what the engines are compared with, and what runs where no TensorRT does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..bundle.manifest import Manifest, Step
from ..bundle.program import Stored, read_program
from ..bundle.sizes import AllSizes, size_called
from ..errors import BackendMissing
from ..ir.cuts import Place
from ..ir.kinds import Twin, twins_of
from ..ir.program import Lowered, names_in
from ..ir.split import Pieces, split
from ..lora.choose import Asked
from .called import Called, Kind
from .chain import Chain, Part, Tensors
from .choice import Choice, weights_of
from .collectives import groups_of, make_groups, unsupported
from .groups import checked_world, group_of
from .lora import Sets
from .step_cache import StepCache
from .weights import bound_weights

Told = Callable[[str], None]


class TorchExecutor:
    """See :class:`.executors.Executor`.

    Raises:
        BackendMissing: the program has what only TensorRT has, or too few GPUs are here.
        UsageError: ``torch.distributed`` has another world than the bundle.
        DamagedBundle: a file is missing or altered.
    """

    name = "torch"

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        rank: int,
        device: str | None,
        communicator: Any = None,
        *,
        variant: str | None = None,
        compiled: bool = False,
        graph: bool = False,
        verify: bool = True,
        steps: StepCache | None = None,
        told: Told = lambda _: None,
    ) -> None:
        self.manifest, self.rank, self.steps = manifest, rank, steps
        self.device = device_of(rank, device)
        checked_world(manifest.world, communicator)
        self.choice = Choice(manifest, variant, communicator)
        stored = {
            name: read_program(one, folder, verify=verify)
            for name, one in _programs(self.choice).items()
        }
        told("program")
        wanted = dict.fromkeys(ranks for one in stored.values() for ranks in _groups(one.program))
        names = make_groups(list(wanted), rank, group_of(communicator))
        told("groups")
        kind = partial(Kind, rank=rank, groups=names, device=self.device, compiled=compiled)
        made = partial(CalledPieces, kind=kind, graph=graph, steps=steps)
        self._called: Mapping[str | None, CalledPieces] = (
            CalledSizes(manifest, next(iter(stored.values())), made)
            if manifest.dynamic is not None
            else {
                name: made(name, one, Cuts.of(self.choice.manifests[name]))
                for name, one in stored.items()
            }
        )
        shared, own = weights_of(self.choice.manifests, rank, programs=True)
        used = {name for one in stored.values() for name in one.names.values()}
        bound = partial(bound_weights, folder=folder, device=self.device, verify=verify, told=told)
        self._weights = bound([w for w in shared.values() if w.name in used])
        self._own = {name: bound(weights) for name, weights in own.items()}
        self._sets = Sets(manifest, folder, self._weights, communicator, verify=verify, told=told)

    def picked(self, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Tensor]]:
        """See :class:`.executors.Executor`."""
        return self.choice.picked(arguments)

    def run(self, variant: str | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`."""
        return self._called[variant](given, self._weights | self._own.get(variant, {}))

    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`."""
        return self.run(*self.picked(arguments))

    def use_lora(self, asked: Asked) -> None:
        """See :class:`.executors.Executor`."""
        self._weights = {**self._sets.bound, **self._sets.tensors(asked)}
        if self.steps is not None:
            self.steps.reset()

    def close(self) -> None:
        """Free the weights, and graphs that read them."""
        for one in self._called.values():
            one.close()
        self._weights, self._own, self._called = {}, {}, {}
        self._sets.close()

    def __enter__(self) -> TorchExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CalledPieces:
    """One variant's program on one rank, in its pieces.

    Args:
        variant: which.
        stored: as the bundle holds it, whole.
        cuts: where it is cut, as the engines are.
        kind: makes of a program what computes it.
        graph: whether calls after the first are replayed as CUDA graphs.
        steps: the rank's step cache.

    Raises:
        BackendMissing: its pieces cannot be skipped, though those of the engines can.
    """

    def __init__(
        self,
        variant: str | None,
        stored: Stored,
        cuts: Cuts,
        kind: Callable[[Stored], Kind],
        steps: StepCache | None,
        *,
        graph: bool,
    ) -> None:
        pieces = cuts.made(stored.program)
        programs = (stored.program,) if pieces is None else pieces.programs
        if pieces is not None and pieces.step is None and steps is not None:
            raise BackendMissing(f"torch's program cannot skip pieces: {pieces.why_not}.")
        twins = [WHOLE] if pieces is None else twins_of(programs, stored.names)
        kinds = {
            n: kind(Stored(programs[n], names_in(programs[n], stored.names)))
            for n in sorted({twin.of for twin in twins})
        }
        self._all = [Called(kinds[twin.of], twin.names, graph=graph) for twin in twins]
        self._weights: Tensors = {}
        parts = [Part(one.inputs, partial(self._run, one)) for one in self._all]
        self._chain = Chain(variant, parts, None if pieces is None else pieces.step, steps)

    def __call__(self, given: Tensors, weights: Tensors) -> dict[str, Tensor]:
        """Outputs by name, of inputs and weights by name."""
        self._weights = weights
        return self._chain(given)

    def _run(self, one: Called, given: Tensors) -> dict[str, Tensor]:
        return one(given, self._weights)

    def close(self) -> None:
        """Free their graphs."""
        for one in self._all:
            one.close()
        self._weights = {}


class CalledSizes(Mapping[str | None, CalledPieces]):
    """A program for a range of sizes: made for a size when that is first asked for.

    Args:
        manifest: of the bundle.
        stored: as the bundle holds it.
        made: makes of a program, by its size's name, what computes it.
    """

    def __init__(
        self, manifest: Manifest, stored: Stored, made: Callable[..., CalledPieces]
    ) -> None:
        self._manifest, self._stored, self._made = manifest, stored, made
        self._held: dict[str | None, CalledPieces] = {}

    def __getitem__(self, name: str | None) -> CalledPieces:
        if name not in self._held:
            size = size_called(self._manifest, str(name))
            if len(self._held) == SIZES:
                self._held.pop(next(iter(self._held))).close()
            self._held[name] = self._made(name, self._stored.at(size), Cuts())
        return self._held[name]

    def __iter__(self) -> Iterator[str | None]:
        return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)


WHOLE: Final = Twin(0, {})
"""Of a program that is not cut."""
SIZES: Final = 16
"""Of a range, how many a rank remembers the program of; the oldest is forgotten."""


def _programs(choice: Choice) -> Mapping[str | None, Manifest]:
    """The manifests of all programs that are opened; sizes of a range have one."""
    if isinstance(choice.manifests, AllSizes):
        return {None: choice.manifests.manifest}
    return choice.manifests


class Cuts(NamedTuple):
    """Where a program is cut: after modules between which pieces are skipped, and elsewhere."""

    modules: Sequence[str] = ()
    places: Sequence[Place] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Cuts:
        """As the engines of a variant are."""
        ends = [
            Place(one.after or one.before or "", enters=one.after is None)
            for one in manifest.pieces[:-1]
        ]
        if not isinstance(manifest.step, Step):
            return cls((), ends)
        skipped = ends[manifest.step.first - 1], ends[len(ends) - manifest.step.last]
        return cls([one.module for one in skipped], ends)

    def made(self, program: Lowered) -> Pieces | None:
        """The pieces; ``None`` where it stays whole."""
        return split(program, self.modules, self.places) if self.places else None


def _groups(program: Lowered) -> list[tuple[int, ...]]:
    """Ranks that communicate.

    Raises:
        BackendMissing: the program has what only TensorRT has.
    """
    for reason in unsupported(program):
        raise BackendMissing(f"torch cannot run this program: {reason}.")
    return groups_of(program)


def device_of(rank: int, device: str | None) -> torch.device:
    """The device of a rank: the one that is named, else a GPU if there is any.

    Raises:
        BackendMissing: there is none of that name.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = f"cuda:{rank % count}" if count else "cpu"
    return checked_device(device, rank)


def checked_device(device: str, rank: int) -> torch.device:
    """The device of this name, for ``rank``.

    Raises:
        BackendMissing: there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= count:
        raise BackendMissing(
            f"rank {rank} is to run on {device}, and torch sees {count} GPUs here.",
            hint="--devices names the GPUs of this machine, one a rank; --devices cpu runs slowly "
            "without.",
        )
    return found
