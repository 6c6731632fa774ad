"""A rank's engine, run by TensorRT 11 or TensorRT-RTX, whichever built it.

Source: TensorRT's documentation (*Multi-device inference*, ``IExecutionContext``). Nothing here was
executed on a GPU yet: TensorRT-RTX runs on compute capability 7.5 to 8.9 and 12.x.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Final

import torch
from packaging.version import Version
from torch import Tensor

from ..backends import BACKENDS
from ..bundle.manifest import Manifest, Step, of_rank
from ..bundle.parts import Part as Piece
from ..bundle.parts import between, parts_of
from ..bundle.variants import all_variants
from ..errors import ConvertError
from ..ir import split
from ..lora.choose import Asked
from ..releases import NCCL
from .chain import Chain, Part
from .choice import Choice, weights_of
from .gpu import Gpu
from .groups import checked_world, group_of
from .lora import Sets
from .step_cache import StepCache
from .tensorrt_context import Call, Context, Rank
from .torch_executor import device_of
from .weights import bound_weights

Told = Callable[[str], None]
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_log = logging.getLogger(__name__)


def why_not(
    manifest: Manifest, rank: int, device: str | None, gpu: Gpu | None = None
) -> str | None:
    """Why TensorRT cannot run a rank's engine on ``device``, or ``None``; takes no GPU memory."""
    backend = manifest.backend
    module, installed = MODULES[backend.name], BACKENDS[backend.name].version
    if device == "cpu" or not (gpu or Gpu).count():
        return "there is no GPU"
    if util.find_spec(module) is None:
        return f"{module} is not installed"
    if Version(installed) != Version(backend.version):
        return (
            f"the engines belong to {backend.name} {backend.version}, which built them, and "
            f"{installed} is installed"
        )
    doubts = [one.runs_on.doubt for one in all_variants(manifest)]
    if (doubt := next(filter(None, doubts), None)) is not None:
        return doubt
    return _gpu_refusal(manifest, rank, gpu or Gpu(device_of(rank, device)))


def _gpu_refusal(manifest: Manifest, rank: int, gpu: Gpu) -> str | None:
    refusal = _generation(manifest, gpu.capability())
    if refusal is not None:
        return refusal
    nccl = ".".join(map(str, gpu.nccl()))
    if manifest.world > 1 and Version(nccl) < Version(NCCL):
        return f"NCCL {nccl} is loaded, and TensorRT needs {NCCL}"
    needed = bytes_needed(manifest, rank)
    if gpu.free() < needed:
        return (
            f"the engine, its weights and activations need {needed / 1e9:.1f} GB, and "
            f"{gpu.free() / 1e9:.1f} GB are free"
        )
    return None


def _generation(manifest: Manifest, capability: tuple[int, int]) -> str | None:
    here = ".".join(map(str, capability))
    if manifest.backend.name == "tensorrt-rtx" and capability[0] in (9, 10):
        return (
            f"TensorRT-RTX has no kernels for compute capability {here}; Hopper and data-centre "
            "Blackwell need --backend tensorrt"
        )
    targets = manifest.runs_on.compute_capabilities
    if targets and not any(_is_for(target, capability) for target in targets):
        return (
            f"the engines are for compute capability {', '.join(targets)}, and this GPU has {here}"
        )
    return None


def _is_for(target: str, capability: tuple[int, int]) -> bool:
    """Whether ``8.9``, or ``12.0+`` for that and all that come later, names a capability."""
    major, minor = map(int, target.removesuffix("+").split("."))
    return capability >= (major, minor) if target.endswith("+") else capability == (major, minor)


def bytes_needed(manifest: Manifest, rank: int) -> int:
    """What a rank's engines, weights and activations take on a GPU; tied weights count once.

    Activations are the largest engine's, in whose memory the others compute as well.
    """
    views = all_variants(manifest)
    parts = [parts_of(one, rank) for one in views]
    engines = {part.engine.file: part.engine for own in parts for part in own}.values()
    own = [one for view in views for one in of_rank(view.weights, rank)]
    weights = {(one.file, one.offset): one.bytes for one in own}
    most = max(engine.activation_bytes or 0 for engine in engines)
    return sum(engine.bytes for engine in engines) + most + sum(weights.values())


class TensorRTExecutor:
    """See :class:`.executors.Executor`.

    What a rank can find out alone comes first: no other waits in the communicator for one whose
    files are missing. Variants and pieces share the weights, and the memory in which their engines
    compute: one runs at a time, and the one that needs most decides.

    Raises:
        BackendMissing: the run-time cannot be loaded, or does not take the engine.
        DamagedBundle: the engine or a weight is missing or altered.
        UsageError: another world was started, or there is no such variant.
        RunFailed: the communicator was refused; without it results would be wrong, silently.
    """

    name = "tensorrt"

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        rank: int,
        device: str | None,
        communicator: Any = None,
        *,
        variant: str | None = None,
        verify: bool = True,
        graph: bool = False,
        steps: StepCache | None = None,
        told: Told = lambda _: None,
        gpu: Gpu | None = None,
    ) -> None:
        self.manifest, self.rank, self.steps = manifest, rank, steps
        checked_world(manifest.world, communicator)
        self.gpu = gpu or Gpu(device_of(rank, device))
        self.choice = Choice(manifest, variant, communicator)
        self._wants_graph = graph
        self._engines = engines_of(manifest, self.choice)
        self._size: str | None = None
        self._contexts: dict[str, Context] = {}
        self._calls: dict[str | None, list[Call]] = {}
        self._chains: dict[str | None, Chain] = {}
        self._memory: Tensor | None = None
        self._weights: dict[str, Tensor] = {}
        self._sets: Sets | None = None
        self._trt: Any = importlib.import_module(MODULES[manifest.backend.name])
        self._logger = _logger(self._trt)
        self._runtime: Any = None
        try:
            self._open(folder, communicator, verify=verify, told=told)
        except ConvertError:
            self.close()
            raise

    def _open(self, folder: Path, communicator: Any, *, verify: bool, told: Told) -> None:
        self.gpu.use()
        told("the engine")
        self._runtime = self._trt.Runtime(self._logger)
        rank = Rank(self.rank, self.gpu, self._trt, self._runtime, self._logger)
        parts = {name: parts_of(one, self.rank) for name, one in self._engines.items()}
        engines = {part.engine.file: part.engine for of_one in parts.values() for part in of_one}
        several = len(engines) > 1
        for file, engine in engines.items():
            self._contexts[file] = Context(
                rank, engine, folder, user_managed=several, verify=verify
            )
            told("the engine")
        for name, pieces in parts.items():
            self._calls[name] = self._called(pieces, self._engines[name])
            self._chains[name] = self._chain(name, pieces)
        shared, own = weights_of(self.choice.manifests, self.rank, programs=False)
        bound = partial(
            bound_weights, folder=folder, device=self.gpu.device, verify=verify, told=told
        )
        self._weights = bound(shared.values())
        only = {name: bound(weights) for name, weights in own.items()}
        for name, calls in self._calls.items():
            for call in calls:
                call.bind({**self._weights, **only.get(name, {})})
        if several:
            self._share_memory()
        self._sets = Sets(
            self.manifest, folder, self._weights, communicator, verify=verify, told=told
        )
        if self.manifest.world > 1:
            told("the communicator")
            self._communicate(communicator)

    def _called(self, parts: Sequence[Piece], manifest: Manifest) -> list[Call]:
        """A variant's pieces, with memory for what each returns, which later ones write over."""
        step = manifest.step if isinstance(manifest.step, Step) else None
        planned = between(parts, step)
        memory = [self.gpu.empty([n], getattr(torch, dtype)) for dtype, n in planned.kinds]
        return [
            Call(
                self._contexts[part.engine.file],
                part,
                {one.name: memory[places[one.name]].view(one.shape) for one in part.outputs},
            )
            for part, places in zip(parts, planned.places, strict=True)
        ]

    def _chain(self, variant: str | None, parts: Sequence[Piece]) -> Chain:
        told = self._engines[variant].step
        step = _step(told) if isinstance(told, Step) else None
        chained = [
            Part(part.inputs, partial(call.run, graph=self._wants_graph))
            for part, call in zip(parts, self._calls[variant], strict=True)
        ]
        return Chain(variant, chained, step, self.steps)

    def _share_memory(self) -> None:
        """One piece for the activations of all: the stream runs one forward after another."""
        most = max(context.activations for context in self._contexts.values())
        self._memory = self.gpu.empty([max(most, 1)], torch.uint8)
        for context in self._contexts.values():
            context.compute_in(self._memory)

    def _communicate(self, communicator: Any) -> None:
        """Collective: returns when every rank has bound its own, for all variants in one order."""
        address = communicator
        if not isinstance(communicator, int):
            address = self.gpu.communicator(group_of(communicator))
        for context in self._contexts.values():
            context.communicate(address)

    def picked(self, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Tensor]]:
        """See :class:`.executors.Executor`."""
        return self.choice.picked(arguments)

    @torch.no_grad()
    def run(self, variant: str | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`; outputs are overwritten by the next call."""
        self.gpu.use()
        if self.manifest.dynamic is None:
            return self._chains[variant](given)
        if variant != self._size:
            self._calls[None][0].resize(self.choice.manifests[variant].io)
            self._size = variant
        return self._chains[None](given)

    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`; outputs are overwritten by the next call."""
        return self.run(*self.picked(arguments))

    def use_lora(self, asked: Asked) -> None:
        """See :class:`.executors.Executor`; captured graphs are captured again."""
        assert self._sets is not None
        found = {**self._sets.bound, **self._sets.tensors(asked)}
        self.gpu.synchronize()  # a forward still reads what may be freed now
        changed = {n: tensor for n, tensor in found.items() if tensor is not self._weights[n]}
        for call in (call for calls in self._calls.values() for call in calls):
            call.bind(changed)
        self._weights = found
        if self.steps is not None:
            self.steps.reset()

    def close(self) -> None:
        """Graph, context, engine, run-time, in that order; the communicator is its owner's."""
        if self._runtime is None:
            return
        self.gpu.synchronize()
        for call in (call for calls in self._calls.values() for call in calls):
            call.close()
        for context in self._contexts.values():
            context.close()
        self._contexts, self._chains, self._calls = {}, {}, {}
        self._runtime = None
        self._weights, self._memory, self._sets = {}, None, None

    def __enter__(self) -> TensorRTExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def engines_of(manifest: Manifest, choice: Choice) -> Mapping[str | None, Manifest]:
    """By variant the manifest of its engines; all sizes of a range have those of the largest."""
    return choice.manifests if manifest.dynamic is None else {None: manifest}


def _step(told: Step) -> split.Step:
    streams = tuple((one.entered, one.left) for one in told.streams)
    return split.Step(told.residual, streams, told.first, told.last)


def _logger(trt: Any) -> Any:
    """What TensorRT complains about, remembered."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.said.append(message)
            _log.debug("%s", message)

    return Logger()
