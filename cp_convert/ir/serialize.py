"""A lowered program as bytes and tensors: what a worker is sent, what the cache keeps and keys by.

Everything that decides what a program computes is in the bytes, in one canonical form: operators
with all their arguments, shapes, dtypes, bindings. Only operators that can be found again by name
(``torch.ops`` and Python's own) are taken; anything else is refused.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from ..errors import CannotLower
from . import nvfp4, ops, quantize  # noqa: F401  define cp::*, which programs name
from .program import Binding, Lowered, module_of, module_path, source_line
from .tensors import mapped, numbers, save

_PYTHON: Final = ("_operator", "builtins", "math")
_DOCUMENT: Final = "document"
_NAMED: Final[Mapping[str, type]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "format": torch.memory_format,
}


@dataclass(frozen=True)
class Packed:
    """A program, taken apart.

    Attributes:
        document: the graph and its signature, in MessagePack.
        tensors: by name, the numbers that the document refers to.
    """

    document: bytes
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of the numbers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def digest(self) -> str:
        """SHA-256 of everything: the document, and the tensors' numbers."""
        whole = hashlib.sha256(self.document)
        for name in sorted(self.tensors):
            whole.update(name.encode())
            whole.update(hashlib.sha256(numbers(self.tensors[name])).digest())
        return whole.hexdigest()

    def write(self, path: Path) -> None:
        """One safetensors file; :func:`read_packed` maps it."""
        document = torch.frombuffer(bytearray(self.document), dtype=torch.uint8)
        save({**self.tensors, _DOCUMENT: document}, path)


def read_packed(path: Path) -> Packed:
    """What :meth:`Packed.write` wrote, its numbers mapped and not read.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    tensors = mapped(path)
    document = bytes(numbers(tensors.pop(_DOCUMENT)))
    return Packed(document, tensors)


def pack(program: Lowered, *, described: Collection[str] = (), provenance: bool = True) -> Packed:
    """Take ``program`` apart.

    Args:
        program: any.
        described: parameters of which the type and shape are kept, and not the numbers; those
            that differ from rank to rank are not told apart.
        provenance: whether source lines are kept; modules are in any case, as layers are named
            after them.

    Raises:
        CannotLower: an operator or argument that cannot be named.
    """
    tensors: dict[str, Tensor] = {}
    stacks = Table()
    index = {node: i for i, node in enumerate(program.graph_module.graph.nodes)}
    nodes = []
    for node in index:
        if node.op == "get_attr":
            tensors[f"attribute {node.target}"] = _attribute(program.graph_module, node)
        origin = (module_rows(node), node.meta.get("stack_trace") if provenance else None)
        nodes.append(
            (
                node.op,
                node.name,
                target_name(node),
                plain(list(node.args), index, node),
                {key: plain(node.kwargs[key], index, node) for key in sorted(node.kwargs)},
                told_value(node.meta.get("val")),
                stacks.add(origin),
            )
        )
    state = {}
    for name, tensor in program.state.items():
        state[name] = told_tensor(tensor)
        if name not in described and name not in program.own:
            tensors[f"parameter {name}"] = tensor
    own = {name: _Numbered(program.own[name]) for name in program.own if name not in described}
    for name, parts in own.items():
        tensors |= {f"parameter {name} of {i}": one for i, one in enumerate(parts.distinct)}
    document = {
        "nodes": nodes,
        "stacks": stacks.rows,
        "state": state,
        "own": {name: parts.by_rank for name, parts in own.items()},
        "inputs": [_binding(b) for b in program.inputs],
        "outputs": [_binding(b) for b in program.outputs],
    }
    return Packed(msgspec.msgpack.encode(document), tensors)


def unpack(packed: Packed) -> Lowered:
    """Put a program together again; described parameters have no numbers (``meta`` device)."""
    document = msgspec.msgpack.decode(packed.document)
    fakes, graph, root = _Fakes(), fx.Graph(), torch.nn.Module()
    stacks = [_stack(row) for row in document["stacks"]]
    made: list[fx.Node] = []
    for op, name, target, args, kwargs, value, stack in document["nodes"]:
        if op == "get_attr":
            held = packed.tensors[f"attribute {target}"]
            root.register_buffer(target, held, persistent=False)
        given = tuple(_restored(args, made))
        named = {key: _restored(one, made) for key, one in kwargs.items()}
        node = graph.create_node(
            op, _found(target) if op == "call_function" else target, given, named, name=name
        )
        node.name = name  # see :func:`.program.copied`
        node.meta = dict(stacks[stack])
        if value is not None:
            node.meta["val"] = fakes.value(value)
        made.append(node)
    state = {
        name: packed.tensors.get(f"parameter {name}", _described(told))
        for name, told in document["state"].items()
    }
    own = {
        name: tuple(packed.tensors[f"parameter {name} of {i}"] for i in by_rank)
        for name, by_rank in document["own"].items()
    }
    return Lowered(
        module_of(root, graph),
        state,
        tuple(_bound(b) for b in document["inputs"]),
        tuple(_bound(b) for b in document["outputs"]),
        own,
    )


class _Numbered:
    """Ranks' tensors; those that several ranks have in common are kept once.

    Attributes:
        distinct: the tensors.
        by_rank: by rank, which.
    """

    def __init__(self, of: Sequence[Tensor]) -> None:
        numbers = {id(one): i for i, one in enumerate({id(one): one for one in of}.values())}
        self.distinct = list({id(one): one for one in of}.values())
        self.by_rank = [numbers[id(one)] for one in of]


class Table:
    """Equal rows are kept once: most nodes share their module stack and source line."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._known: dict[Any, int] = {}

    def add(self, row: Any) -> int:
        """The row's number."""
        if row not in self._known:
            self._known[row] = len(self.rows)
            self.rows.append(row)
        return self._known[row]


class _Fakes:
    """Fake tensors, equal ones made once."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._known: dict[Any, Tensor] = {}

    def value(self, told: Any) -> Any:
        kind, rest = told
        if kind == "tensor":
            dtype, shape, stride = rest
            key = (dtype, tuple(shape), tuple(stride))
            if key not in self._known:
                with self._mode:
                    made = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype))
                self._known[key] = made
            return self._known[key]
        if kind in ("list", "tuple"):
            made_of = [None if one is None else self.value(one) for one in rest]
            return made_of if kind == "list" else tuple(made_of)
        return rest


def _attribute(root: torch.nn.Module, node: fx.Node) -> Tensor:
    held = getattr(root, str(node.target))
    assert isinstance(held, Tensor), node.target
    return held


def module_rows(node: fx.Node) -> tuple[tuple[str, str, str], ...]:
    """The modules whose forward made the node, outermost first: key, path, class."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, path, _class_name(of)) for key, (path, of) in stack.items())


def _class_name(of: Any) -> str:
    return of if isinstance(of, str) else f"{of.__module__}.{of.__qualname__}"


def _stack(row: Sequence[Any]) -> dict[str, Any]:
    modules, trace = row
    meta: dict[str, Any] = {"nn_module_stack": {key: (path, of) for key, path, of in modules}}
    return meta if trace is None else {**meta, "stack_trace": trace}


def target_name(node: fx.Node) -> str:
    """What a node calls, by a name that finds it again.

    Raises:
        CannotLower: it has none.
    """
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if getattr(target, "__module__", None) in _PYTHON:
        return f"{target.__module__}.{target.__name__}"
    raise CannotLower(
        f"{target} cannot be named in a packed program.",
        where=f"{module_path(node)} ({source_line(node) or 'source unknown'})",
    )


def _found(target: str) -> Any:
    first, name, *overload = target.split(".")
    if not overload:
        return getattr(importlib.import_module(first), name)
    return getattr(getattr(getattr(torch.ops, first), name), overload[0])


def plain(value: Any, index: Mapping[fx.Node, int], node: fx.Node) -> Any:
    """An argument in MessagePack's types: containers and what has a name are tagged.

    Raises:
        CannotLower: it has no such form.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return value
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, list | tuple):
        items = [plain(one, index, node) for one in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _NAMED.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise CannotLower(
        f"the argument {value!r} of {node.target} cannot be packed.",
        where=f"{module_path(node)} ({source_line(node) or 'source unknown'})",
    )


def _restored(value: Any, made: Sequence[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_restored(one, made) for one in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "node":
        return made[inner]
    if tag == "tuple":
        return tuple(_restored(one, made) for one in inner)
    if tag == "complex":
        return complex(*inner)
    return torch.device(inner) if tag == "device" else getattr(torch, inner)


def told_value(value: Any) -> Any:
    """What the fake value of a node tells.

    Raises:
        CannotLower: it is no tensor, no number and no container of them.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        return ("tensor", (*told_tensor(value), list(value.stride())))
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return (kind, [told_value(one) for one in value])
    if isinstance(value, bool | int | float | str):
        return ("number", value)
    raise CannotLower(f"a value of type {type(value).__name__} cannot be packed.")


def told_tensor(tensor: Tensor) -> tuple[str, list[int]]:
    """Type and shape."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _described(told: Sequence[Any]) -> Tensor:
    dtype, shape = told
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _binding(binding: Binding) -> tuple[str, str, str, list[int]]:
    dtype = str(binding.dtype).removeprefix("torch.")
    return binding.name, binding.node, dtype, list(binding.shape)


def _bound(told: Sequence[Any]) -> Binding:
    name, node, dtype, shape = told
    return Binding(name, node, getattr(torch, dtype), tuple(shape))
