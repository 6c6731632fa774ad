"""Passes over a decomposed graph, before it is sharded."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import torch
from torch import fx

from .program import HALF, erase_dead, evaluated, tensor_of
from .tensors import as_bytes
from .writer import Writer

_SLICE_SCATTER = torch.ops.aten.slice_scatter.default
_COPY = torch.ops.aten.copy.default


def copies_as_values(graph: fx.Graph) -> None:
    """``copy(destination, source)`` becomes the source, cast and expanded like the destination."""
    write = Writer(graph)
    for node in graph.find_nodes(op="call_function", target=_COPY):
        like, source = tensor_of(node), node.args[1]
        assert isinstance(source, fx.Node)
        write.origin = node
        with graph.inserting_before(node):
            if tensor_of(source).dtype != like.dtype:
                source = write.op(torch.ops.aten._to_copy.default, source, dtype=like.dtype)
            if tensor_of(source).shape != like.shape:
                source = write.op(torch.ops.aten.expand.default, source, list(like.shape))
        node.replace_all_uses_with(source)
    erase_dead(graph)


def interleave_strided_writes(graph: fx.Graph) -> int:
    """Turn strided writes that fill a tensor completely into one stack; returns how many.

    Before and after, for rotary embeddings written as ``out[..., 0::2] = a; out[..., 1::2] = b``::

        slice_scatter(slice_scatter(base, a, dim, 0, end, 2), b, dim, 1, end, 2)
        reshape(stack([a, b], dim + 1), base.shape)

    The base, a constant as large as the activation, and the scatters disappear.
    """
    done, write = 0, Writer(graph)
    for node in reversed(list(graph.nodes)):
        parts = _parts(node) if node.users else None
        if parts is None:
            continue
        dim = _slice_arguments(node)[2]
        write.origin = node
        with graph.inserting_before(node):
            columns = [write.op(torch.ops.aten.unsqueeze.default, x, dim + 1) for x in parts]
            stacked = write.op(torch.ops.aten.cat.default, columns, dim + 1)
            result = write.op(torch.ops.aten.reshape.default, stacked, list(tensor_of(node).shape))
        node.replace_all_uses_with(result)
        graph.erase_node(node)  # so that the writes under it have no reader any more
        done += 1
    erase_dead(graph)
    return done


def fold_constants(graph_module: fx.GraphModule) -> None:
    """Evaluate once, in its own precision, what depends on constants alone.

    Half-precision values are left for later: with them, folding would round what the proof wants
    to compute in float32.
    """
    graph = graph_module.graph
    attributes = {
        n: graph_module.get_buffer(str(n.target)) for n in graph.find_nodes(op="get_attr")
    }
    known = {n: value for n, value in attributes.items() if _is_exact(value)}
    folded: dict[tuple[object, ...], fx.Node] = {}
    for node, value in evaluated(graph, known, lambda n: _is_exact(n.meta.get("val"))):
        same = _identity(value)
        if same not in folded:
            name = f"_folded_{node.name}"
            graph_module.register_buffer(name, value.contiguous().clone(), persistent=False)
            with graph.inserting_before(node):
                folded[same] = graph.get_attr(name)
            folded[same].meta = dict(node.meta)
        node.replace_all_uses_with(folded[same])
    erase_dead(graph)


def share_constants(graph_module: fx.GraphModule) -> None:
    """One attribute for equal constants: models make the same rotary table in every block.

    What follows then splits, sends and stores it once.
    """
    graph = graph_module.graph
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        same = first.setdefault(_identity(graph_module.get_buffer(str(node.target))), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _identity(value: torch.Tensor) -> tuple[object, ...]:
    """What equal constants have in common."""
    raw = as_bytes(value.detach().cpu().contiguous()).numpy()
    return value.dtype, tuple(value.shape), value.device, hashlib.sha256(raw).digest()  # type: ignore[arg-type]


def _is_exact(value: Any) -> bool:
    leaves = value if isinstance(value, list | tuple) else [value]
    return all(
        not isinstance(x, torch.Tensor) or (x.dtype not in HALF and x.numel() <= _LARGEST)
        for x in leaves
    )


_LARGEST: Final = 1 << 26
"""Numbers in the largest constant that is folded."""


def simplify(graph: fx.Graph) -> None:
    """Fewer kinds of operators: contiguous writes become concatenations, repeats become views.

    ::

        slice_scatter(base, src, dim, start, end)  ->  cat([base[:start], src, base[end:]], dim)
        repeat(x, [.., n, ..])                     ->  reshape(expand(unsqueeze(x)))
        split(x, size)                             ->  split_with_sizes(x, [size, ..])
        bitwise_and(a, b) on booleans              ->  logical_and(a, b)
        where(c, a, b) on booleans                 ->  c and a, or not c and b
        bucketize(x, boundaries)                   ->  sum(boundaries < x)
    """
    write = Writer(graph)
    for node in list(graph.nodes):
        rule = _SIMPLER.get(node.target)
        if rule is not None:
            write.origin = node
            with graph.inserting_before(node):
                result = rule(write, node)
            if result is not None:
                node.replace_all_uses_with(result)
    erase_dead(graph)


def _write(write: Writer, node: fx.Node) -> fx.Node | None:
    base, source, dim, start, end, step = _slice_arguments(node)
    size = tensor_of(node).shape[dim]
    if step != 1:
        return None
    start, end, _ = slice(start, end).indices(size)
    if start >= end:
        return None
    return _joined(write, node, base, source, dim, start, end)


def _write_one(write: Writer, node: fx.Node) -> fx.Node | None:
    given: Any = node.args
    base, source, dim, index = given
    dim = int(dim) % tensor_of(node).dim()
    start = int(index) % tensor_of(node).shape[dim]
    column = write.op(torch.ops.aten.unsqueeze.default, source, dim)
    return _joined(write, node, base, column, dim, start, start + 1)


def _joined(
    write: Writer, node: fx.Node, base: Any, source: fx.Node, dim: int, start: int, end: int
) -> fx.Node:
    size, parts = tensor_of(node).shape[dim], [source]
    if start > 0:
        parts.insert(0, write.op(torch.ops.aten.slice.Tensor, base, dim, 0, start))
    if end < size:
        parts.append(write.op(torch.ops.aten.slice.Tensor, base, dim, end, size))
    if len(parts) == 1:
        return source
    if tensor_of(node).dtype != torch.bool:
        return write.op(torch.ops.aten.cat.default, parts, dim)
    # TensorRT does not join booleans with a constant.
    cast = torch.ops.aten._to_copy.default
    numbers = [write.op(cast, part, dtype=torch.int32) for part in parts]
    joined = write.op(torch.ops.aten.cat.default, numbers, dim)
    return write.op(cast, joined, dtype=torch.bool)


def _repeat(write: Writer, node: fx.Node) -> fx.Node:
    x, times = node.args
    assert isinstance(x, fx.Node) and isinstance(times, list | tuple)
    given = tensor_of(x).shape
    sizes = [1] * (len(times) - len(given)) + list(given)
    columns, wide = [], []
    for size, count in zip(sizes, times, strict=True):
        if count != 1 and size != 1:
            columns.append(1)
            wide.append(count)
        columns.append(size)
        wide.append(size if size != 1 else count)
    reshape = torch.ops.aten._reshape_copy.default
    expanded = write.op(torch.ops.aten.expand.default, write.op(reshape, x, columns), wide)
    return write.op(reshape, expanded, list(tensor_of(node).shape))


def _without_empty(write: Writer, node: fx.Node) -> None:
    """TensorRT has no tensors without elements; in a concatenation they can be left out."""
    parts, *dim = node.args
    assert isinstance(parts, list | tuple)
    full = [x for x in parts if isinstance(x, fx.Node) and tensor_of(x).numel()]
    if full and len(full) < len(parts):
        node.args = (full, *dim)


def _no_write(write: Writer, node: fx.Node) -> fx.Node | None:
    """A write to no place at all."""
    base, indices, *_ = node.args
    assert isinstance(base, fx.Node) and isinstance(indices, list | tuple)
    places = [tensor_of(index).numel() for index in indices if isinstance(index, fx.Node)]
    return base if 0 in places else None


def _split(write: Writer, node: fx.Node) -> None:
    given: Any = node.args
    x, _, *dim = given
    named: Any = dim[0] if dim else node.kwargs.get("dim", 0)
    along = int(named)
    sizes = [part.shape[along] for part in node.meta["val"]]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (x, sizes, along), {}


_LOGICAL: Final[dict[Any, Any]] = {
    torch.ops.aten.bitwise_and.Tensor: torch.ops.aten.logical_and.default,
    torch.ops.aten.bitwise_or.Tensor: torch.ops.aten.logical_or.default,
    torch.ops.aten.bitwise_xor.Tensor: torch.ops.aten.logical_xor.default,
    torch.ops.aten.bitwise_not.default: torch.ops.aten.logical_not.default,
}


def _logical(write: Writer, node: fx.Node) -> None:
    """On booleans the two are the same, and TensorRT has the logical one."""
    if tensor_of(node).dtype == torch.bool:
        node.target = _LOGICAL[node.target]


def _where(write: Writer, node: fx.Node) -> fx.Node | None:
    """Torch-TensorRT makes the result an integer, which attention then adds as a mask."""
    if tensor_of(node).dtype != torch.bool:
        return None
    condition, x, y = node.args
    both, either = torch.ops.aten.logical_and.default, torch.ops.aten.logical_or.default
    otherwise = write.op(torch.ops.aten.logical_not.default, condition)
    return write.op(either, write.op(both, condition, x), write.op(both, otherwise, y))


def _bucketize(write: Writer, node: fx.Node) -> fx.Node:
    """TensorRT has no search; a bucket's number is how many boundaries lie below."""
    x, boundaries = node.args
    assert isinstance(x, fx.Node)
    below = torch.ops.aten.ge.Tensor if node.kwargs.get("right") else torch.ops.aten.gt.Tensor
    column = write.op(torch.ops.aten.unsqueeze.default, x, tensor_of(x).dim())
    counted = write.op(
        torch.ops.aten._to_copy.default, write.op(below, column, boundaries), dtype=torch.int32
    )
    total = write.op(torch.ops.aten.sum.dim_IntList, counted, [-1], dtype=torch.int32)
    return write.op(torch.ops.aten._to_copy.default, total, dtype=tensor_of(node).dtype)


_SIMPLER: Final[dict[Any, Any]] = {
    _SLICE_SCATTER: _write,
    torch.ops.aten.select_scatter.default: _write_one,
    torch.ops.aten.repeat.default: _repeat,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.aten.cat.default: _without_empty,
    torch.ops.aten.index_put.default: _no_write,
    torch.ops.aten.where.self: _where,
    torch.ops.aten.bucketize.Tensor: _bucketize,
    torch.ops.aten.bitwise_and.Tensor: _logical,
    torch.ops.aten.bitwise_or.Tensor: _logical,
    torch.ops.aten.bitwise_xor.Tensor: _logical,
    torch.ops.aten.bitwise_not.default: _logical,
}


def _parts(last: fx.Node) -> list[fx.Node] | None:
    """What is written at offsets 0, 1, ... of every stride, when that fills the tensor."""
    if last.target is not _SLICE_SCATTER:
        return None
    _, _, dim, _, _, step = _slice_arguments(last)
    size = tensor_of(last).shape[dim]
    written: dict[int, fx.Node] = {}
    node: Any = last
    while isinstance(node, fx.Node) and node.target is _SLICE_SCATTER:
        base, source, own_dim, start, end, own_step = _slice_arguments(node)
        if (own_dim, own_step) != (dim, step) or end < size or not 0 <= start < step:
            return None
        written.setdefault(start, source)
        node = base
    if step < 2 or size % step or sorted(written) != list(range(step)):
        return None
    return [written[offset] for offset in range(step)]


def _slice_arguments(node: fx.Node) -> tuple[Any, Any, int, int, int, int]:
    names = ("self", "src", "dim", "start", "end", "step")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    size = tensor_of(node).shape[given.get("dim", 0)]
    return (
        given["self"],
        given["src"],
        int(given.get("dim", 0)) % tensor_of(node).dim(),
        int(given.get("start") or 0),
        size if given.get("end") is None else int(given["end"]),
        int(given.get("step", 1)),
    )
