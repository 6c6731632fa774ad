"""The programs that pass from stage to stage.

:class:`Program` wraps what ``torch.export`` made; :class:`Lowered` what is handed to TensorRT's
converters. Both are SPMD: the same for every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from .signature import Returned

HALF: Final = (torch.float16, torch.bfloat16)
PROVENANCE: Final = ("nn_module_stack", "stack_trace", "source_fn_stack")
"""What a node's ``meta`` tells about the model's code that made it."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of an operator: positional ones and keywords."""


@dataclass(frozen=True)
class Binding:
    """A tensor that goes into or comes out of the model.

    Attributes:
        name: argument or field name; nested containers are joined with dots.
        node: name of the graph's placeholder, or of the node that is returned.
        dtype: of the tensor.
        shape: the full, unsharded shape.
        least: its smallest one, where it follows a size; empty: it does not.
    """

    name: str
    node: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    least: tuple[int, ...] = ()


@dataclass(frozen=True)
class Constant:
    """An argument of ``forward`` that is no tensor, and is frozen into the program."""

    name: str
    value: Any


class Executable(Protocol):
    """What a program must have to be run by the proof."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph; its placeholders are state or inputs, its output a flat tuple."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Parameters, buffers and constants by placeholder name."""

    @property
    def own(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Parameters that differ from rank to rank, rank 0 first, by placeholder name."""

    @property
    def inputs(self) -> tuple[Binding, ...]:
        """The tensors the user passes."""

    @property
    def outputs(self) -> tuple[Binding, ...]:
        """The tensors the model returns."""


@dataclass(frozen=True)
class Program:
    """A traced model, before decomposition.

    Attributes:
        exported: the program; its graph may contain ``cp::*`` operators.
        inputs, outputs: the tensors of its signature.
        frozen: arguments that are no tensors.
        returned: what ``forward`` returns, in which ``outputs`` stand.
        peers: the parameters of rank 1, 2, ..., where ranks do not share rank 0's.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    frozen: tuple[Constant, ...]
    returned: Returned
    peers: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph, parameters and buffers lifted to placeholders."""
        graph_module: fx.GraphModule = self.exported.graph_module
        return graph_module

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Parameters, buffers and constants by placeholder name."""
        return state_of(self.exported)

    @property
    def parameters(self) -> Mapping[str, str]:
        """The model's own names of its parameters, by placeholder name."""
        named: Mapping[str, str] = self.exported.graph_signature.inputs_to_parameters
        return named

    @property
    def own(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Parameters that differ from rank to rank, rank 0 first, by placeholder name."""
        if not self.peers:
            return {}
        named = self.parameters
        first = self.state
        return {node: (first[node], *(p[name] for p in self.peers)) for node, name in named.items()}


@dataclass(frozen=True)
class Lowered:
    """A program in the operators that have TensorRT converters.

    Attributes:
        graph_module: buffers and constants are attributes, parameters are placeholders.
        state: the parameters by placeholder name.
        inputs, outputs: the tensors of its signature.
        own: parameters that differ from rank to rank, rank 0 first.
    """

    graph_module: fx.GraphModule
    state: Mapping[str, Tensor]
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    own: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def names_in(program: Lowered, names: Mapping[str, str]) -> dict[str, str]:
    """Of ``names`` by placeholder, those of placeholders that ``program`` has."""
    given = {node.name for node in program.graph_module.graph.find_nodes(op="placeholder")}
    return {node: name for node, name in names.items() if node in given}


def state_of(exported: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and lifted constants of an exported program, by placeholder name."""
    signature = exported.graph_signature
    state: dict[str, Tensor] = {}
    for node, name in {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }.items():
        held = exported.state_dict if name in exported.state_dict else exported.constants
        state[node] = held[name]
    return state


def module_of(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """``graph`` over the attributes of ``root``, or those that it has by name.

    Python code is generated when it is called, which passes never do: they read the graph.
    """
    return _LazyGraphModule(root, graph)


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, names and metadata."""
    copy, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, twins))
    for node, twin in twins.items():
        twin.name = node.name  # fx renames what is called like a Python builtin: input, filter
    return copy


def hold(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Put an attribute that holds ``value`` in the place of the placeholder ``node``."""
    name = f"_{node.name}"
    graph_module.register_buffer(name, value.detach(), persistent=False)
    with graph_module.graph.inserting_before(node):
        attribute = graph_module.graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph_module.graph.erase_node(node)


def erase_dead(graph: fx.Graph) -> None:
    """Remove what nothing reads, operators that communicate included: all ranks do the same."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def evaluated(
    graph: fx.Graph, known: dict[fx.Node, Any], wanted: Callable[[fx.Node], bool]
) -> list[tuple[fx.Node, Tensor]]:
    """Evaluate what depends on ``known`` values alone; returns the tensors that others read.

    Args:
        graph: what is walked.
        known: values by node; those of more nodes are added.
        wanted: whether an operator may be evaluated. Random ones never are.
    """
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random or not wanted(node):
            continue
        if all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    return [
        (node, value)
        for node, value in known.items()
        if node.op == "call_function"
        and isinstance(value, Tensor)
        and any(user not in known for user in node.users)
    ]


def with_dtypes(arguments: Any, dtypes: Mapping[torch.dtype, torch.dtype]) -> Any:
    """An operator's arguments, dtypes among them replaced."""
    return fx.node.map_aggregate(
        arguments, lambda a: dtypes.get(a, a) if isinstance(a, torch.dtype) else a
    )


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the graph's fake tensors, in which new ones must be made."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    return FakeTensorMode()


def fresh(value: Tensor) -> Tensor:
    """A tensor like it, in memory of its own."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a later operator writes into, and what they are views of.

    They must not be shared: between ranks, or with a constant.
    """
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is torch.ops.aten.detach_.default:
            continue  # leaves the values as they are
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.is_write:
                _add_with_base(value, written)
    return written


def _add_with_base(node: Any, written: set[fx.Node]) -> None:
    while isinstance(node, fx.Node) and node not in written:
        written.add(node)
        schema = getattr(node.target, "_schema", None)
        is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
        node = node.args[0] if is_view or node.target is operator.getitem else None


def tensor_of(node: fx.Node) -> Tensor:
    """The fake tensor that tells a node's shape and dtype."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node} is no tensor"
    return value


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node; the model itself is ``model``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return (paths[-1] if paths else "") or "model"


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the model's code that made the node, when it was recorded."""
    for line in reversed((node.meta.get("stack_trace") or "").splitlines()):
        text = line.strip()
        if text.startswith('File "') and "/torch/" not in text:
            file, number = text.split('"')[1], text.split("line ")[1].split(",")[0]
            return f"{file}:{number}"
    return None


def shape(node: Any) -> tuple[int, ...]:
    """The node's shape; of the first result if there are several."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments}
    named.update(zip(named, node.args, strict=False))
    named.update(node.kwargs)
    return named


def with_argument(node: fx.Node, name: str, value: Any) -> Callable[[Any, Any], Arguments]:
    """Replaces one argument of the operator, given its positional and keyword arguments."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    index = names.index(name)

    def replace(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        if index < len(args):
            return (*args[:index], value, *args[index + 1 :]), dict(kwargs)
        return tuple(args), {**kwargs, name: value}

    return replace
