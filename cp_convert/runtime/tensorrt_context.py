"""One engine of a rank, with its execution context, as TensorRT has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..bundle.call import Io
from ..bundle.folder import file_problem
from ..bundle.parts import Part
from ..errors import BackendMissing, DamagedBundle, RunFailed
from .gpu import Gpu, capsule

ALIGNMENT: Final = 256
"""Bytes, of every binding's address (``NvInferRuntime.h``)."""


@dataclass(frozen=True)
class Rank:
    """What a context is made with.

    Attributes:
        number: of the rank.
        gpu: the rank's.
        trt: TensorRT's module.
        runtime: its ``Runtime``.
        logger: what TensorRT said, in ``said``.
    """

    number: int
    gpu: Gpu
    trt: Any
    runtime: Any
    logger: Any


class Context:
    """An execution context.

    Args:
        rank: whose.
        part: which of its engines.
        folder: the bundle's.
        user_managed: whether activations are computed in memory that :meth:`compute_in` is told.
        verify: whether the engine's file is compared with the manifest's SHA-256.

    Raises:
        DamagedBundle: the engine is missing or altered.
        BackendMissing: TensorRT does not take it.
    """

    def __init__(
        self, rank: Rank, part: Part, folder: Path, *, user_managed: bool, verify: bool
    ) -> None:
        self._rank, self._gpu, self._part = rank, rank.gpu, part
        self._graph: Any = None
        self._given: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._bound: dict[str, Tensor] = {}
        self._sized: dict[str, Tensor] = {}
        self._engine = self._deserialized(folder, verify=verify)
        strategies = rank.trt.ExecutionContextAllocationStrategy if user_managed else None
        self._context = (
            self._engine.create_execution_context()
            if strategies is None
            else self._engine.create_execution_context(strategies.USER_MANAGED)
        )
        if self._context is None:
            raise BackendMissing(
                f"TensorRT made no execution context.{self._quoted()}",
                hint="mostly memory: free some, or take a GPU with more.",
            )
        self._outputs = {
            io.name: self._gpu.empty(io.shape, getattr(torch, io.dtype))
            for io in part.io
            if io.mode == "output"
        }

    def _deserialized(self, folder: Path, *, verify: bool) -> Any:
        told = self._part.engine
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
            engine = self._rank.runtime.deserialize_cuda_engine(whole)
        if engine is None:
            raise BackendMissing(
                f"TensorRT does not take {file.name}.{self._quoted()}",
                hint="an engine belongs to the release and the GPU generation that it was built "
                "for; convert again here, or use --executor torch.",
            )
        return engine

    @property
    def activations(self) -> int:
        """Bytes that the engine computes in."""
        return int(self._engine.device_memory_size_v2)

    def compute_in(self, memory: Tensor) -> None:
        """Take ``memory``, of at least :attr:`activations` bytes, for activations.

        Others may use it between two forwards on one stream.
        """
        assert memory.data_ptr() % ALIGNMENT == 0
        self._context.set_device_memory(memory.data_ptr(), memory.nbytes)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Read these weights from the next forward on, and write outputs where they are read.

        Those that the engine has no binding for are left out; a captured graph is captured again.
        """
        own = self._part.weights
        found = {name: tensor for name, tensor in weights.items() if name in own}
        outputs = {} if self._bound else self._outputs
        for name, tensor in {**found, **outputs}.items():
            self._address(name, tensor)
        self._bound |= {**found, **outputs}
        self._graph = None

    def communicate(self, address: int) -> None:
        """Bind the communicator, once; collective.

        Raises:
            RunFailed: it was refused.
        """
        if not self._context.set_communicator(capsule(address)):
            raise RunFailed(
                f"rank {self._rank.number}: TensorRT refused the communicator.{self._quoted()} It "
                "would go on without and compute something else.",
                hint="the engine was built for one device by a release before 11.2, or for "
                "another world.",
            )

    def _address(self, name: str, tensor: Tensor) -> None:
        assert tensor.data_ptr() % ALIGNMENT == 0, name
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RunFailed(
                f"rank {self._rank.number}: TensorRT refused the binding {name}.{self._quoted()}",
                hint="does the engine belong to this manifest? `cp-convert verify` tells.",
            )

    def resize(self, io: Sequence[Io]) -> None:
        """Take inputs of these shapes, and return outputs of them, from the next forward on.

        Outputs keep the memory of the largest size; a captured graph is captured again.

        Args:
            io: the bindings at one size of the engine's range.

        Raises:
            RunFailed: TensorRT refused a shape.
        """
        for one in io:
            if one.mode == "output":
                whole = self._outputs[one.name].view(-1)
                self._sized[one.name] = whole[: math.prod(one.shape)].view(one.shape)
            elif not self._context.set_input_shape(one.name, tuple(one.shape)):
                raise RunFailed(
                    f"rank {self._rank.number}: TensorRT refused the shape {list(one.shape)} of "
                    f"{one.name}.{self._quoted()}",
                    hint="does the engine belong to this manifest? `cp-convert verify` tells.",
                )
        self._copies, self._graph = {}, None

    def run(self, given: Mapping[str, Tensor], *, graph: bool) -> dict[str, Tensor]:
        """A forward; outputs are overwritten by the next.

        Args:
            given: the inputs, perhaps among other values.
            graph: whether forwards after the first are replayed as a CUDA graph.
        """
        for name in self._part.inputs:
            self._give(name, given[name].to(self._gpu.device), in_place=not graph)
        stream = self._gpu.stream()
        self._gpu.before()
        if self._graph is not None:
            self._gpu.replay(self._graph)
        else:
            self._run(stream)
            if graph:  # only now: the first forward allocates, which a graph must not
                self._graph = self._gpu.captured(lambda: self._run(stream))
        self._gpu.after()
        return {**self._outputs, **self._sized}

    def _run(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            number = self._rank.number
            raise RunFailed(f"rank {number}: TensorRT could not run.{self._quoted()}")

    def _give(self, name: str, tensor: Tensor, *, in_place: bool) -> None:
        """In place where it may be; a captured graph reads the same memory for ever."""
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and in_place:
            self._given[name] = tensor  # kept alive until the next call
        else:
            if name not in self._copies:
                self._copies[name] = self._gpu.empty(list(tensor.shape), tensor.dtype)
            self._given[name] = self._copies[name].copy_(tensor)
        self._address(name, self._given[name])

    def _quoted(self) -> str:
        said = getattr(self._rank.logger, "said", [])
        return f' TensorRT said: "{said[-1]}"' if said else ""

    def close(self) -> None:
        """Graph, context, engine, in that order."""
        self._graph = None
        self._context = None
        self._engine = None
        self._given, self._copies, self._bound = {}, {}, {}
        self._outputs, self._sized = {}, {}
