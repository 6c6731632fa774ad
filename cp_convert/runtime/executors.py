"""One rank of a bundle, ready to be called: chosen in one place, refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import bundle as bundles
from ..bundle.manifest import Manifest
from ..bundle.parts import TO_SKIP, kind_problem, why_no_step
from ..bundle.variants import all_variants, variant_of
from ..errors import BackendMissing, ConvertError, DamagedBundle, UsageError

if TYPE_CHECKING:  # a bundle is checked before torch is imported
    from torch import Tensor

    from ..lora.choose import Asked
    from .choice import Choice
    from .step_cache import StepCache

EXECUTORS: Final = ("auto", "tensorrt", "torch")
Told = Callable[[str], None]


class Executor(Protocol):
    """One rank of a bundle at work; a context manager, whose end frees what it holds.

    Attributes:
        name: ``tensorrt`` or ``torch``.
        manifest: of the bundle.
        rank: whose engine or program it is.
        choice: the variants that are open.
        steps: what is remembered from call to call, where a step cache was asked for.
    """

    name: str
    manifest: Manifest
    rank: int
    choice: Choice
    steps: StepCache | None

    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """The model's outputs by name; all ranks must be called alike, with the same inputs."""

    def picked(self, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Tensor]]:
        """The variant that forward's arguments are for, and its inputs; see :mod:`.choice`.

        Raises:
            UsageError: no variant, or not the only one, has such inputs.
            RunFailed: ranks are given inputs of different variants.
        """

    def run(self, variant: str | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a variant by name, of inputs that are known to be its own."""

    def use_lora(self, asked: Asked) -> None:
        """Bind the weights with these LoRA sets, or without any; collective.

        A step cache forgets its steps, which other weights have computed.

        Args:
            asked: the names of sets, each at the strength that it was added with, or a mapping
                that tells another; ``None``: the weights that the bundle was made with.

        Raises:
            UsageError: there is no such set, or they cannot be added to one another.
            DamagedBundle: a file of a set is missing or altered.
            RunFailed: ranks ask for different sets.
        """

    def close(self) -> None:
        """Free everything, in the order that the libraries want; a second time it does nothing."""

    def __enter__(self) -> Executor:
        """Itself."""

    def __exit__(self, *_: object) -> None:
        """Close."""


def open_rank(
    path: Path,
    rank: int,
    *,
    executor: str = "auto",
    device: str | None = None,
    communicator: Any = None,
    compiled: bool = False,
    graph: bool = False,
    verify: bool = True,
    lora: Asked = None,
    variant: str | None = None,
    step_cache: float | None = None,
    told: Told = lambda _: None,
) -> Executor:
    """Open the bundle at ``path`` for ``rank``; collective: every rank of the world does it.

    Args:
        path: the bundle.
        rank: 0 to world - 1.
        executor: one of :data:`EXECUTORS`; ``auto`` takes TensorRT where it can run the engines,
            on all ranks.
        device: such as ``cuda:1`` or ``cpu``; ``None``: a GPU where there is one, rank by rank.
        communicator: a process group of ``torch.distributed`` with the bundle's world, or, for
            TensorRT, the address of an ``ncclComm_t``; ``None``: torch's default group.
        compiled: whether torch's program goes through ``torch.compile``.
        graph: whether forwards after the first are replayed as a CUDA graph.
        verify: whether the program, and weights outside the engines, are compared with the
            manifest's SHA-256.
        lora: sets that are in effect from the beginning, see :meth:`Executor.use_lora`.
        variant: the only one to open; ``None``: all, of which a call takes its own by shapes.
        step_cache: below which distance pieces are skipped, see :mod:`.step_cache`.
        told: is called with every step that was taken, so that a watcher sees progress.

    Raises:
        DamagedBundle: a file is missing or altered.
        UsageError: there is no such rank or variant, another world, or nothing to skip.
        BackendMissing: the executor cannot run this bundle here.
        RunFailed: ranks ask for different LoRA sets or step caches.
    """
    opened = _opened(
        path, rank, executor, device, communicator, variant=variant, compiled=compiled,
        graph=graph, verify=verify, step_cache=step_cache, told=told,
    )  # fmt: skip
    try:
        opened.use_lora(lora)  # without any, too: ranks have to agree on that
    except ConvertError:
        opened.close()
        raise
    return opened


def _opened(
    path: Path,
    rank: int,
    executor: str,
    device: str | None,
    communicator: Any,
    *,
    variant: str | None,
    compiled: bool,
    graph: bool,
    verify: bool,
    step_cache: float | None,
    told: Told,
) -> Executor:
    manifest, folder = bundles.read(path)
    if not 0 <= rank < manifest.world:
        raise UsageError(
            f"rank {rank}: the bundle has ranks 0 to {manifest.world - 1}.",
            hint=f"start {manifest.world} ranks.",
        )
    wanted = _wanted(manifest, variant, communicator)
    _check_kinds(wanted)
    name, why_not = choose(wanted, executor, rank, device, communicator)
    steps = _steps(wanted, step_cache, communicator)
    given = (manifest, folder, rank, device, communicator)
    if name == "tensorrt":
        from .tensorrt_executor import TensorRTExecutor  # late: torch

        return TensorRTExecutor(
            *given, variant=variant, graph=graph, verify=verify, steps=steps, told=told
        )
    _check_program(manifest, why_not)
    from .torch_executor import TorchExecutor  # late: torch

    return TorchExecutor(
        *given, variant=variant, compiled=compiled, graph=graph, verify=verify, steps=steps,
        told=told,
    )  # fmt: skip


def _check_kinds(manifest: Manifest) -> None:
    for one in all_variants(manifest):
        if (problem := kind_problem(one)) is not None:
            raise DamagedBundle(
                f"the manifest is wrong: {problem}.",
                hint="it was altered; `cp-convert verify` looks at the rest. Convert again.",
            )


def _steps(manifest: Manifest, threshold: float | None, communicator: Any) -> StepCache | None:
    """The step cache that is asked for; where a bundle has pieces, all ranks say whether any is."""
    views = all_variants(manifest)
    if not manifest.pieces:
        if threshold is not None:
            raise UsageError(f"step_cache: {why_no_step(manifest)}.", hint=TO_SKIP)
        return None
    from .groups import checked_world  # late: torch
    from .step_cache import opened_cache  # late: torch

    checked_world(manifest.world, communicator)
    why_not = next(filter(None, map(why_no_step, views)), None)
    return opened_cache(threshold, manifest.world, communicator, why_not)


def _wanted(manifest: Manifest, variant: str | None, communicator: Any) -> Manifest:
    """What is opened; where there are several variants, all ranks open the same.

    Raises:
        UsageError: there is no such variant.
        RunFailed: other ranks open others.
    """
    if not manifest.variants and manifest.dynamic is None:
        return manifest if variant is None else variant_of(manifest, variant)
    from .choice import check_same  # late: torch
    from .groups import checked_world, everyone  # late: torch

    checked_world(manifest.world, communicator)
    refusal, found = None, manifest
    try:
        found = manifest if variant is None else variant_of(manifest, variant)
    except UsageError as error:
        refusal = error
    own = (variant or "all of its variants", refusal and refusal.message)
    check_same(everyone(own, communicator), refusal, "opens {}, and rank 0 {}")
    return found


def _check_program(manifest: Manifest, why_not: str | None) -> None:
    if manifest.program is None:
        raise BackendMissing(
            "the bundle holds no program for torch"
            + (f", and TensorRT cannot run its engines here: {why_not}." if why_not else "."),
            hint="convert with --program yes.",
        )


def choose(
    manifest: Manifest, executor: str, rank: int, device: str | None, communicator: Any
) -> tuple[str, str | None]:
    """Which executor runs this bundle, and why TensorRT does not, if it does not.

    Collective, unless torch is asked for: what one rank cannot do, none does.

    Raises:
        BackendMissing: TensorRT is asked for and cannot.
    """
    if executor == "torch":
        return executor, None
    from .groups import checked_world, everyone  # late: torch
    from .tensorrt_executor import why_not  # late: torch

    checked_world(manifest.world, communicator)
    reasons = everyone(why_not(manifest, rank, device), communicator)
    odd = [number for number, one in enumerate(reasons) if one is not None]
    reason = reasons[odd[0]] if odd else None
    if reason is not None and len(odd) < len(reasons):
        reason += f" (rank {', '.join(map(str, odd))})"
    if executor == "tensorrt" and reason is not None:
        raise BackendMissing(
            f"TensorRT cannot run these engines here: {reason}.",
            hint="--executor torch runs the stored program; the numbers are the same, not the "
            "speed.",
        )
    return ("tensorrt", None) if reason is None else ("torch", reason)
