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
from ..bundle.manifest import Manifest
from ..errors import BackendMissing, DamagedBundle, RunFailed
from ..releases import NCCL
from .arguments import flattened
from .gpu import Gpu, capsule
from .torch_executor import device_of
from .weights import bound_weights

Told = Callable[[str], None]
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
ALIGNMENT: Final = 256
"""Bytes, of every binding's address (``NvInferRuntime.h``)."""
_log = logging.getLogger(__name__)


def why_not(manifest: Manifest, device: str | None, gpu: Gpu | None = None) -> str | None:
    """Why TensorRT cannot run the bundle on ``device``, or ``None``; touches no GPU memory."""
    backend = manifest.backend
    module, installed = MODULES[backend.name], BACKENDS[backend.name].version
    if device == "cpu" or not Gpu.count():
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
    gpu = gpu or Gpu(device_of(0, device))
    return _gpu_refusal(manifest, gpu)


def _gpu_refusal(manifest: Manifest, gpu: Gpu) -> str | None:
    major, minor = gpu.capability()
    if manifest.backend.name == "tensorrt-rtx" and major in (9, 10):
        return (
            f"TensorRT-RTX has no kernels for compute capability {major}.{minor}; Hopper and "
            "data-centre Blackwell need --backend tensorrt"
        )
    nccl = ".".join(map(str, gpu.nccl()))
    if manifest.world > 1 and Version(nccl) < Version(NCCL):
        return f"NCCL {nccl} is loaded, and TensorRT needs {NCCL}"
    engine = manifest.engines[0]
    weights = sum(weight.bytes for weight in manifest.weights)
    needed = engine.bytes + (engine.activation_bytes or 0) + weights
    if gpu.free() < needed:
        return (
            f"the engine, its weights and activations need {needed / 1e9:.1f} GB, and "
            f"{gpu.free() / 1e9:.1f} GB are free"
        )
    return None


class TensorRTExecutor:
    """See :class:`.executors.Executor`.

    Raises:
        BackendMissing: the run-time cannot be loaded, or does not take the engine.
        DamagedBundle: the engine or a weight is missing or altered.
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
        self.gpu = gpu or Gpu(device_of(rank, device))
        self._wants_graph, self._graph = graph, None
        self._trt: Any = importlib.import_module(MODULES[manifest.backend.name])
        told("the engine")
        self._logger = _logger(self._trt)
        self._runtime: Any = self._trt.Runtime(self._logger)
        self._engine = self._deserialized(folder / manifest.engines[rank].file)
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise BackendMissing(
                f"TensorRT made no execution context.{self._quoted()}",
                hint="mostly memory: free some, or take a GPU with more.",
            )
        if manifest.world > 1:
            told("the communicator")
            self._bind(communicator or self.gpu.communicator())
        self._weights = bound_weights(
            manifest.weights, folder, self.gpu.device, verify=verify, told=told
        )
        for name, tensor in self._weights.items():
            self._address(name, tensor)
        self._given: dict[str, Tensor] = {}
        self._outputs = {
            io.name: self.gpu.empty(io.shape, getattr(torch, io.dtype))
            for io in manifest.io
            if io.mode == "output"
        }
        for name, tensor in self._outputs.items():
            self._address(name, tensor)

    def _deserialized(self, file: Path) -> Any:
        try:
            with file.open("rb") as opened:
                pages = mmap(opened.fileno(), 0, access=ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DamagedBundle(f"the engine {file} cannot be read: {error}.") from error
        engine = self._runtime.deserialize_cuda_engine(memoryview(pages))
        if engine is None:
            raise BackendMissing(
                f"TensorRT does not take {file.name}.{self._quoted()}",
                hint="an engine belongs to the release and the GPU generation that it was built "
                "for; convert again here, or use --executor torch.",
            )
        return engine

    def _bind(self, communicator: int) -> None:
        """Collective: returns when every rank has bound its own. Once a context."""
        if not self._context.set_communicator(capsule(communicator)):
            raise RunFailed(
                f"rank {self.rank}: TensorRT refused the communicator.{self._quoted()} It would "
                "go on without and compute something else.",
                hint="the engine was built for one device by a release before 11.2, or for "
                "another world.",
            )

    def _address(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RunFailed(f"rank {self.rank}: TensorRT refused the binding {name}.")

    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`; outputs are overwritten by the next call."""
        for name, tensor in flattened(self.manifest, arguments).items():
            self._give(name, tensor.to(self.gpu.device))
        stream = self.gpu.stream()
        self.gpu.before()
        if self._graph is not None:
            self._graph.replay()
        elif not self._context.execute_async_v3(stream):
            raise RunFailed(f"rank {self.rank}: TensorRT could not run.{self._quoted()}")
        elif self._wants_graph:
            self._graph = self.gpu.captured(lambda: self._context.execute_async_v3(stream))
        self.gpu.after()
        return dict(self._outputs)

    def _give(self, name: str, tensor: Tensor) -> None:
        """In place where it may be; a captured graph reads the same memory for ever."""
        fits = tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
        if self._wants_graph or not fits:
            if name not in self._given:
                self._given[name] = self.gpu.empty(list(tensor.shape), tensor.dtype)
                self._address(name, self._given[name])
            self._given[name].copy_(tensor)
            return
        self._given[name] = tensor  # kept alive until the next call
        self._address(name, tensor)

    def _quoted(self) -> str:
        said = getattr(self._logger, "said", [])
        return f' TensorRT said: "{said[-1]}"' if said else ""

    def close(self) -> None:
        """Graph, context, engine, run-time, in that order; the communicator is its owner's."""
        if self._context is None:
            return
        self.gpu.synchronize()
        self._graph = None
        self._context = None
        self._engine = None
        self._runtime = None
        self._weights, self._given, self._outputs = {}, {}, {}

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
