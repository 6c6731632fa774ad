"""One engine of a rank, with its execution context, as TensorRT has them; and what it computes.

An engine that serves several pieces has one context, which is told the addresses of each before it
computes it: TensorRT makes an engine ready once, and has it in memory once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..bundle.call import Io
from ..bundle.folder import file_problem
from ..bundle.manifest import Engine
from ..bundle.parts import Part
from ..errors import BackendMissing, DamagedBundle, RunFailed
from ..ir.split import BETWEEN
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
        told: which of its engines.
        folder: the bundle's.
        user_managed: whether activations are computed in memory that :meth:`compute_in` is told.
        verify: whether the engine's file is compared with the manifest's SHA-256.

    Attributes:
        rank: whose.
        bound: the piece whose addresses it has.

    Raises:
        DamagedBundle: the engine is missing or altered.
        BackendMissing: TensorRT does not take it.
    """

    def __init__(
        self, rank: Rank, told: Engine, folder: Path, *, user_managed: bool, verify: bool
    ) -> None:
        self.rank = rank
        self.bound: Call | None = None
        self._engine = self._deserialized(folder / told.file, told, verify=verify)
        strategies = rank.trt.ExecutionContextAllocationStrategy if user_managed else None
        self._context = (
            self._engine.create_execution_context()
            if strategies is None
            else self._engine.create_execution_context(strategies.USER_MANAGED)
        )
        if self._context is None:
            raise BackendMissing(
                f"TensorRT made no execution context.{self.quoted()}",
                hint="mostly memory: free some, or take a GPU with more.",
            )

    def _deserialized(self, file: Path, told: Engine, *, verify: bool) -> Any:
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
            engine = self.rank.runtime.deserialize_cuda_engine(whole)
        if engine is None:
            raise BackendMissing(
                f"TensorRT does not take {file.name}.{self.quoted()}",
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

    def communicate(self, address: int) -> None:
        """Bind the communicator, once; collective.

        Raises:
            RunFailed: it was refused.
        """
        if not self._context.set_communicator(capsule(address)):
            raise RunFailed(
                f"rank {self.rank.number}: TensorRT refused the communicator.{self.quoted()} It "
                "would go on without and compute something else.",
                hint="the engine was built for one device by a release before 11.2, or for "
                "another world.",
            )

    def address(self, name: str, tensor: Tensor) -> None:
        """Where a binding of the engine lies.

        Raises:
            RunFailed: there is no such binding.
        """
        assert tensor.data_ptr() % ALIGNMENT == 0, name
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RunFailed(
                f"rank {self.rank.number}: TensorRT refused the binding {name}.{self.quoted()}",
                hint="does the engine belong to this manifest? `cp-convert verify` tells.",
            )

    def shape(self, name: str, shape: Sequence[int]) -> None:
        """What shape an input has from the next forward on.

        Raises:
            RunFailed: the engine does not take it.
        """
        if not self._context.set_input_shape(name, tuple(shape)):
            raise RunFailed(
                f"rank {self.rank.number}: TensorRT refused the shape {list(shape)} of "
                f"{name}.{self.quoted()}",
                hint="does the engine belong to this manifest? `cp-convert verify` tells.",
            )

    def execute(self, stream: int) -> None:
        """A forward, put on a stream.

        Raises:
            RunFailed: TensorRT could not.
        """
        if not self._context.execute_async_v3(stream):
            raise RunFailed(f"rank {self.rank.number}: TensorRT could not run.{self.quoted()}")

    def quoted(self) -> str:
        """What TensorRT said last."""
        said = getattr(self.rank.logger, "said", [])
        return f' TensorRT said: "{said[-1]}"' if said else ""

    def close(self) -> None:
        """Context, engine, in that order."""
        self._context, self.bound = None, None
        self._engine = None


class Call:
    """One piece of the work, done by an engine that may serve others.

    Args:
        context: the engine's.
        part: which piece.
        outputs: where it writes, by the names of its outputs.
    """

    def __init__(self, context: Context, part: Part, outputs: Mapping[str, Tensor]) -> None:
        self._context, self._part = context, part
        self._gpu = context.rank.gpu
        self._graph: Any = None
        self._given: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._bound: dict[str, Tensor] = {}
        self._sized: dict[str, Tensor] = {}
        self._outputs = dict(outputs)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Read these weights from the next forward on, and write outputs where they are read.

        Those that the piece has no binding for are left out; a captured graph is captured again.
        """
        own = self._part.weights
        found = {name: tensor for name, tensor in weights.items() if name in own}
        changed = found if self._bound else {**found, **self._outputs}
        self._bound |= changed
        if self._context.bound is self:
            self._tell(changed)
        else:
            self._take()
        self._graph = None

    def _take(self) -> None:
        """Have the context compute this piece next."""
        if self._context.bound is not self:
            self._tell(self._bound)
            self._context.bound = self

    def _tell(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._context.address(self._part.binding(name), tensor)

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
            else:
                self._context.shape(self._part.binding(one.name), one.shape)
        self._copies, self._graph = {}, None

    def run(self, given: Mapping[str, Tensor], *, graph: bool) -> dict[str, Tensor]:
        """A forward; outputs are overwritten by the next.

        Args:
            given: the inputs, perhaps among other values.
            graph: whether forwards after the first are replayed as a CUDA graph.
        """
        if self._graph is None:  # a captured one has the addresses that it was captured with
            self._take()
        for name in self._part.inputs:
            self._give(name, given[name].to(self._gpu.device), graph=graph)
        stream = self._gpu.stream()
        self._gpu.before()
        if self._graph is not None:
            self._gpu.replay(self._graph)
        else:
            self._context.execute(stream)
            if graph:  # only now: the first forward allocates, which a graph must not
                self._graph = self._gpu.captured(lambda: self._context.execute(stream))
        self._gpu.after()
        return {**self._outputs, **self._sized}

    def _give(self, name: str, tensor: Tensor, *, graph: bool) -> None:
        """In place where it may be; a captured graph reads the same memory for ever.

        Values between pieces lie in the same memory at every call, but for those of a step cache.
        """
        fits = tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
        if fits and not graph:
            self._given[name] = tensor  # kept alive until the next call
        else:
            if name not in self._copies:
                stays = fits and name.startswith(BETWEEN)
                empty = self._gpu.empty
                self._copies[name] = tensor if stays else empty(list(tensor.shape), tensor.dtype)
            self._given[name] = own = self._copies[name]
            if own.data_ptr() != tensor.data_ptr():
                own.copy_(tensor)
        if self._graph is None:
            self._context.address(self._part.binding(name), self._given[name])

    def close(self) -> None:
        """Let go of the graph, and of memory."""
        self._graph = None
        self._given, self._copies, self._bound = {}, {}, {}
        self._outputs, self._sized = {}, {}
