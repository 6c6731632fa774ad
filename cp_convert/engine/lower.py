"""A program in the operators that have TensorRT converters, once for all ranks."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..errors import CannotLower
from ..ir.program import Binding, Lowered, copied, module_of, module_path, source_line, with_dtypes
from ..ir.writer import described
from ..trt.libraries import DYNAMO_CONVERTERS, post_lowering, settings
from .deconvolution import deconvolutions
from .opmath import in_opmath

_SHARD: Final = torch.ops.cp.shard.default
_RESULT: Final = torch.ops.cp.result.default


def lower(program: Lowered) -> Lowered:
    """Apply Torch-TensorRT's lowering passes; still SPMD. ``program`` stays as it is.

    Raises:
        CannotLower: an operator has no converter.
    """
    module = program.graph_module
    own = module_of(module, copied(module.graph))
    _truncate_doubles(own)
    _cast_by_aten(own.graph)
    deconvolutions(own.graph)
    with _quiet():
        own = post_lowering(own, settings())
        _make_contiguous(own)
        in_opmath(own)
        _as_tensors(own.graph)
    lowered = replace(program, graph_module=own, outputs=_outputs(program, own))
    _check_converters(lowered)
    return lowered


def _truncate_doubles(graph_module: fx.GraphModule) -> None:
    """TensorRT has no float64: what was not folded in it (rotary arithmetic) becomes float32."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph_module, str(node.target))
            if value.dtype != torch.float64:
                continue
            name = f"{node.target}_float32"
            graph_module.register_buffer(name, value.float(), persistent=False)
            node.target = name
        if node.op == "call_function":
            single = {torch.float64: torch.float32}
            node.args, node.kwargs = with_dtypes((node.args, node.kwargs), single)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.float64 and node.op != "placeholder":
            node.meta["val"] = value.float()


def _cast_by_aten(graph: fx.Graph) -> None:
    """A variance in half precision is decomposed to a cast that has no converter."""
    cast = torch.ops.prims.convert_element_type.default
    for node in graph.find_nodes(op="call_function", target=cast):
        x, dtype = node.args
        node.target, node.args = torch.ops.aten._to_copy.default, (x,)
        node.kwargs = {"dtype": dtype}


_ACTIVATIONS: Final = (
    torch.ops.aten.tanh.default,
    torch.ops.aten.sigmoid.default,
    torch.ops.aten.relu.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.clamp.default,
)


def _as_tensors(graph: fx.Graph) -> None:
    """Torch-TensorRT's activations refuse a bare weight (a gate, say); an identity makes it one."""
    for node in list(graph.nodes):
        if node.target in _ACTIVATIONS and node.args[0].op in ("placeholder", "get_attr"):
            weight = node.args[0]
            with graph.inserting_before(node):
                tensor = graph.call_function(_RESULT, (weight,))
            tensor.meta = dict(weight.meta)
            node.args = (tensor, *node.args[1:])


def _make_contiguous(graph_module: fx.GraphModule) -> None:
    """Torch-TensorRT copies other layouts and forgets the copy before TensorRT has read it."""
    for tensor in [*graph_module.parameters(), *graph_module.buffers()]:
        tensor.data = tensor.data.contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _outputs(program: Lowered, graph_module: fx.GraphModule) -> tuple[Binding, ...]:
    """Return tensors only, each as a tensor of its own, and name them in the bindings."""
    graph, node = graph_module.graph, graph_module.graph.output_node()
    values = [value for value in _flat(node.args[0]) if isinstance(value, fx.Node)]
    returned: list[fx.Node] = []
    for value in values:
        result = value
        if value.target is not _RESULT or value in returned:
            with graph.inserting_before(node):
                result = graph.call_function(_RESULT, (value,))
            result.meta = dict(value.meta)
        returned.append(result)
    node.args = (tuple(returned),)
    graph_module.recompile()
    return tuple(
        replace(binding, node=value.name)
        for binding, value in zip(program.outputs, returned, strict=True)
    )


def _flat(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def _check_converters(lowered: Lowered) -> None:
    seen: set[str] = set()
    for node in lowered.graph_module.graph.nodes:
        if node.op != "call_function" or node.target is _SHARD or (told := _told(node)) in seen:
            continue
        seen.add(told)
        if DYNAMO_CONVERTERS.get(node) is None:
            raise CannotLower(
                f"TensorRT has no converter for {node.target}({_call(node)}).",
                where=f"{module_path(node)} ({source_line(node) or 'source unknown'})",
                hint="replace the operation in the model, or move it out of forward.",
            )


def _told(node: fx.Node) -> str:
    """What converters choose by: the call, where its operands come from, and who reads it."""
    origins = [operand.op for operand in node.all_input_nodes]
    readers = sorted(str(user.target) for user in node.users)
    taken = sorted(str(user.args[1]) for user in node.users if user.target is operator.getitem)
    return f"{described(node)}{origins}{readers}{taken}"


def _call(node: fx.Node) -> str:
    """The arguments in words: what they are, and keywords such as a dtype that has no converter."""
    given = [_shape(argument) for argument in node.all_input_nodes]
    return ", ".join(given + [f"{k}={v}" for k, v in node.kwargs.items() if v is not None])


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(node)
