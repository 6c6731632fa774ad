"""What a traced program computes, as one digest: the key of everything that follows from it.

A trace is made in seconds, and what decides it cannot be listed: forward may read a file, the
environment, a global of any module. So nothing is guessed. The program that came out is digested,
in one canonical form: operators with all their arguments, regions within them, the signature,
buffers and constants by their numbers, parameters by type and shape (their numbers stay outside of
a trace), frozen arguments, what became of the plan, and which line of the model made what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    TensorArgument,
)

from ..errors import CannotLower
from .program import Program
from .serialize import (
    Packed,
    Table,
    module_rows,
    plain,
    target_name,
    told_tensor,
    told_value,
)
from .signature import Applied

_PLAIN: Final = (type(None), bool, int, float, str)
_TENSORS: Final = (Tensor, nn.Parameter, nn.Buffer)


def identity(program: Program, applied: Sequence[Applied] = ()) -> str | None:
    """SHA-256 of a traced program; ``None`` for one that holds something without a name.

    Args:
        program: as :func:`cp_convert.capture.trace.trace` returns it; of one whose ranks hold
            parameters of their own, nothing is told here of those of the others.
        applied: what became of the plan.
    """
    try:
        return _packed(program, applied).digest()
    except CannotLower:
        return None


def _packed(program: Program, applied: Sequence[Applied]) -> Packed:
    tensors: dict[str, Tensor] = {}
    stacks = Table()
    state, parameters = program.state, program.parameters  # made anew whenever asked for
    nodes = _nodes(program.graph_module, "", tensors, stacks)
    document = {
        "nodes": nodes,
        "stacks": stacks.rows,
        "signature": _signature(program.exported.graph_signature),
        "parameters": {n: _lies(state[n]) for n in parameters},
        "inputs": [_binding(one) for one in program.inputs],
        "outputs": [_binding(one) for one in program.outputs],
        "frozen": [(one.name, _frozen(one.name, one.value, tensors)) for one in program.frozen],
        "returned": program.returned,
        "applied": list(applied),
    }
    for node, tensor in state.items():
        if node not in parameters:
            tensors[f"state {node}"] = readable(tensor)
    document["tensors"] = {name: _lies(tensor) for name, tensor in tensors.items()}
    return Packed(msgspec.msgpack.encode(document), tensors)


def _nodes(
    root: nn.Module, path: str, tensors: dict[str, Tensor], stacks: Table
) -> list[tuple[Any, ...]]:
    """Every node of a graph; a region that is called (autocast, no_grad) with all of its own."""
    graph: fx.Graph = root.graph  # type: ignore[assignment]
    index = {node: i for i, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.name,
            _called(node, root, path, tensors, stacks),
            plain(list(node.args), index, node),
            {key: plain(node.kwargs[key], index, node) for key in sorted(node.kwargs)},
            None if node.op == "get_attr" else told_value(node.meta.get("val")),
            stacks.add((module_rows(node), node.meta.get("stack_trace"))),
        )
        for node in index
    ]


def _called(
    node: fx.Node, root: nn.Module, path: str, tensors: dict[str, Tensor], stacks: Table
) -> Any:
    if node.op != "get_attr":
        target: Any = node.target
        is_region = isinstance(target, torch._ops.HigherOrderOperator)
        return f"region {target.name()}" if is_region else target_name(node)
    held, name = attrgetter(str(node.target))(root), f"{path}{node.target}"
    if isinstance(held, fx.GraphModule):
        return _nodes(held, f"{name}.", tensors, stacks)
    tensors[f"attribute {name}"] = readable(held)
    return name


def _signature(signature: ExportGraphSignature) -> list[Any]:
    """What every placeholder and every result stands for."""
    specs: list[Any] = [*signature.input_specs, *signature.output_specs]
    return [
        (str(spec.kind), _argument(spec.arg), spec.target, getattr(spec, "persistent", None))
        for spec in specs
    ]


def _argument(argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, TensorArgument):
        return ("tensor", argument.name)
    if isinstance(argument, ConstantArgument) and isinstance(argument.value, _PLAIN):
        return ("constant", argument.name, argument.value)
    raise CannotLower(f"an argument of type {type(argument).__name__} cannot be packed.")


def _binding(binding: Any) -> tuple[Any, ...]:
    return binding.name, binding.node, str(binding.dtype), list(binding.shape)


def _frozen(name: str, value: Any, tensors: dict[str, Tensor]) -> str:
    """A frozen argument as text; a tensor's text leaves most of its numbers out."""
    if isinstance(value, Tensor):
        tensors[f"frozen {name}"] = readable(value)
        return "tensor"
    return repr(value)


def readable(held: Any) -> Tensor:
    """A tensor whose numbers are at hand.

    Raises:
        CannotLower: another object, or one that keeps its numbers in a way of its own.
    """
    if type(held) not in _TENSORS or held.layout != torch.strided or held.device.type != "cpu":
        raise CannotLower(f"the numbers of a {type(held).__name__} cannot be read.")
    plainly: Tensor = held.detach().resolve_conj().resolve_neg()
    return plainly


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape, and how the numbers lie in memory."""
    return *told_tensor(tensor), list(tensor.stride()), tensor.device.type


def settings() -> Mapping[str, object]:
    """Torch's own settings that decide what a program is decomposed to, or what it computes."""
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
