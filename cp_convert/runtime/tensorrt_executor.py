"""A rank's engine, run by TensorRT 11 or TensorRT-RTX, whichever built it.

Source: TensorRT's documentation (*Multi-device inference*, ``IExecutionContext``). Nothing here was
executed on a GPU yet: TensorRT-RTX runs on compute capability 7.5 to 8.9 and 12.x.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib import util
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final

import torch
from packaging.version import Version
from torch import Tensor

from ..backends import BACKENDS
from ..bundle.folder import file_problem
from ..bundle.manifest import Manifest, of_rank
from ..errors import BackendMissing, ConvertError, DamagedBundle, RunFailed
from ..lora.choose import Asked
from ..releases import NCCL
from .arguments import flattened
from .gpu import Gpu, capsule
from .groups import checked_world, group_of
from .lora import Sets
from .torch_executor import device_of
from .weights import bound_weights

Told = Callable[[str], None]
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
ALIGNMENT: Final = 256
"""Bytes, of every binding's address (``NvInferRuntime.h``)."""
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
    if manifest.runs_on.doubt is not None:
        return manifest.runs_on.doubt
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
    """What a rank's engine, weights and activations take on a GPU; tied weights count once."""
    engine = manifest.engines[rank]
    own = of_rank(manifest.weights, rank)
    weights = {(one.file, one.offset): one.bytes for one in own}
    return engine.bytes + (engine.activation_bytes or 0) + sum(weights.values())


class TensorRTExecutor:
    """See :class:`.executors.Executor`.

    What a rank can find out alone comes first: no other waits in the communicator for one whose
    files are missing.

    Raises:
        BackendMissing: the run-time cannot be loaded, or does not take the engine.
        DamagedBundle: the engine or a weight is missing or altered.
        UsageError: another world was started.
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
        verify: bool = True,
        graph: bool = False,
        told: Told = lambda _: None,
        gpu: Gpu | None = None,
    ) -> None:
        self.manifest, self.rank = manifest, rank
        checked_world(manifest.world, communicator)
        self.gpu = gpu or Gpu(device_of(rank, device))
        self._wants_graph = graph
        self._graph: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._weights: dict[str, Tensor] = {}
        self._sets: Sets | None = None
        self._given: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
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
        self._engine = self._deserialized(folder, verify=verify)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendMissing(
                f"TensorRT made no execution context.{self._quoted()}",
                hint="mostly memory: free some, or take a GPU with more.",
            )
        own = of_rank(self.manifest.weights, self.rank)
        self._weights = bound_weights(own, folder, self.gpu.device, verify=verify, told=told)
        self._outputs = {
            io.name: self.gpu.empty(io.shape, getattr(torch, io.dtype))
            for io in self.manifest.io
            if io.mode == "output"
        }
        for name, tensor in {**self._weights, **self._outputs}.items():
            self._address(name, tensor)
        self._sets = Sets(
            self.manifest, folder, self._weights, communicator, verify=verify, told=told
        )
        if self.manifest.world > 1:
            told("the communicator")
            self._bind(communicator)

    def _deserialized(self, folder: Path, *, verify: bool) -> Any:
        told = self.manifest.engines[self.rank]
        file = folder / told.file
        problem = file_problem(file, told, digest=verify)
        if problem is not None:
            raise DamagedBundle(
                f"the engine {file}: {problem}.", hint="copy the bundle again, or convert again."
            )
        with (
            file.open("rb") as opened,
            mmap(opened.fileno(), 0, access=ACCESS_READ) as pages,
            memoryview(pages) as whole,
        ):
            engine = self._runtime.deserialize_cuda_engine(whole)
        if engine is None:
            raise BackendMissing(
                f"TensorRT does not take {file.name}.{self._quoted()}",
                hint="an engine belongs to the release and the GPU generation that it was built "
                "for; convert again here, or use --executor torch.",
            )
        return engine

    def _bind(self, communicator: Any) -> None:
        """Collective: returns when every rank has bound its own. Once a context."""
        address = communicator
        if not isinstance(communicator, int):
            address = self.gpu.communicator(group_of(communicator))
        if not self._context.set_communicator(capsule(address)):
            raise RunFailed(
                f"rank {self.rank}: TensorRT refused the communicator.{self._quoted()} It would "
                "go on without and compute something else.",
                hint="the engine was built for one device by a release before 11.2, or for "
                "another world.",
            )

    def _address(self, name: str, tensor: Tensor) -> None:
        assert tensor.data_ptr() % ALIGNMENT == 0, name
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RunFailed(
                f"rank {self.rank}: TensorRT refused the binding {name}.{self._quoted()}",
                hint="does the engine belong to this manifest? `cp-convert verify` tells.",
            )

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`; outputs are overwritten by the next call."""
        self.gpu.use()
        for name, tensor in flattened(self.manifest, arguments).items():
            self._give(name, tensor.to(self.gpu.device))
        stream = self.gpu.stream()
        self.gpu.before()
        if self._graph is not None:
            self.gpu.replay(self._graph)
        else:
            self._run(stream)
            if self._wants_graph:  # only now: the first forward allocates, which a graph must not
                self._graph = self.gpu.captured(lambda: self._run(stream))
        self.gpu.after()
        return dict(self._outputs)

    def _run(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise RunFailed(f"rank {self.rank}: TensorRT could not run.{self._quoted()}")

    def use_lora(self, asked: Asked) -> None:
        """See :class:`.executors.Executor`; a captured graph is captured again."""
        assert self._sets is not None
        found = {**self._sets.bound, **self._sets.tensors(asked)}
        self.gpu.synchronize()  # a forward still reads what may be freed now
        for name, tensor in found.items():
            if tensor is not self._weights[name]:
                self._address(name, tensor)
        self._weights, self._graph = found, None

    def _give(self, name: str, tensor: Tensor) -> None:
        """In place where it may be; a captured graph reads the same memory for ever."""
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not self._wants_graph:
            self._given[name] = tensor  # kept alive until the next call
        else:
            if name not in self._copies:
                self._copies[name] = self.gpu.empty(list(tensor.shape), tensor.dtype)
            self._given[name] = self._copies[name].copy_(tensor)
        self._address(name, self._given[name])

    def _quoted(self) -> str:
        said = getattr(self._logger, "said", [])
        return f' TensorRT said: "{said[-1]}"' if said else ""

    def close(self) -> None:
        """Graph, context, engine, run-time, in that order; the communicator is its owner's."""
        if self._runtime is None:
            return
        self.gpu.synchronize()
        self._graph = None
        self._context = None
        self._engine = None
        self._runtime = None
        self._weights, self._given, self._copies, self._outputs = {}, {}, {}, {}
        self._sets = None

    def __enter__(self) -> TensorRTExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
