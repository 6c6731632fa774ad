"""One rank's program to one TensorRT engine."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, fx

from ..backends import Backend
from ..converters import active, register
from ..errors import BuildFailed
from ..ir.engine import Engine, NetworkCollective
from ..ir.program import Binding, Lowered, copied, hold, module_of
from ..trt.libraries import TENSORRT_LOG, Input, TRTInterpreter, checked_once, is_rtx, settings, trt
from ..trt.offline import check_gpu
from .readback import read_network


def prepare(backend: Backend, *, fused: bool = False) -> dict[str, str]:
    """Register the converters for ``backend``; returns its workarounds' reasons, by lowering.

    Args:
        backend: which TensorRT builds.
        fused: whether its multi-device attention is to be used.

    Raises:
        BackendMissing: the backend needs a GPU and there is none, or another one.
    """
    check_gpu(backend, fused=fused)
    assert is_rtx() == (backend.name == "tensorrt-rtx")
    workarounds = active(backend.name, backend.version)
    register(workarounds)
    return {
        row.instead: f"{row.operator} as {row.instead}: {row.reason}"
        for row in workarounds.values()
    }


def network_of(program: Lowered, external: Mapping[str, str] | None = None) -> TRTInterpreter:
    """The TensorRT network of one rank's program, held by the interpreter that made it.

    The network refers to numbers that the interpreter owns, so keep the interpreter while the
    network is in use.

    Args:
        program: of one rank.
        external: by placeholder, the binding of a parameter that becomes an input; others become
            constants.

    Raises:
        BuildFailed: a converter or TensorRT refused a layer.
    """
    module = _with_parameters(program, external or {})
    bindings = _bindings(module.graph, program, external or {})
    with _listening() as log, checked_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = TRTInterpreter(
            module,
            [_input_spec(b.dtype, b.shape, b.least) for b in bindings],
            output_dtypes=[_plain(b.dtype) for b in program.outputs],
            compilation_settings=settings(),
            input_binding_names=[b.name for b in bindings],
            output_binding_names=[b.name for b in program.outputs],
        )
        try:
            interpreter._construct_trt_network_def()
        # Converters signal a refused layer by whatever the attribute access on None raises.
        except Exception as error:
            raise BuildFailed(
                f"the network could not be made: {type(error).__name__}: {error}"
                + _quoted(log.errors),
                where=str(interpreter._cur_node_name),
            ) from error
    return interpreter


def build(
    program: Lowered,
    rank: int,
    path: Path,
    targets: Sequence[str],
    *,
    known: Sequence[Tensor] | None = None,
    external: Mapping[str, str] | None = None,
) -> Engine:
    """Build ``program`` and write the engine to ``path``.

    Args:
        program: of this rank, see :func:`.specialise.specialise`.
        rank: for the report.
        path: where to write.
        targets: compute capabilities such as ``"8.9"``; empty for the backend's own choice.
        known: read the network back as well, sharing these tensors (:mod:`.readback`).
        external: see :func:`network_of`.

    Raises:
        BuildFailed: TensorRT returned no engine.
    """
    start = time.perf_counter()
    interpreter = network_of(program, external)
    network = None if known is None else read_network(interpreter.ctx.net, known)
    config = interpreter._populate_trt_builder_config()
    _set_targets(config, targets)
    with _listening() as log, path.open("wb") as file:
        written = _Written(file)
        done = interpreter.builder.build_serialized_network_to_stream(
            interpreter.ctx.net, config, written
        )
    if written.error is not None or not done:  # TensorRT may call it done without its last bytes
        path.unlink()
        if written.error is not None:
            raise written.error
        raise BuildFailed(f"no engine for rank {rank}.{_quoted(log.errors)}")
    return Engine(
        rank=rank,
        path=path,
        size=written.size,
        sha256=written.digest.hexdigest(),
        collectives=tuple(collectives_of(interpreter.ctx.net)),
        seconds=time.perf_counter() - start,
        activations=log.activations,
        capabilities=capabilities_in(path, named=bool(targets)),
        network=network,
    )


def _bindings(graph: fx.Graph, program: Lowered, external: Mapping[str, str]) -> list[Binding]:
    """The network's inputs, in the order of the placeholders."""
    own = {binding.node: binding for binding in program.inputs}
    for node, name in external.items():
        held = program.state[node]
        own[node] = Binding(name, node, held.dtype, tuple(held.shape))
    return [own[node.name] for node in graph.find_nodes(op="placeholder")]


def _with_parameters(program: Lowered, external: Mapping[str, str]) -> fx.GraphModule:
    """Parameters as attributes, which Torch-TensorRT turns into constants, or left as inputs."""
    graph = copied(program.graph_module.graph)
    module = module_of(program.graph_module, graph)
    for node in graph.nodes:
        # Torch-TensorRT empties the module stack while it names layers; other ranks need theirs.
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = dict(node.meta["nn_module_stack"])
    for node in list(graph.find_nodes(op="placeholder")):
        if node.name in program.state and node.name not in external:
            hold(module, node, program.state[node.name].contiguous())
    module.recompile()
    return module


def _plain(dtype: torch.dtype) -> torch.dtype:
    """TensorRT has no float64; see ``truncate_double``."""
    return torch.float32 if dtype == torch.float64 else dtype


def _input_spec(dtype: torch.dtype, shape: Sequence[int], least: Sequence[int] = ()) -> Any:
    # An expanded tensor: Input would otherwise allocate and fill a sample of the full shape.
    sample = torch.zeros((), dtype=_plain(dtype)).expand(tuple(shape))
    if not least or tuple(least) == tuple(shape):
        return Input(shape=tuple(shape), dtype=_plain(dtype), torch_tensor=sample)
    return Input(
        min_shape=tuple(least),
        opt_shape=tuple(shape),
        max_shape=tuple(shape),
        dtype=_plain(dtype),
        torch_tensor=sample,
    )


def _set_targets(config: Any, targets: Sequence[str]) -> None:
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}")
        if not config.set_compute_capability(capability, index):
            raise BuildFailed(f"TensorRT does not accept the compute capability {target}.")


_RECORDED: Final = re.compile(rb"accelerators=\{((?:sm\d+ ?)+)\}")


def capabilities_in(engine: Path, *, named: bool) -> tuple[str, ...]:
    """The compute capabilities that an engine itself records, in the text of its program.

    Args:
        engine: the file.
        named: whether it was built for named ones; where it was not, the least that has the
            program's types is recorded, and means that and later (``8.0+``).

    Returns:
        such as ``("8.9", "12.0")``; nothing where the text is written in another way. An engine of
        several pieces needs what all of them need.
    """
    with engine.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as pages:
        pieces = [one[1].decode().split() for one in _RECORDED.finditer(pages)]
    words = [word for word in (pieces or [[]])[0] if all(word in p for p in pieces)]
    if not named:
        words = sorted((one[0] for one in pieces), key=lambda word: int(word[2:]))[-1:]
    return tuple(f"{word[2:-1]}.{word[-1]}" + ("" if named else "+") for word in words)


def collectives_of(network: Any) -> Iterator[NetworkCollective]:
    """Every ``IDistCollectiveLayer`` of a network, in order."""
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.DIST_COLLECTIVE:
            told: Mapping[str, Any] = json.loads(layer.metadata)
            tensor = layer.get_input(0)
            yield NetworkCollective(
                name=layer.name,
                operator=told["operator"],
                kind=told["kind"],
                root=told["root"],
                group=tuple(told["group"]),
                payload=trt.volume(tensor.shape) * tensor.dtype.itemsize,
                instead=told["instead"],
            )


class _Written(trt.IStreamWriter):  # type: ignore[misc]
    """An engine on its way to a file, piece by piece: it is never whole in memory a second time."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        """Called by TensorRT, through which no exception may pass; 0 tells it to stop."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self.digest.update(data)
        self.size += len(data)
        return len(data)


class _Log(logging.Handler):
    """Remembers what TensorRT complained about, and what it says of memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.errors: list[str] = []
        self.activations: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what is of use."""
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            self.errors.append(message)
        elif told := _ACTIVATIONS.match(message):
            self.activations = int(told[1])


_ACTIVATIONS: Final = re.compile(r"Total Activation Memory: (\d+) bytes")


@contextmanager
def _listening() -> Iterator[_Log]:
    """TensorRT's log, kept from the screen."""
    handler = _Log()
    level, propagate = TENSORRT_LOG.level, TENSORRT_LOG.propagate
    TENSORRT_LOG.propagate = False
    TENSORRT_LOG.setLevel(logging.INFO)
    TENSORRT_LOG.addHandler(handler)
    try:
        yield handler
    finally:
        TENSORRT_LOG.removeHandler(handler)
        TENSORRT_LOG.setLevel(level)
        TENSORRT_LOG.propagate = propagate


def _quoted(errors: Sequence[str]) -> str:
    """What TensorRT complained about: the first is the cause, the last often only a consequence."""
    return "".join(f' TensorRT said: "{error}"' for error in dict.fromkeys(errors))
